"""The steps that a specialised network goes through before it ships, as one object of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from ofa.compress.prune import Pruning
from ofa.compress.quantize import Quantization
from ofa.finetune import Finetuning


@dataclass(frozen=True, slots=True)
class Compression:
    """Prune, fine-tune, quantize."""

    pruning: Pruning = field(default_factory=Pruning)
    finetuning: Finetuning = field(default_factory=Finetuning)
    quantization: Quantization = field(default_factory=Quantization)

"""ONNX Runtime: float, or int8 as QDQ pairs; any number of images at once."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.compress.quantize import Quantization, quantize
from ofa.export.graph import onnx_model
from ofa.export.latency import open_session
from ofa.export.onnx import load_onnx, weight_bytes
from ofa.export.runtime import Call, Logits, precision, require_bits, require_file, shape_of
from ofa.files import atomic_write


@dataclass(frozen=True, slots=True)
class Onnx:
    """bits: 32 for float, 8 for int8 with unsigned activations, calibrated as `quantization` says."""

    bits: int = 8
    quantization: Quantization = field(default_factory=Quantization)

    def __post_init__(self) -> None:
        require_bits(self.bits)

    @property
    def suffix(self) -> str:
        """How its files end."""
        return f".{precision(self.bits)}.onnx"

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write "input" (batch, C, H, W) to "output" (batch, K); see `ofa.export.graph` for the operators."""
        content = onnx_model(net, shape_of(images)).SerializeToString()
        if self.bits == 32:
            atomic_write(path, content)
            return
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "float.onnx")
            source.write_bytes(content)
            quantize(source, path, images.split(256), self.quantization)

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K)."""
        session = open_session(require_file(path), threads)
        name = session.get_inputs()[0].name

        def call(x: NDArray[np.float32]) -> Logits:
            return np.asarray(session.run(None, {name: x})[0])

        return call

    def describe(self, path: Path) -> dict[str, Any]:
        """Opset, and bytes of all constants."""
        return {"opset": load_onnx(path).opset_import[0].version, "weight_bytes": weight_bytes(path)}

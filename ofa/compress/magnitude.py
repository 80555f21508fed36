"""Fine-grained pruning by magnitude: the smallest weights become zero, and the others are trained on.

Zeros make packed files smaller.  They give no speed in ONNX Runtime or LiteRT: for that, prune `channels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ofa.compress.allocation import by_magnitude, by_sensitivity, erdos_renyi, sensitivity, uniform, zeros_for
from ofa.compress.chain import Work
from ofa.compress.fisher import weight_scales
from ofa.compress.layers import BYTES, Layer, listed, patterns, weight_layers
from ofa.compress.sparsity import check_pattern, hold_zeros, n_of_m, zero_smallest
from ofa.compress.targets import Target, amount, check_target
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.finetune import Finetuning

SHARED = {"uniform": uniform, "erdos_renyi": erdos_renyi}
ALLOCATIONS = ("magnitude", *SHARED, "sensitivity")
CRITERIA = ("magnitude", "fisher")
EVERY = 10  # optimizer steps between two prunings of a gradual schedule


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Zero the smallest weights down to a size, and fine-tune with the unpruned network as teacher (Han et al. 2015).

    size: of the parameters that are not zero, as a share of all, or in bytes of float32 ("150KB").  allocation: how
    many weights each layer loses: the smallest of all layers together (magnitude), as many as cost each layer alone the
    same accuracy (sensitivity, measured on `images` validation images), the same share (uniform), or fewer the smaller
    the layer (erdos_renyi).  rounds: prune and fine-tune so often, the size falling by the same factor each time.
    criterion: by which the smallest are meant: magnitude, or fisher: magnitude times what the loss feels of the weight,
    from `images` validation images (`ofa.compress.fisher.weight_scales`); not with allocation by sensitivity.
    gradual: share of the fine-tuning during which sparsity rises to its end by a cubic (Zhu & Gupta 2017, eq. 1); 0
    zeroes all weights at once.  keep: patterns of the layers that are left as they are.
    """

    size: Target = 0.25
    allocation: str = "magnitude"
    criterion: str = "magnitude"
    rounds: int = 1
    gradual: float = 0.0
    images: int = 1000
    keep: tuple[str, ...] = ()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        check_target("size", self.size, "bytes")
        if self.allocation not in ALLOCATIONS:
            raise UserError(f"allocation {self.allocation!r} is not known; choose from {', '.join(ALLOCATIONS)}")
        if self.criterion not in CRITERIA:
            raise UserError(f"criterion {self.criterion!r} is not known; choose from {', '.join(CRITERIA)}")
        if self.criterion == "fisher" and self.allocation == "sensitivity":
            raise UserError("allocation sensitivity is measured by magnitude; give criterion=fisher another allocation")
        if self.rounds < 1 or not 0 <= self.gradual <= 1 or self.images < 1:
            given = f"rounds {self.rounds}, gradual {self.gradual}, images {self.images}"
            raise UserError(f"{given}: rounds and images must be at least 1, gradual a share from 0 to 1")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A pruned and fine-tuned copy in evaluation mode.  Raises UserError where the size cannot be met."""
        parameters = sum(parameter.numel() for parameter in net.parameters())
        share = min(1.0, amount("size", self.size, parameters * BYTES, "bytes") / (parameters * BYTES))
        zeros_for(net, weight_layers(net, self.keep), share * parameters, self.size)
        for turn in range(1, self.rounds + 1):
            names = list(weight_layers(net, self.keep)) if self.criterion == "fisher" else []
            scales = weight_scales(net, names, work, self.images) if names else {}
            sparsities = self.sparsities(net, work, share ** (turn / self.rounds), scales)
            net = train_sparse(net, sparsities, work, self.finetuning, gradual=self.gradual, scales=scales)
        return net

    def sparsities(
        self, net: nn.Module, work: Work, share: float, scales: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, float]:
        """The share of zeros of each layer that leaves `share` of all parameters not zero."""
        layers = weight_layers(net, self.keep)
        zeros = zeros_for(net, layers, share * sum(p.numel() for p in net.parameters()), self.size)
        if self.allocation == "sensitivity":
            rows = sensitivity(net, work, keep=self.keep, images=self.images)
            whole = accuracy(net, work.data, "val", resolution=work.resolution, limit=self.images)
            return by_sensitivity(rows, whole, zeros)
        if self.allocation == "magnitude":
            return by_magnitude(layers, zeros, scales)
        return SHARED[self.allocation](layers, zeros)


@dataclass(frozen=True, slots=True)
class NOfM:
    """Keep the n largest of every m neighbouring weights along the input channels (2:4 of Mishra et al. 2021).

    Layers whose input channels are no multiple of m stay dense, the first convolution of an image among them.  GPUs
    from NVIDIA's Ampere on run 2:4 faster; ONNX Runtime and LiteRT do not.
    """

    n: int = 2
    m: int = 4
    keep: tuple[str, ...] = ()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        check_pattern(self.n, self.m)

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A pruned and fine-tuned copy in evaluation mode.  Raises UserError where no layer bears the pattern."""
        pruned = copy.deepcopy(net)
        layers = weight_layers(pruned, self.keep)
        able = {name: layer for name, layer in layers.items() if layer.weight.shape[1] % self.m == 0}
        if not able:
            raise UserError(
                f"{self.n}:{self.m} suits no layer: none of {listed(list(layers))} has input channels in multiples of "
                f"{self.m}; lower m"
            )
        with torch.no_grad():
            for layer in able.values():
                layer.weight.copy_(n_of_m(layer.weight, self.n, self.m))
        return finetuned(pruned, work, self.finetuning)


def train_sparse(
    net: nn.Module,
    sparsities: Mapping[str, float],
    work: Work,
    finetuning: Finetuning,
    *,
    gradual: float = 0.0,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
) -> nn.Module:
    """A fine-tuned copy with the given share of zeros in each layer, reached at once or by the gradual schedule.

    scales: by which magnitudes are multiplied before they are compared, of the layers that have any.
    """
    pruned = copy.deepcopy(net)
    if not gradual or not finetuning.epochs:
        prune_layers(pruned, sparsities, scales=scales)
        return finetuned(pruned, work, finetuning)
    steps = finetuning.steps(work.data.size("train"))
    ramp = Ramp(lambda trained, done: prune_layers(trained, sparsities, done, scales), steps, gradual)
    return finetuned(pruned, work, finetuning, ramp)


@torch.no_grad()
def prune_layers(
    net: nn.Module,
    sparsities: Mapping[str, float],
    done: float = 1.0,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Zero each layer's smallest weights, `done` of its sparsity, in place; weights that are zero stay the first."""
    for name, sparsity in sparsities.items():
        layer: Layer = net.get_submodule(name)  # type: ignore[assignment]
        scores = layer.weight.abs() * scales[name] if name in scales else None
        layer.weight.copy_(zero_smallest(layer.weight, done * sparsity, scores))


def cubic(progress: float) -> float:
    """The share of the final sparsity after a share of the schedule (Zhu & Gupta 2017, eq. 1, from sparsity 0)."""
    return 1 - (1 - min(1.0, progress)) ** 3


@dataclass(slots=True)
class Ramp:
    """For `finetune(after_step=...)`: calls `prune(net, share of the final sparsity)` at times, and holds the zeros.

    steps: of the whole fine-tuning; the cubic ends after `gradual` of them.  holds: whether zeros are to be held.
    """

    prune: Callable[[nn.Module, float], None]
    steps: int
    gradual: float
    holds: bool = True
    step: int = 0
    hold: Callable[[nn.Module], None] = lambda net: None

    def __call__(self, net: nn.Module) -> None:
        """After one optimizer step."""
        self.step += 1
        self.hold(net)
        last = min(self.steps, max(1, round(self.gradual * self.steps)))
        if self.step == last or (self.step < last and self.step % EVERY == 0):
            self.prune(net, cubic(self.step / last))
            self.hold = hold_zeros(net) if self.holds else self.hold


def finetuned(
    net: nn.Module, work: Work, finetuning: Finetuning, after_step: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """A fine-tuned copy, with the work's teacher, seed and report; zeros of `net` stay zero, whatever comes to them."""
    hold = hold_zeros(net)

    def after(trained: nn.Module) -> None:
        if after_step is not None:
            after_step(trained)
        hold(trained)

    return work.finetune(net, finetuning, after)

"""How many weights each layer of a network may lose.  L layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.layers import Layer, weight_layers
from ofa.compress.sparsity import zero_smallest
from ofa.errors import UserError
from ofa.evaluate import accuracy

LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one layer's compression costs: the network's accuracy (0 to 1) with this layer alone at `level`."""

    layer: str
    weights: int
    level: float
    accuracy: float


def sensitivity(
    net: nn.Module,
    work: Work,
    *,
    levels: Iterable[float] = LEVELS,
    change: Callable[[Tensor, float], Tensor] = zero_smallest,
    keep: Sequence[str] = (),
    images: int | None = 1000,
) -> list[Sensitivity]:
    """Accuracy of the network on `images` validation images (None: all), each layer in turn at each level.

    change: a layer's weight and a level to its compressed weight; at first a share of zeros.  Nothing is trained, and
    `net` is left as it is.
    """
    trial = copy.deepcopy(net).eval()
    rows = []
    for name, layer in weight_layers(trial, keep).items():
        weight = layer.weight.detach().clone()
        for level in levels:
            _set(layer, change(weight, level))
            score = accuracy(trial, work.data, "val", resolution=work.resolution, limit=images)
            rows.append(Sensitivity(name, weight.numel(), level, score))
        _set(layer, weight)
    return rows


@torch.no_grad()
def _set(layer: Layer, weight: Tensor) -> None:
    layer.weight.copy_(weight)


def uniform(layers: Mapping[str, Layer], zeros: int) -> dict[str, float]:
    """The same sparsity for every layer, so that `zeros` weights are zero in all."""
    total = sum(layer.weight.numel() for layer in layers.values())
    return dict.fromkeys(layers, zeros / total)


def erdos_renyi(layers: Mapping[str, Layer], zeros: int) -> dict[str, float]:
    """Layers of few weights for their sides stay denser: density is in proportion to the sides' sum over their product.

    The kernel's sides count too (Evci et al. 2020, sec. 3, "ERK"); a layer whose share would be above 1 stays whole.
    """
    weights = np.array([layer.weight.numel() for layer in layers.values()])
    sides = np.array([sum(layer.weight.shape) for layer in layers.values()])
    kept, low, high = weights.sum() - zeros, 0.0, float(weights.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(weights, middle * sides).sum() >= kept else (middle, high)
    densities = np.minimum(1.0, high * sides / weights)
    return dict(zip(layers, (1 - densities).tolist(), strict=True))


def by_magnitude(
    layers: Mapping[str, Layer], zeros: int, scales: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, float]:
    """Each layer's share of the `zeros` smallest magnitudes, times their scales, of all layers together."""
    values = torch.cat(
        [(layer.weight.detach().abs() * scales.get(name, 1)).flatten() for name, layer in layers.items()]
    )
    smallest = values.argsort(stable=True)[:zeros]
    gone = torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill_(0, smallest, True)
    parts = gone.split([layer.weight.numel() for layer in layers.values()])
    return {name: int(part.sum()) / part.numel() for name, part in zip(layers, parts, strict=True)}


def by_sensitivity(rows: Sequence[Sensitivity], accuracy: float, zeros: int) -> dict[str, float]:
    """The sparsity at which each layer alone loses the same accuracy, so that `zeros` weights are zero in all.

    accuracy: of the whole network (0 to 1).  A curve runs straight between its levels, from no loss at 0 to the loss
    of everything at 1, and never falls: noise that lets an accuracy rise with sparsity is smoothed over.  At each loss
    the largest sparsity counts.
    """
    curves = _curves(rows, accuracy)
    weights = {row.layer: row.weights for row in rows}

    def shares(loss: float) -> dict[str, float]:
        return {name: _reach(levels, losses, loss) for name, (levels, losses) in curves.items()}

    low, high = -1e-9, accuracy  # no layer is pruned at a loss below 0
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(share * weights[name] for name, share in shares(middle).items())
        low, high = (low, middle) if found >= zeros else (middle, high)
    below, above = shares(low), shares(high)
    few, many = (sum(share * weights[name] for name, share in s.items()) for s in (below, above))
    part = (zeros - few) / (many - few) if many > few else 1.0  # a level curve takes many weights at one loss
    return {name: min(1.0, max(0.0, below[name] + part * (above[name] - below[name]))) for name in below}


def _curves(rows: Sequence[Sensitivity], accuracy: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Levels and losses of each layer, from (0, 0) to (1, accuracy), losses never falling."""
    curves = {}
    for name in dict.fromkeys(row.layer for row in rows):
        own = sorted((row.level, accuracy - row.accuracy) for row in rows if row.layer == name)
        levels = np.array([0.0, *(level for level, _ in own), 1.0])
        losses = np.maximum.accumulate([0.0, *(loss for _, loss in own), accuracy])
        curves[name] = levels, losses
    return curves


def _reach(levels: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """The largest level at which a curve's loss is at most `loss`."""
    if loss < 0:
        return 0.0
    last = int(np.searchsorted(losses, loss, side="right")) - 1
    if last == len(levels) - 1:
        return 1.0
    rise = losses[last + 1] - losses[last]
    return float(levels[last] + (levels[last + 1] - levels[last]) * (loss - losses[last]) / rise)


def zeros_for(net: nn.Module, layers: Mapping[str, Layer], nonzeros: float, target: object) -> int:
    """How many weights of `layers` must be zero for the network to have `nonzeros` parameters that are not.

    Raises UserError where the parameters that stay are more than that already.
    """
    own = sum(layer.weight.numel() for layer in layers.values())
    total = sum(parameter.numel() for parameter in net.parameters())
    zeros = max(0, total - int(nonzeros))
    if zeros >= own:
        least = (total - own) / total
        raise UserError(
            f"size {target} cannot be met: what is not pruned (batch norm, biases, kept layers) is {least:.3g} of the "
            f"size already; give a larger size than that, or keep fewer layers"
        )
    return zeros

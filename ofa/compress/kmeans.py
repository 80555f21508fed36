"""Weights shared by k-means: each layer keeps a codebook of a few values (Han et al. 2016, "Deep Compression", sec. 3).

n weights of a layer, k entries of its codebook.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa.compress.allocation import sensitivity
from ofa.compress.chain import Work
from ofa.compress.layers import Layer, weight_layers
from ofa.compress.magnitude import finetuned
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.finetune import Finetuning

STARTS = ("linear", "density", "random")
FLOAT = 32  # bits that leave a layer as it is
ROUNDS = 100
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KMeans:
    """Replace every weight by the nearest entry of its layer's codebook, then train the codebooks.

    bits: of an index, 1 to 8: a codebook has 2^bits entries, one of which is 0 in a layer that has pruned weights.
    layers: other bits for layers that match a pattern, such as {"units.0.*": 8}; 32 leaves them as they are; the first
    pattern that matches counts.  start: where Lloyd's algorithm begins: spread evenly from the least to the largest
    weight, by density, or at random weights.  finetuning: how the codebooks are trained (None: not at all); the
    gradient of an entry is the mean over the weights that share it (fig. 3: the sum).  reassign: after each step every
    weight goes to the entry nearest to where training has moved it, straight through the codebook; else it stays with
    the entry that rounding gave it, as in the paper.  Biases and batch norm stay float.
    """

    bits: int = 4
    layers: Mapping[str, int] | None = None
    start: str = "linear"
    reassign: bool = True
    finetuning: Finetuning | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        check_layers("layers", self.layers, 1, 8)
        if self.start not in STARTS:
            raise UserError(f"start {self.start!r} is not known; choose from {', '.join(STARTS)}")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A network whose layers hold at most 2^bits different weights each."""
        net = copy.deepcopy(net).eval()
        for name, layer in weight_layers(net).items():
            bits = bits_for(name, self.bits, self.layers, net)
            if bits != FLOAT:
                share(layer, bits, self.start, seed=work.seed)
        if self.finetuning is not None:
            net = finetuned(net, work, self.finetuning, reassign if self.reassign else None)
        return bake(net).eval()


def sensitive_layers(
    net: nn.Module, work: Work, bits: int, *, loss: float = 0.01, images: int | None = 1000, start: str = "linear"
) -> list[str]:
    """Layers whose codebook of so many bits alone costs more than `loss` of the accuracy on `images` validation images.

    More bits for these alone: `KMeans(2, dict.fromkeys(found, 4))`.
    """

    def rounded(weight: Tensor, level: float) -> Tensor:
        entries, indices = codebook(weight.double().cpu().numpy().ravel(), 1 << int(level), start, seed=work.seed)
        return torch.from_numpy(entries[indices]).to(weight).view(weight.shape)

    whole = accuracy(net, work.data, "val", resolution=work.resolution, limit=images)
    rows = sensitivity(net, work, levels=(bits,), change=rounded, images=images)
    return [row.layer for row in rows if whole - row.accuracy > loss]


def check_bits(bits: float, least: int, most: int) -> None:
    """Raise UserError unless `bits` is a whole number from `least` to `most`, or 32, which leaves a layer in float."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (least <= bits <= most or bits == FLOAT):
        raise UserError(f"{bits} bits must be a whole number from {least} to {most}, or {FLOAT} to stay in float")


def check_layers(name: str, layers: Mapping[str, int] | None, least: int, most: int) -> None:
    """Raise UserError unless the option `name` holds such bits by patterns of layers, or nothing."""
    if not isinstance(layers, Mapping | None):
        raise UserError(f"{name}={layers} must be bits by patterns of layers, such as {{units.0.*: 8}}, or null")
    for bits in (layers or {}).values():
        check_bits(bits, least, most)


def bits_for(name: str, bits: int, layers: Mapping[str, int] | None, net: nn.Module) -> int:
    """Bits of a layer: those of the first pattern that matches its name, else `bits`; every pattern must match one."""
    names, layers = list(weight_layers(net)), layers or {}
    if unused := [pattern for pattern in layers if not any(fnmatch(known, pattern) for known in names)]:
        raise UserError(f"layers has {unused[0]!r}, which matches no layer; the layers are {', '.join(names)}")
    return next((chosen for pattern, chosen in layers.items() if fnmatch(name, pattern)), bits)


def share(layer: Layer, bits: int, start: str = "linear", *, seed: int = 0) -> None:
    """Replace a layer's weight, in place, by a codebook and an index for each; `bake` makes it a plain weight again."""
    weight = layer.weight.detach()
    entries, indices = codebook(weight.double().cpu().numpy().ravel(), 1 << bits, start, seed=seed)
    zero = int(np.flatnonzero(entries == 0)[0]) if (weight == 0).any() else None
    shared = Shared(
        torch.from_numpy(indices).to(weight.device).view(weight.shape), torch.from_numpy(entries).to(weight), zero
    )
    parametrize.register_parametrization(layer, "weight", shared)


def codebook(weights: Floats, k: int, start: str = "linear", *, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Entries (at most k,), ascending, and the index of each weight (n,), by Lloyd's algorithm in one dimension.

    Where some weights are exactly 0, so is one entry, and it takes no other weight.
    """
    kept = weights[weights != 0]
    pruned = len(kept) < len(weights)
    centers = lloyd(np.sort(kept), k - pruned, start, seed=seed)
    nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, weights, side="right")
    if not pruned:
        return centers, nearest
    entries = np.unique(np.append(centers, 0.0))
    values = np.where(weights == 0, 0.0, centers[np.minimum(nearest, len(centers) - 1)] if len(centers) else 0.0)
    return entries, np.searchsorted(entries, values)


def lloyd(weights: Floats, k: int, start: str = "linear", *, seed: int = 0) -> Floats:
    """k-means of sorted weights (n,): at most k different centers, ascending.

    In one dimension a cluster is a run of the sorted weights, so that a round costs k look-ups and sums.  A center that
    attracts no weight stays where it is; in the end it is left out.
    """
    if len(weights) <= k or k < 1:
        return np.unique(weights)[: max(k, 0)]
    centers = _start(weights, k, start, seed)
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    for _ in range(ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(weights, (centers[1:] + centers[:-1]) / 2), [len(weights)]])
        sizes = np.diff(ends)
        moved = np.where(sizes > 0, np.diff(sums[ends]) / np.maximum(sizes, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = np.sort(moved)
    return np.unique(centers[sizes > 0])


def _start(weights: Floats, k: int, start: str, seed: int) -> Floats:
    if start == "linear":
        return np.linspace(weights[0], weights[-1], k)
    if start == "density":
        return np.quantile(weights, (np.arange(k) + 0.5) / k)
    return np.sort(np.random.default_rng(seed).choice(weights, k, replace=False))


class Shared(nn.Module):
    """A weight as entries of a codebook, which are trained beside the weights that choose among them.

    The gradient of a weight's entry passes to the weight, and its mean over the weights that share an entry to the
    entry: the learning rate of ordinary weights suits it, whatever its cluster.  Entries are not the means of their
    weights, or every assignment would move them as Lloyd's algorithm does, whatever the loss says.  indices: of the
    shape of the weight; entries: (k,); zero: the entry of pruned weights, which stays 0.
    """

    def __init__(self, indices: Tensor, entries: Tensor, zero: int | None) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.indices: Tensor
        self.entries, self.zero = nn.Parameter(entries), zero

    def forward(self, weight: Tensor) -> Tensor:
        """A trained weight to one of the same shape, of at most k values."""
        found: Tensor = _Entries.apply(weight, self.entries, self.indices, self.zero)
        return found

    def assign(self, weight: Tensor) -> None:
        """Move each weight that is not pruned to the entry nearest to it, in place."""
        entries = self.entries.detach()
        order = entries.argsort()
        order = order[order != self.zero] if self.zero is not None else order
        if not len(order):
            return
        centers = entries[order]
        nearest = order[torch.bucketize(weight.detach().contiguous(), (centers[1:] + centers[:-1]) / 2)]
        self.indices = nearest if self.zero is None else torch.where(self.indices == self.zero, self.zero, nearest)


class _Entries(torch.autograd.Function):
    """Looks up entries by indices; the gradient is the weight's as it is, and an entry's the mean of its weights'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, entries: Tensor, indices: Tensor, zero: int | None) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.k, ctx.zero = len(entries), zero
        return entries[indices]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        indices = ctx.saved_tensors[0].flatten()
        sums = torch.bincount(indices, gradient.flatten().double(), ctx.k)
        means = (sums / torch.bincount(indices, minlength=ctx.k).clamp_min(1)).to(gradient.dtype)
        if ctx.zero is not None:
            means[ctx.zero] = 0
        return gradient, means, None, None


def reassign(net: nn.Module) -> None:
    """For `finetune(after_step=...)`: assign the weights of all codebooks anew, in place."""
    for module in net.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Shared):
            module[0].assign(module.original)


def bake(net: nn.Module) -> nn.Module:
    """Turn every parametrized weight into a plain one of the same values, in place; the network itself."""
    for module in list(net.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            if "bias" in module._parameters:  # behind the weight, where it was: exporters go by the order
                module._parameters["bias"] = module._parameters.pop("bias")
    return net

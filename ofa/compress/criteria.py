"""Which channels of a StaticNet belong together, and how important each is.

Channels that must go together form a group: the middle channels of one mbconv unit (expand, depthwise, squeeze-excite,
project) or of one bottleneck (both, since they are equally many), or a residual stream with every layer that writes to
it or reads it.  C channels of one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.blocks import BLOCKS
from ofa.compress.layers import device_of, outputs
from ofa.distill import label_loss
from ofa.errors import UserError
from ofa.modules import evaluating
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet
from ofa.table import POOLS

CRITERIA = ("l1", "l2", "bn_scale", "first")
Scores = dict[int, NDArray[np.float64]]


class Groups(NamedTuple):
    """The groups that a unit's input, middle and output channels belong to."""

    inner: int
    mid: int
    outer: int


def channel_groups(spec: NetSpec) -> list[Groups]:
    """The groups of each unit; group 0 is the image, the last one the classes."""
    groups, stream, fresh = [], 0, count(1)
    for unit in spec.units:
        mid = next(fresh) if _has_inner(unit) else stream
        outer = stream if unit.shortcut or unit.kind in POOLS else next(fresh)
        groups.append(Groups(stream, mid, outer))
        stream = outer
    return groups


def channel_scores(net: StaticNet, criterion: str, *, streams: bool) -> Scores:
    """Importance of each channel of each group that may be pruned, (C,), relative to the group's mean."""
    groups = channel_groups(net.spec)
    allowed = prunable(net.spec, groups, streams=streams)
    parts: dict[int, list[Tensor]] = {}
    for key, value, axes in channel_parameters(net, groups):
        for group, score in _scores(key, value, axes, criterion):
            if group in allowed:
                parts.setdefault(group, []).append(score / score.mean().clamp_min(1e-12))
    return {group: torch.stack(scores).mean(0).double().cpu().numpy() for group, scores in parts.items()}


def taylor_scores(net: StaticNet, batches: Iterable[tuple[Tensor, Tensor]], *, streams: bool) -> Scores:
    """The squared change of an image's loss that removing each channel would bring, to first order, (C,), the mean.

    A gate of 1 on a channel has the gradient sum(y dL/dy) over the channel's pixels y; that of a group's channel is the
    sum over the layers that write it, since it leaves all of them (Molchanov et al. 2019, eq. 8 for a gate, image by
    image; group Fisher, Liu et al. 2021).  Scores stand relative to the group's mean: in absolute terms early groups,
    whose channels cost most multiply-adds, seem the ones to keep.  batches: images (N, C, H, W) and labels (N,).
    """
    groups = channel_groups(net.spec)
    allowed = prunable(net.spec, groups, streams=streams)
    writers = {key.rpartition(".")[0]: axes[0] for key, _, axes in channel_parameters(net, groups) if ".se." not in key}
    normed = {name.removesuffix(".bn") for name in writers if name.endswith(".bn")}
    gated = {
        name: group
        for name, group in writers.items()
        if group in allowed and not (name.endswith(".conv") and name.removesuffix(".conv") in normed)
    }
    sums: dict[int, Tensor] = {}
    with evaluating(net), torch.enable_grad(), outputs(net, gated) as seen:
        for x, y in batches:
            x, y = x.to(device_of(net)).requires_grad_(), y.to(device_of(net))
            gradients = torch.autograd.grad(label_loss(net(x), y) * len(x), [output for _, output in seen])
            changes: dict[int, Tensor] = {}
            for (name, output), gradient in zip(seen, gradients, strict=True):
                change = (output.detach() * gradient).flatten(2).sum(2) if output.ndim > 2 else output * gradient
                changes[gated[name]] = changes.get(gated[name], 0.0) + change
            for group, change in changes.items():
                sums[group] = sums.get(group, 0.0) + change.detach().square().sum(0).double().cpu()
            seen.clear()
    if not sums:
        raise UserError("Taylor scores need gradients; give at least one batch of images")
    return {group: (total / total.mean().clamp_min(1e-30)).numpy() for group, total in sums.items()}


def prunable(spec: NetSpec, groups: list[Groups], *, streams: bool) -> set[int]:
    """The groups that may be pruned: middles of blocks and, if wanted, streams; never the image or the classes."""
    allowed = {g.mid for g, unit in zip(groups, spec.units, strict=True) if _has_inner(unit)}
    return allowed | ({group for g in groups for group in g} if streams else set()) - {0, groups[-1].outer}


def _scores(key: str, value: Tensor, axes: tuple[int, ...], criterion: str) -> Iterator[tuple[int, Tensor]]:
    """What one parameter says about the channels along each of its axes."""
    if criterion == "bn_scale":
        if key.endswith("bn.weight"):
            yield axes[0], value.abs()
    elif value.ndim > 1:
        for axis, group in enumerate(axes):
            if criterion == "first":
                yield group, torch.arange(value.shape[axis], 0.0, -1.0)
            else:
                yield group, value.transpose(0, axis).flatten(1).norm(p=int(criterion[1]), dim=1)


def channel_parameters(net: StaticNet, groups: list[Groups]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Every parameter and buffer with the group of its output and, where it has one, its input axis (-1: none)."""
    for key, value in net.state_dict().items():
        _, unit, *path = key.split(".")
        yield key, value, _axes(net.spec.units[int(unit)].kind, path, groups[int(unit)])


def _has_inner(unit: Unit) -> bool:
    return unit.kind in BLOCKS and BLOCKS[unit.kind].inner(unit)


def _axes(kind: str, path: list[str], g: Groups) -> tuple[int, ...]:
    if kind not in BLOCKS:
        return g.outer, g.inner
    axes = BLOCKS[kind].axes
    names = axes.get(path[0]) or axes[".".join(path[:2])]
    return tuple(getattr(g, name, -1) for name in names)

"""Structured channel pruning: a smaller plain network that computes what the larger one does with channels silenced.

Channels that must go together form a group: the middle channels of one mbconv unit (expand, depthwise, squeeze-excite,
project) or of one bottleneck (both, since they are equally many), or a residual stream with every layer that writes to
it or reads it.  C channels of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.blocks import BLOCKS
from ofa.errors import UserError
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec
from ofa.table import POOLS, layer_macs, spec_table

CRITERIA = ("l1", "l2", "bn_scale")


@dataclass(frozen=True, slots=True)
class Pruning:
    """How much to prune and what goes first.

    macs_ratio: MACs to keep, as a share of the network's (1 prunes nothing).  criterion: a channel's importance is the
    L1 or L2 norm of the weights that write and read it, or its batch-norm scale.  multiple: widths are cut to multiples
    of this, and none below it.  streams: cut the residual streams too, not only the middles of the mbconv units.
    """

    macs_ratio: float = 0.7
    criterion: str = "l2"
    multiple: int = 8
    streams: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.macs_ratio <= 1:
            raise UserError(f"macs_ratio {self.macs_ratio} must be above 0 and at most 1; 0.7 keeps 70 % of the MACs")
        if self.criterion not in CRITERIA:
            raise UserError(f"criterion {self.criterion!r} is not known; choose from {', '.join(CRITERIA)}")
        if self.multiple < 1:
            raise UserError(f"multiple {self.multiple} must be at least 1; 8 suits most runtimes")


class Groups(NamedTuple):
    """The groups that a unit's input, middle and output channels belong to."""

    inner: int
    mid: int
    outer: int


def prune(net: StaticNet, pruning: Pruning) -> StaticNet:
    """A new, smaller network with the most important channels of `net`, whose MACs are at most the target.

    Layers are compared by scores relative to their mean, and `multiple` channels are removed at a time, the least
    important first.  Batch-norm statistics are copied: recalibrate or fine-tune the result.  Raises UserError where the
    target is below what the smallest widths leave.
    """
    groups = channel_groups(net.spec)
    kept = _choose(net.spec, groups, channel_scores(net, pruning), pruning)
    widths = {group: len(channels) for group, channels in kept.items()}
    small = build_spec(_resize(net.spec, groups, widths))
    state = {}
    for key, value, axes in _parameters(net, groups):
        for axis, group in enumerate(axes[: value.ndim]):
            if group in kept:
                value = value.index_select(axis, kept[group].to(value.device))
        state[key] = value
    small.load_state_dict(state)
    return small.to(next(net.parameters()).device).train(net.training)


def macs(spec: NetSpec) -> int:
    """Multiply-accumulates of one image, convolutions and linear layers."""
    return int(layer_macs(spec_table(spec)).sum())


def channel_groups(spec: NetSpec) -> list[Groups]:
    """The groups of each unit; group 0 is the image, the last one the classes."""
    groups, stream, fresh = [], 0, count(1)
    for unit in spec.units:
        mid = next(fresh) if _has_inner(unit) else stream
        outer = stream if unit.shortcut or unit.kind in POOLS else next(fresh)
        groups.append(Groups(stream, mid, outer))
        stream = outer
    return groups


def channel_scores(net: StaticNet, pruning: Pruning) -> dict[int, NDArray[np.float64]]:
    """Importance of each channel of each group that may be pruned, (C,), relative to the group's mean."""
    groups = channel_groups(net.spec)
    fixed = {0, groups[-1].outer}
    allowed = {
        g.mid for g, unit in zip(groups, net.spec.units, strict=True) if unit.expand or unit.kind == "bottleneck"
    }
    if pruning.streams:
        allowed |= {group for g in groups for group in g} - fixed
    parts: dict[int, list[Tensor]] = {}
    for key, value, axes in _parameters(net, groups):
        for group, score in _scores(key, value, axes, pruning.criterion):
            if group in allowed:
                parts.setdefault(group, []).append(score / score.mean().clamp_min(1e-12))
    return {group: torch.stack(scores).mean(0).double().cpu().numpy() for group, scores in parts.items()}


def _scores(key: str, value: Tensor, axes: tuple[int, ...], criterion: str) -> Iterator[tuple[int, Tensor]]:
    """What one parameter says about the channels along each of its axes."""
    if criterion == "bn_scale":
        if key.endswith("bn.weight"):
            yield axes[0], value.abs()
    elif value.ndim > 1:
        for axis, group in enumerate(axes):
            yield group, value.transpose(0, axis).flatten(1).norm(p=int(criterion[1]), dim=1)


def _parameters(net: StaticNet, groups: list[Groups]) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
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


def _choose(
    spec: NetSpec, groups: list[Groups], scores: dict[int, NDArray[np.float64]], pruning: Pruning
) -> dict[int, Tensor]:
    """Channels of each group to keep, in their order."""
    order = {group: np.argsort(-score, kind="stable") for group, score in scores.items()}
    widths = {group: len(score) for group, score in scores.items()}
    target = pruning.macs_ratio * macs(spec)
    while macs(_resize(spec, groups, widths)) > target:
        smaller = {group: _step_down(width, pruning.multiple) for group, width in widths.items()}
        candidates = [group for group in widths if smaller[group]]
        if not candidates:
            least = macs(_resize(spec, groups, widths)) / macs(spec)
            raise UserError(
                f"macs_ratio {pruning.macs_ratio} cannot be met: widths of {pruning.multiple} leave {least:.3f} of the "
                "MACs; raise macs_ratio, lower multiple or set streams=true"
            )
        worst = min(candidates, key=lambda g: scores[g][order[g][smaller[g] : widths[g]]].mean())
        widths[worst] = smaller[worst]
    return {group: torch.from_numpy(np.sort(order[group][:width])) for group, width in widths.items()}


def _step_down(width: int, multiple: int) -> int:
    """The next smaller multiple, 0 where there is none."""
    return (width - 1) // multiple * multiple


def _resize(spec: NetSpec, groups: list[Groups], widths: dict[int, int]) -> NetSpec:
    """The same units with the groups' new widths."""

    def resized(unit: Unit, g: Groups) -> Unit:
        mid = widths.get(g.mid, unit.mid) if unit.mid else unit.mid
        return replace(unit, cin=widths.get(g.inner, unit.cin), mid=mid, cout=widths.get(g.outer, unit.cout))

    return replace(spec, units=tuple(resized(unit, g) for unit, g in zip(spec.units, groups, strict=True)))

"""Structured channel pruning of a StaticNet: a smaller one that computes what it does with channels silenced."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.compress.criteria import CRITERIA, Groups, Scores, channel_groups, channel_parameters, channel_scores
from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec
from ofa.table import layer_macs, spec_table


@dataclass(frozen=True, slots=True)
class Pruning:
    """How much to prune and what goes first.

    macs_ratio: MACs to keep, as a share of the network's (1 prunes nothing).  criterion: a channel's importance is the
    L1 or L2 norm of the weights that write and read it, its batch-norm scale, or its position (first: the last ones go,
    which suits channels that were sorted).  multiple: widths are cut to multiples of this, and none below it.
    streams: cut the residual streams too, not only the middles of the mbconv units.
    """

    macs_ratio: float = 0.7
    criterion: str = "l2"
    multiple: int = 8
    streams: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.macs_ratio <= 1:
            raise UserError(f"macs_ratio {self.macs_ratio} must be above 0 and at most 1; 0.7 keeps 70 % of the MACs")
        if self.criterion not in CRITERIA:
            raise UserError(f"criterion {self.criterion!r} is not known; choose from {', '.join(CRITERIA)}")
        if self.multiple < 1:
            raise UserError(f"multiple {self.multiple} must be at least 1; 8 suits most runtimes")


def prune(net: StaticNet, pruning: Pruning) -> StaticNet:
    """A new, smaller network with the most important channels of `net`, whose MACs are at most the target.

    Layers are compared by scores relative to their mean, and `multiple` channels are removed at a time, the least
    important first.  Batch-norm statistics are copied: recalibrate or fine-tune the result.  Raises UserError where the
    target is below what the smallest widths leave.
    """
    target = pruning.macs_ratio * macs(net.spec)
    scores = channel_scores(net, pruning.criterion, streams=pruning.streams)
    small, least = prune_to(net, scores, lambda spec: macs(spec) <= target, pruning.multiple)
    if small is None:
        raise UserError(
            f"macs_ratio {pruning.macs_ratio} cannot be met: widths of {pruning.multiple} leave "
            f"{macs(least) / macs(net.spec):.3f} of the MACs; raise macs_ratio (as compress.pruning.macs_ratio=0.9), "
            "lower multiple, or set streams=true"
        )
    return small


def prune_to(
    net: StaticNet, scores: Scores, fits: Callable[[NetSpec], bool], multiple: int
) -> tuple[StaticNet | None, NetSpec]:
    """The widest network that fits, of those left as `multiple` channels at a time go, the least important first.

    fits: of a spec; what is narrower than one that fits must fit too.  Returns: that network (None: none fits) and the
    narrowest spec of all.
    """
    groups = channel_groups(net.spec)
    order = {group: np.argsort(-score, kind="stable") for group, score in scores.items()}
    path = list(_narrowings(scores, order, multiple))
    specs = [_resize(net.spec, groups, widths) for widths in path]
    first = bisect_left(specs, True, key=fits)
    if first == len(specs):
        return None, specs[-1]
    kept = {group: torch.from_numpy(np.sort(order[group][:width])) for group, width in path[first].items()}
    return select(net, kept), specs[-1]


def sort_channels(net: StaticNet, scores: Scores) -> StaticNet:
    """The same function with the channels of each group in order of importance, the most important first."""
    return select(net, {group: torch.from_numpy(np.argsort(-score, kind="stable")) for group, score in scores.items()})


def select(net: StaticNet, kept: dict[int, Tensor]) -> StaticNet:
    """A new network with the channels `kept` of each group, in that order."""
    groups = channel_groups(net.spec)
    small = build_spec(_resize(net.spec, groups, {group: len(channels) for group, channels in kept.items()}))
    state = {}
    for key, value, axes in channel_parameters(net, groups):
        for axis, group in enumerate(axes[: value.ndim]):
            if group in kept:
                value = value.index_select(axis, kept[group].to(value.device))
        state[key] = value
    small.load_state_dict(state)
    return small.to(next(net.parameters()).device).train(net.training)


def macs(spec: NetSpec) -> int:
    """Multiply-accumulates of one image, convolutions and linear layers."""
    return int(layer_macs(spec_table(spec)).sum())


def _narrowings(scores: Scores, order: Mapping[int, NDArray[np.int64]], multiple: int) -> Iterator[dict[int, int]]:
    """The widths of all groups, from all channels to the fewest, `multiple` fewer of one group at a time."""
    widths = {group: len(score) for group, score in scores.items()}
    yield dict(widths)
    while True:
        smaller = {group: _step_down(width, multiple) for group, width in widths.items()}
        candidates = [group for group in widths if smaller[group]]
        if not candidates:
            return
        worst = min(candidates, key=lambda g: scores[g][order[g][smaller[g] : widths[g]]].mean())
        widths[worst] = smaller[worst]
        yield dict(widths)


def _step_down(width: int, multiple: int) -> int:
    """The next smaller multiple, 0 where there is none."""
    return (width - 1) // multiple * multiple


def _resize(spec: NetSpec, groups: list[Groups], widths: dict[int, int]) -> NetSpec:
    """The same units with the groups' new widths."""

    def resized(unit: Unit, g: Groups) -> Unit:
        mid = widths.get(g.mid, unit.mid) if unit.mid else unit.mid
        return replace(unit, cin=widths.get(g.inner, unit.cin), mid=mid, cout=widths.get(g.outer, unit.cout))

    return replace(spec, units=tuple(resized(unit, g) for unit, g in zip(spec.units, groups, strict=True)))

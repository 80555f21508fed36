"""Outputs of a supernet's subnets, for losses beyond logits while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ofa.blocks import BLOCKS
from ofa.distill.taps import Outputs, Tap
from ofa.drop import Drop
from ofa.space import Arch
from ofa.spec import Unit
from ofa.supernet import Supernet
from ofa.units import arch_units


def observe(supernet: Supernet, x: Tensor, arch: Arch, drop: Drop | None = None) -> Outputs:
    """Logits, the maps at the ends of the stages and the classifier's input of one architecture; x: (N, C, H, W).

    Every architecture of a resolution has maps of the same sizes; channels differ where the width is elastic.
    drop: what this pass leaves out.
    """
    names = stage_units(arch_units(supernet.space, arch))
    with Tap(supernet, names, embedding=True, forward=lambda images: supernet(images, arch, drop)) as tap:
        return tap(x)


def stage_units(units: Sequence[Unit | None]) -> list[str]:
    """Names of the units (None: not there) after which maps get smaller, and of the last one with a map."""
    active = [(f"units.{i}", unit) for i, unit in enumerate(units) if unit is not None]
    blocks = [(name, unit) for name, unit in active if unit.kind in BLOCKS and unit.bn]  # not the convs after the pool
    followers = [unit.stride for _, unit in blocks[1:]] + [2]
    return [name for (name, _), stride in zip(blocks, followers, strict=True) if stride > 1]


def widened(student: Outputs, teacher: Outputs) -> Outputs:
    """A subnet's outputs with maps `fitted` to the channels of its teacher, the largest net, without a regressor.

    Both share their weights, so that its channels are the teacher's first ones; those that it lacks are taken from the
    teacher and cost nothing.
    """
    pairs = zip(student.maps, teacher.maps, strict=True)
    return student._replace(fitted=tuple(torch.cat([own, other[:, own.shape[1] :]], 1) for own, other in pairs))

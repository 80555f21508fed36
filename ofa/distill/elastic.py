"""Outputs of a supernet's subnets, for losses beyond logits while it trains."""

from __future__ import annotations

from torch import Tensor

from ofa.blocks import BLOCKS
from ofa.distill.taps import Outputs, Tap
from ofa.space import Arch, Space
from ofa.supernet import Supernet
from ofa.units import arch_units


def observe(supernet: Supernet, x: Tensor, arch: Arch) -> Outputs:
    """Logits, the maps at the ends of the stages and the classifier's input of one architecture; x: (N, C, H, W).

    Every architecture of a resolution has maps of the same sizes; channels differ where the width is elastic.
    """
    names = subnet_ends(supernet.space, arch)
    with Tap(supernet, names, embedding=True, forward=lambda images: supernet(images, arch)) as tap:
        return tap(x)


def subnet_ends(space: Space, arch: Arch) -> list[str]:
    """Names of the supernet's units after which an architecture's map gets smaller, and of the last one with a map."""
    active = [(f"units.{i}", unit) for i, unit in enumerate(arch_units(space, arch)) if unit is not None]
    blocks = [(name, unit) for name, unit in active if unit.kind in BLOCKS and unit.bn]  # not the convs after the pool
    followers = [unit.stride for _, unit in blocks[1:]] + [2]
    return [name for (name, _), stride in zip(blocks, followers, strict=True) if stride > 1]

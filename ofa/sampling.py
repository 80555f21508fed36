"""Which architectures a training step takes.  N architectures, G genes, B blocks.  Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.schedule import Phase
from ofa.space import Arch, Genes, Space
from ofa.table import layer_macs, layer_table

Score = Callable[[Genes], NDArray[Any]]  # of genes of the whole space, (N, G) to (N,), more is better
POOL = 20  # drawn nets among which those of like MACs are found, for each candidate


def draw(
    phase: Phase, space: Space, rng: np.random.Generator, *, resolution: int, score: Score | None = None
) -> list[Arch]:
    """Architectures of one step, all at one resolution; a sandwich starts with its largest and smallest.

    `space` is the phase's own.  score: ranks candidates where the phase prefers some.  A net drawn twice is trained
    once.
    """
    parts = [space.largest()] if phase.rule in ("largest", "sandwich") else []
    parts += [space.smallest()] if phase.rule == "sandwich" else []
    if isinstance(phase.arch, Arch):
        parts = [space.encode([phase.arch])]
    elif phase.rule != "largest":
        parts += [_random(phase, space, rng, score, resolution) for _ in range(phase.random_nets)]
    archs = space.decode(np.concatenate(parts)) if parts else []
    return list(dict.fromkeys(replace(arch, resolution=resolution) for arch in archs))


def _random(phase: Phase, space: Space, rng: np.random.Generator, score: Score | None, resolution: int) -> Genes:
    """One net, (1, G): any, or the one that the phase prefers among candidates at this resolution."""
    if phase.prefer == "none" or score is None:
        return couple(space, space.sample(1, rng), phase.couple)
    pool = couple(space, space.sample(POOL * phase.candidates, rng), phase.couple)
    pool[:, space.columns("resolution")] = space.resolution.index(resolution)
    genes = alike(space, pool, phase.candidates)
    scores = score(genes)
    best = int(np.argmax(scores) if phase.prefer == "best" else np.argmin(scores))
    return genes[best : best + 1]


def alike(space: Space, pool: Genes, n: int) -> Genes:
    """The `n` nets of a pool (N, G) whose MACs are nearest to those of its first, itself among them: (n, G).

    As the pool is drawn uniformly, the first one's MACs follow the distribution of MACs in the space, and the rest are
    draws on condition of these: the two steps of AttentiveNAS (Wang et al. 2021, sec. 4), without a table of them.
    """
    macs = layer_macs(layer_table(space, pool)).sum(axis=1)
    return pool[np.argsort(np.abs(macs - macs[0]), kind="stable")[:n]]


def couple(space: Space, genes: Genes, dimensions: Sequence[str]) -> Genes:
    """The nets with the choices of some dimensions set by the depth of their stage: (N, G).

    The smallest depth has the smallest choice, the largest the largest, in proportion between them: with depths 2, 3, 4
    and expand ratios 3, 4, 6 the pairs of CompOFA (Sahni et al. 2021, sec. 3.1).  Stages that do not choose their depth
    stay as they are.
    """
    coupled = genes.copy()
    stages = [int(gene.name.split(".")[1]) for gene in space.genes[space.columns("depth")]]
    for dimension in dimensions:
        own = space.columns(dimension)
        for column in range(own.start, own.stop):
            stage = int(space.genes[column].name.split(".")[1])
            if stage in stages:
                depth = space.columns("depth").start + stages.index(stage)
                most, last = max(1, space.counts[depth] - 1), space.counts[column] - 1
                coupled[:, column] = np.rint(genes[:, depth] * last / most)
    return space.canonical(coupled)

"""Random networks, mutation and crossover of whole populations: over a million networks a second.  N networks, G genes.

Chances are drawn as 16-bit integers, four to a random word: their error is below 1/131,072.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import OF_BLOCKS, Genes, Space

WORD = 1 << 16


def words(rng: np.random.Generator, *shape: int) -> NDArray[np.uint16]:
    """Uniform 16-bit integers; four times as fast as `rng.integers`, which draws them one by one."""
    return rng.bit_generator.random_raw(-(-prod(shape) // 4)).view(np.uint16)[: prod(shape)].reshape(shape)


def below(rng: np.random.Generator, bound: int | NDArray[np.int64], *shape: int) -> NDArray[np.int64]:
    """Integers from 0 to `bound` - 1, one bound for all or one for each of the last dimension."""
    return (words(rng, *shape) * np.asarray(bound, dtype=np.uint32) >> 16).astype(np.int64)


def draw(space: Space, n: int, rng: np.random.Generator) -> Genes:
    """n random networks, every gene uniform: canonical genes (n, G)."""
    return space.canonical(draw_all(space, n, rng))


def draw_all(space: Space, n: int, rng: np.random.Generator) -> Genes:
    """The same with genes for skipped blocks too: (n, G), not canonical."""
    return (words(rng, n, len(space.counts)) * space.counts.astype(np.uint32) >> 16).astype(np.int8)


def mutate(space: Space, genes: Genes, chance: float | NDArray[np.float64], rng: np.random.Generator) -> Genes:
    """Change each gene to another of its choices with a chance, one for all or (G,): genes (N, G), not canonical."""
    hit = np.flatnonzero(words(rng, *genes.shape) < np.rint(np.multiply(chance, WORD)).astype(np.uint32))
    return _changed(space, genes, hit, rng)


def redraw(space: Space, genes: Genes, chance: float, rng: np.random.Generator, places: NDArray[np.int64]) -> Genes:
    """Draw each place anew with a chance, all its genes together: genes (N, G), not canonical; see `places_of`."""
    hit = (words(rng, len(genes), int(places.max()) + 1) < round(chance * WORD)).take(places, axis=1)
    return np.where(hit, draw_all(space, len(genes), rng), genes)


def places_of(space: Space) -> NDArray[np.int64]:
    """The place of each gene, (G,): genes of one block share a place, every other gene has its own."""
    names = (gene.name.partition(".") for gene in space.genes)
    owners = [place if dimension in OF_BLOCKS else dimension + place for dimension, _, place in names]
    return np.unique(owners, return_inverse=True)[1]


def mutate_one(space: Space, genes: Genes, rng: np.random.Generator) -> Genes:
    """Change one gene of each network, among those that matter and have a choice: (N, G), not canonical."""
    score = rng.random(genes.shape) + (space.active(genes) & (space.counts > 1))
    hit = np.arange(len(genes)) * genes.shape[1] + score.argmax(axis=1)
    return _changed(space, genes, hit, rng)


def cross(mothers: Genes, fathers: Genes, rng: np.random.Generator) -> Genes:
    """Children that have each gene from either parent with equal chance: (N, G), not canonical."""
    n, g = mothers.shape
    bits = words(rng, n, -(-g // 16)).view(np.uint8)
    return np.where(np.unpackbits(bits, axis=1, count=g).view(bool), fathers, mothers)


def check_chances(**chances: float | None) -> None:
    """Raise UserError where a chance is not between 0 and 1; None is left to the agent."""
    for name, chance in chances.items():
        if not 0 <= (chance or 0) <= 1:
            raise UserError(f"{name} {chance} is a chance; it must be between 0 and 1")


def _changed(space: Space, genes: Genes, hit: NDArray[np.int64], rng: np.random.Generator) -> Genes:
    """The genes at flat positions `hit` moved on by 1 to all but one of their choices, round the end."""
    counts = space.counts[hit % genes.shape[1]]
    changed = np.array(genes, dtype=np.int8, order="C")
    flat = changed.reshape(-1)
    step = 1 + (rng.random(len(hit)) * (counts - 1)).astype(np.int64)
    flat[hit] = np.where(counts > 1, (flat[hit] + step) % counts, flat[hit])
    return changed

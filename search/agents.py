"""What a search agent does, and the simplest one.  N networks, G genes, M objectives.

An agent proposes networks (`ask`) and learns what they cost (`tell`).  Its proposals depend on its settings and on what
it was told alone: a fresh agent that is told the same again proposes the same again, which is how a search resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ofa.space import Genes, Space
from search.variation import draw

TRIES = 4  # times that networks are drawn again while too few of them are new
LEAST = 20  # networks drawn at a time, even where fewer are wanted
ENUMERATED = 20_000  # combinations of genes up to which a space is small enough to go through


class Agent(Protocol):
    """A search strategy; `repr` shows its settings."""

    space: Space
    seed: int
    n_objectives: int

    def ask(self, n: int) -> Genes:
        """Propose n networks: canonical genes (n, G), new ones as long as new ones are found."""

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Learn costs (N, M), lower is better, and violations (N,), 0 where every limit is met.

        The genes may also be networks that this agent did not propose, such as those measured before.
        """


def keys(genes: Genes) -> list[bytes]:
    """A hashable key for each network, equal where the genes are."""
    genes = np.ascontiguousarray(genes, dtype=np.int8)
    return genes.view(f"V{genes.shape[1]}").ravel().tolist()


@lru_cache(maxsize=8)
def every(space: Space) -> Genes | None:
    """Every network of a small space, canonical genes (N, G) in ascending order; None for a large one."""
    if np.prod(space.counts.astype(float)) > ENUMERATED:
        return None
    found = np.unique(space.canonical(np.array(list(product(*map(range, space.counts))), dtype=np.int8)), axis=0)
    found.flags.writeable = False
    return found


def random_proposals(space: Space, rng: np.random.Generator) -> list[Callable[[int], Genes]]:
    """Proposals of n uniformly drawn networks; the last, of a small space, of all."""

    def drawn(n: int) -> Genes:
        return draw(space, n, rng)

    def left(n: int) -> Genes:
        found = every(space)
        return drawn(n) if found is None else found

    return [*[drawn] * TRIES, left]


class Fresh:
    """Remembers the networks handed out, so that none is handed out twice while others are left."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._seen: set[bytes] = set()

    def add(self, genes: Genes) -> None:
        """Count `genes` as handed out."""
        self._seen.update(keys(genes))

    def take(self, n: int, proposals: Iterable[Callable[[int], Genes]]) -> Genes:
        """The first n new networks that the proposals yield, called one after another; padded with known ones."""
        taken = [np.empty((0, len(self._space.genes)), dtype=np.int8)]
        candidates, missing = taken[0], n
        for propose in proposals:
            candidates = propose(max(n if missing == n else min(n, 2 * missing), LEAST))
            new = self._first_new(candidates, missing)
            taken.append(candidates[new])
            missing -= len(new)
            if missing == 0 or len(self._seen) >= self._space.size:
                break
        return np.concatenate([*taken, candidates[:missing]])

    def _first_new(self, candidates: Genes, n: int) -> list[int]:
        new: list[int] = []
        for i, key in enumerate(keys(candidates)):
            if len(new) == n:
                break
            if key not in self._seen:
                self._seen.add(key)
                new.append(i)
        return new


class Ancestry:
    """Remembers the genes of skipped blocks, which canonical genes have lost.

    A block that comes back in a child has the genes that its ancestors were selected with instead of the first
    choices; on a space of elastic depth evolution ends with better networks for it.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._full: dict[bytes, bytes] = {}

    def express(self, full: Genes) -> Genes:
        """Canonical genes (N, G) of genes for all blocks, which are remembered."""
        genes = self._space.canonical(full)
        self._full |= zip(keys(genes), keys(full), strict=True)
        return genes

    def recall(self, genes: Genes) -> Genes:
        """The genes for all blocks (N, G) that were expressed as these; networks never seen stay as they are."""
        keyed = keys(genes)
        full = b"".join(map(self._full.get, keyed, keyed))
        return np.frombuffer(full, dtype=np.int8).reshape(genes.shape)


@dataclass(eq=False)
class RandomSearch:
    """Networks drawn uniformly gene by gene, none twice: the baseline that every other agent must beat."""

    space: Space = field(repr=False)
    _: KW_ONLY
    seed: int = 0
    n_objectives: int = 1

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._fresh = Fresh(self.space)

    def ask(self, n: int) -> Genes:
        """Draw n networks."""
        return self._fresh.take(n, random_proposals(self.space, self._rng))

    def tell(self, genes: Genes, cost: NDArray[np.float64], violation: NDArray[np.float64]) -> None:
        """Learn nothing but what has been seen."""
        self._fresh.add(genes)

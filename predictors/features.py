"""What the learned predictors see of an architecture.  N architectures, F features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.space import DIMENSIONS, Genes, Space
from predictors.costs import Macs, Params

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Group:
    """Features that belong together: a name and their columns."""

    name: str
    columns: slice


class Features:
    """One-hot genes with skipped blocks masked, log MACs, log parameters, sums of kernel, expand and depth per stage.

    Masking and the sums tell the model that a skipped block does nothing; they are worth more than the choice of model.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._macs, self._params = Macs(space), Params(space)
        self.groups = self._groups()

    def __call__(self, genes: Genes) -> Float:
        """Genes (N, G) to features (N, F), grouped as in `groups`."""
        onehot = self.space.onehot(genes).astype(np.float64)
        counts = np.log(np.stack([self._macs(genes), self._params(genes)], axis=1))
        return np.concatenate([onehot, counts, *self._sums(genes)], axis=1)

    def _sums(self, genes: Genes) -> list[Float]:
        used, stage = self.space.used(genes), np.eye(len(self.space.stages))[self.space.blocks[:, 0]]
        sums = [np.where(used, self.space.block_values(genes, name), 0) @ stage for name in ("kernel", "expand")]
        return [*sums, self.space.depths(genes).astype(np.float64)]

    def _groups(self) -> tuple[Group, ...]:
        stages = len(self.space.stages)
        sizes = {name: int(self.space.counts[self.space.columns(name)].sum()) for name in DIMENSIONS}
        sizes |= {"log MACs": 1, "log params": 1, "kernel sums": stages, "expand sums": stages, "depths": stages}
        ends = np.cumsum([0, *sizes.values()])
        return tuple(Group(name, slice(int(a), int(b))) for name, a, b in zip(sizes, ends, ends[1:], strict=False))

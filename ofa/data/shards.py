"""Parquet read by row group, for data larger than memory and disk cache: few groups are held at a time.  N images.

An epoch visits the groups in random order and shuffles the images of `buffer` neighbours among one another, so that
each group is read once by each process that decodes.  Images that lie sorted by class need a buffer of many groups.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The row group of each image (N,), and how many groups are shuffled together."""

    groups: NDArray[np.int64]
    buffer: int

    def gather(self, order: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Images in random order, sorted into windows of `buffer` groups, which are taken in random order."""
        place = rng.permutation(self.groups.max() + 1)[self.groups[order]] // self.buffer
        return order[np.argsort(place, kind="stable")]


class GroupColumn:
    """The encoded images of Parquet files, of which the `buffer` row groups used last are in memory."""

    def __init__(self, files: Sequence[Path], name: str, buffer: int) -> None:
        self.files, self.name, self.buffer = tuple(files), name, buffer
        self.about = [pq.read_metadata(file) for file in files]
        rows = [[each.row_group(i).num_rows for i in range(each.num_row_groups)] for each in self.about]
        self.starts = np.cumsum([0, *(sum(part) for part in rows)])
        self.group_starts = np.cumsum([0, *(count for part in rows for count in part)])
        self.places = [(file, i) for file, part in enumerate(rows) for i in range(len(part))]
        self.held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __reduce__(self) -> tuple[type[GroupColumn], tuple[Sequence[Path], str, int]]:
        return GroupColumn, (self.files, self.name, self.buffer)

    def groups(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the row group that holds each row: (N,)."""
        return np.searchsorted(self.group_starts, rows, side="right") - 1

    def read(self, row: int) -> bytes | None:
        """The image of a row, encoded."""
        group = int(np.searchsorted(self.group_starts, row, side="right")) - 1
        if group not in self.held:
            while len(self.held) >= self.buffer:
                self.held.popitem(last=False)
            self.held[group] = self._load(*self.places[group])
        self.held.move_to_end(group)
        return self.held[group][row - int(self.group_starts[group])].as_py()

    def _load(self, file: int, group: int) -> pa.ChunkedArray:
        """Opened anew: a process that was forked must not share the place in an open file."""
        parquet = pq.ParquetFile(self.files[file], metadata=self.about[file])
        column = parquet.read_row_group(group, columns=[self.name], use_threads=False)[self.name]
        return pc.struct_field(column, "bytes")

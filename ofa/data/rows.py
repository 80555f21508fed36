"""Images in Parquet files, in the Hugging Face schema: a column {bytes, path} and an integer label.  N rows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ofa.data.shards import GroupColumn, Windows
from ofa.errors import UserError
from ofa.files import cache_folder


class Column:
    """The encoded images of Parquet files, read when first asked for.

    mapped: keep them in a memory-mapped Arrow file under ~/.cache/ofa-nas, as Parquet has no random access, instead of
    in memory.
    """

    def __init__(self, files: Sequence[Path], name: str, mapped: bool) -> None:
        self.files, self.name, self.mapped = tuple(files), name, mapped
        self.starts = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in files)])

    def __reduce__(self) -> tuple[type[Column], tuple[Sequence[Path], str, bool]]:
        return Column, (self.files, self.name, self.mapped)

    @cached_property
    def images(self) -> pa.ChunkedArray:
        """The encoded images: (N,)."""
        if self.mapped:
            return pa.ipc.open_file(pa.memory_map(str(self._unpacked()))).read_all()["bytes"]
        return pc.struct_field(pq.read_table(list(self.files), columns=[self.name])[self.name], "bytes")

    def read(self, row: int) -> bytes | None:
        """The image of a row, encoded."""
        return self.images[row].as_py()

    def _unpacked(self) -> Path:
        """The Arrow file of these images, written when there is none."""
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        cache = cache_folder()
        path = cache / f"{hashlib.sha256(repr((states, self.name)).encode()).hexdigest()[:16]}.arrow"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                self._unpack(Path(folder) / "images.arrow").replace(path)
        return path

    def _unpack(self, path: Path) -> Path:
        schema = pa.schema({"bytes": pa.binary()})
        with pa.ipc.new_file(path, schema) as writer:
            for file in self.files:
                for batch in pq.ParquetFile(file).iter_batches(1024, columns=[self.name]):
                    images = pc.struct_field(batch.column(0), "bytes")
                    writer.write_batch(pa.record_batch([images], schema))
        return path


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows (N,) of an image column: a `Source`."""

    column: Column | GroupColumn
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: NDArray[np.int64]) -> Rows:
        return Rows(self.column, self.index[index])

    def read(self, i: int) -> bytes:
        """Image `i`, encoded."""
        image = self.column.read(int(self.index[i]))
        if image is None:
            raise UserError(f"{self.name(i)} has no bytes; mend or remove it")
        return image

    @property
    def windows(self) -> Windows | None:
        """Which images are read together, where that matters."""
        column = self.column
        return Windows(column.groups(self.index), column.buffer) if isinstance(column, GroupColumn) else None

    def name(self, i: int) -> str:
        """File and row of image `i`."""
        row = self.index[i]
        file = int(np.searchsorted(self.column.starts, row, side="right")) - 1
        return f"{self.column.files[file]} row {row - self.column.starts[file]}"


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One split: its images, its labels (N,) as they are written, and the class names where the files have them."""

    images: Rows
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None


def read_table(
    files: Sequence[Path], image: str | None, label: str, memory_limit: float, *, buffer: int | None = None
) -> Table:
    """Labels, and images to be read later; raises UserError where a file or a column is not as it should be.

    buffer: row groups held in memory; None: all images, or, above `memory_limit` bytes, an unpacked copy on disk.
    """
    schema = _schema(files)
    image = image or next((name for name in ("img", "image") if name in schema.names), "image")
    for name in (image, label):
        if name not in schema.names:
            raise UserError(f"{files[0]} has no column {name!r} but {schema.names}; set data.image and data.label")
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or "bytes" not in [field.name for field in kind]:
        raise UserError(f"{files[0]}: column {image!r} must be {{bytes, path}}, not {kind}; write it with `datasets`")
    labels = pq.read_table(list(files), columns=[label])[label]
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{files[0]}: column {label!r} must be integers, none missing, not {labels.type}")
    large = sum(file.stat().st_size for file in files) > memory_limit
    column = GroupColumn(files, image, buffer) if large and buffer else Column(files, image, mapped=large)
    return Table(Rows(column, np.arange(len(labels))), labels.to_numpy().astype(np.int64), _class_names(schema, label))


def _schema(files: Sequence[Path]) -> pa.Schema:
    schemas = []
    for file in files:
        try:
            schemas.append(pq.read_schema(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} is not a Parquet file ({error}); download it again") from None
        if not schemas[-1].equals(schemas[0]):
            raise UserError(f"{file} has other columns than {files[0]}; keep files of one data set in the folder")
    return schemas[0]


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """What Hugging Face's entry in the schema calls the classes, where there is one."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for key in ("info", "features", label, "names"):
            found = found.get(key) or {}
    except (ValueError, AttributeError):  # no JSON, or of another form
        return None
    return tuple(map(str, found)) or None

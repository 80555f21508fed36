"""Tables of measured networks: columns of their settings, and one for each measured value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ofa.errors import UserError
from ofa.settings import arch_of
from ofa.space import Genes, Space

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "resolution": ("r", "image_size"),
    "width": ("w", "wid"),
    "depth": ("d",),
    "kernel": ("ks",),
    "expand": ("e",),
    "op": ("arch", "op"),
}  # by the dimension that they are of


def read_table(path: str | Path, space: Space, column: str) -> tuple[Genes, NDArray[np.float64]]:
    """Genes (N, G) and one column (N,) of a table, N >= 1; rows without a value are left out.

    A table has the settings that the space chooses, as `ofa.settings.arch_of` reads them: r: resolution in pixels; d:
    depth of each stage; ks, e: kernel and expand ratio of each block, as "3-5-7" or "[3, 5, 7]"; w: position of each
    width multiplier, or these, with a point; arch: a digit for the operation of each block.
    Raises UserError for an absent file or column, for a value that is no finite number and for an architecture that is
    not of the space; rows are counted from 1, behind the names.
    """
    frame = read_frame(path)
    found = {dimension: next((c for c in COLUMNS[dimension] if c in frame), None) for dimension in COLUMNS}
    lacking = [COLUMNS[dimension][0] for dimension in _needed(space) if not found[dimension]]
    lacking += [column] * (column not in frame)
    if lacking:
        raise UserError(f"{path} lacks the column {lacking[0]}; it has {', '.join(map(str, frame.columns))}")
    rows = np.flatnonzero(frame[column].notna()).tolist()
    if not len(rows):
        raise UserError(f"{path} has no value in the column {column}; give one for each network that was measured")
    names = [name for dimension, name in found.items() if name and dimension in (*_needed(space), "resolution")]
    values, settings, genes = [], [], []
    entries = frame[[column, *names]].iloc[rows].fillna("").itertuples(index=False, name=None)
    for row, (value, *texts) in zip(rows, entries, strict=True):
        with _named(path, row):
            values.append(_finite(column, value))
            pairs = zip(names, texts, strict=True)
            settings.append({("op" if name == "arch" else name): _numbers(name, text, space) for name, text in pairs})
    short = _all_short(settings)
    multiplied = any(value % 1 for setting in settings for name in COLUMNS["width"] for value in setting.get(name, []))
    for row, setting in zip(rows, settings, strict=True):
        if multiplied:  # then 1 is no position either
            setting = {name: list(map(float, v)) if name in COLUMNS["width"] else v for name, v in setting.items()}
        with _named(path, row):
            genes.append(space.encode([arch_of(space, setting, short=short)]))
    return np.concatenate(genes), np.array(values)


@contextmanager
def _named(path: str | Path, row: int) -> Iterator[None]:
    """Say in which row of a table a mistake is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, row {row + 1}: {error}") from None


def _all_short(settings: list[dict[str, list[Any]]]) -> bool | None:
    """Whether lists that lack one block do so in every row, as active blocks alone would not; None for one row."""
    lengths = {len(setting[name]) for setting in settings for name in ("ks", "e") if len(setting.get(name, [])) > 1}
    return True if len(lengths) == 1 and len(settings) > 1 else None


def resolutions(frame: pd.DataFrame) -> list[int]:
    """Image sides that occur in a table of `read_frame`, ascending; none where it has no column of them."""
    names = [name for name in COLUMNS["resolution"] if name in frame]
    return sorted({int(_numbers(name, side)[0]) for name in names[:1] for side in frame[name].dropna()})


def read_frame(path: str | Path) -> pd.DataFrame:
    """All columns of a CSV file, settings as text; raises UserError for an absent file and for one that is no CSV file.

    Commas, semicolons (numbers may then have a decimal comma) or tabs stand between the columns.
    """
    import pandas as pd

    every = [name for names in COLUMNS.values() for name in names]
    try:
        with open(path, encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
        decimal = "," if separator == ";" else "."
        kinds = dict.fromkeys(every, str)
        return pd.read_csv(path, sep=separator, decimal=decimal, skipinitialspace=True, dtype=kinds)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a CSV file of measured networks") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a CSV file ({str(error).strip()})") from None


def numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Values as float64; raises UserError for what is no number."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must hold one number for each network ({error})") from None


def distinct(genes: Genes, values: NDArray[np.float64]) -> tuple[Genes, NDArray[np.float64]]:
    """Each network of canonical genes (N, G) once, with the mean of its values (N,), in the order of first sight.

    A network on both sides of a fold would let a fit look better than it is.  Raises UserError for other lengths.
    """
    if values.shape != (len(genes),):
        raise UserError(f"each of {len(genes)} networks needs one value, not an array of {values.shape}")
    _, first, which = np.unique(genes, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(genes):
        return genes, values
    order = np.argsort(first)
    return genes[first[order]], (np.bincount(which, values) / np.bincount(which))[order]


def _needed(space: Space) -> list[str]:
    """Dimensions that a space chooses."""
    free = {"resolution": len(space.resolution) > 1, "width": len(space.width) > 1}
    return [name for name in COLUMNS if free.get(name, space.columns(name).stop > space.columns(name).start)]


def _finite(column: str, value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{column} {value!r} is no finite number; leave the entry empty where nothing was measured")
    return number


def _numbers(name: str, text: str, space: Space | None = None) -> list[Any]:
    """Numbers of an entry; floats are those with a point.  Of operations a digit each; a leading 0 may be lost."""
    digits = text.strip("'\" ").removesuffix(".0")  # as spreadsheets write texts and whole numbers
    if name in COLUMNS["op"] and digits.isdecimal():
        blocks = space.columns("op") if space else slice(0, 0)
        return [int(digit) for digit in (digits if digits[0] == "0" else digits.zfill(blocks.stop - blocks.start))]
    try:
        parts = re.split(r"[\s,;|/_-]+", text.strip("[](){}'\" ,"))
        return [float(part) if "." in part else int(part) for part in (part.strip("'\"") for part in parts)]
    except ValueError:
        raise UserError(f"{name} {text!r} is no number, nor several as 3-5-7 or [3, 5, 7]") from None

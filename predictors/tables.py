"""Tables of measured networks: columns of their settings, and one for each measured value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.settings import arch_of
from ofa.space import Genes, Space

COLUMNS = {
    "resolution": ("r", "image_size"),
    "width": ("w", "wid"),
    "depth": ("d",),
    "kernel": ("ks",),
    "expand": ("e",),
    "op": ("arch", "op"),
}  # by the dimension that they are of


def read_table(path: str | Path, space: Space, column: str) -> tuple[Genes, NDArray[np.float64]]:
    """Genes (N, G) and one column (N,) of a table; rows without a value are left out.

    A table has the settings that the space chooses, as `ofa.settings.arch_of` reads them: r: resolution in pixels; d:
    depth of each stage; ks, e: kernel and expand ratio of each block, as "3-5-7" or "[3, 5, 7]"; w: position of each
    width multiplier, or these, with a point; arch: a digit for the operation of each block.
    Raises UserError for an absent file or column and for an architecture that is not of the space.
    """
    import pandas as pd

    every = [name for names in COLUMNS.values() for name in names]
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(every, str))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a CSV file of measured networks") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file ({str(error).strip()})") from None
    found = {dimension: next((c for c in COLUMNS[dimension] if c in frame), None) for dimension in COLUMNS}
    lacking = [COLUMNS[dimension][0] for dimension in _needed(space) if not found[dimension]]
    lacking += [column] * (column not in frame)
    if lacking:
        raise UserError(f"{path} lacks the column {lacking[0]}; it has {', '.join(map(str, frame.columns))}")
    frame = frame[frame[column].notna()]
    names = [name for dimension, name in found.items() if name and dimension in (*_needed(space), "resolution")]
    try:
        values = frame[column].to_numpy(dtype=np.float64)
        settings = [
            {("op" if name == "arch" else name): _numbers(name, text) for name, text in zip(names, row, strict=True)}
            for row in frame[names].fillna("").to_numpy()
        ]
    except ValueError as error:
        raise UserError(f"{path} has an entry that is no number: {error}") from None
    return space.encode([arch_of(space, setting) for setting in settings]), values


def distinct(genes: Genes, values: NDArray[np.float64]) -> tuple[Genes, NDArray[np.float64]]:
    """Each network of canonical genes (N, G) once, with the mean of its values (N,), in the order of first sight.

    A network on both sides of a fold would let a fit look better than it is.
    """
    _, first, which = np.unique(genes, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(genes):
        return genes, values
    order = np.argsort(first)
    return genes[first[order]], (np.bincount(which, values) / np.bincount(which))[order]


def _needed(space: Space) -> list[str]:
    """Dimensions that a space chooses."""
    free = {"resolution": len(space.resolution) > 1, "width": len(space.width) > 1}
    return [name for name in COLUMNS if free.get(name, space.columns(name).stop > space.columns(name).start)]


def _numbers(name: str, text: str) -> list[Any]:
    """Numbers of an entry; floats are those with a point."""
    if name == "arch" and text.isdecimal():
        return [int(digit) for digit in text]
    parts = re.split(r"[-,]\s*", text.strip("[]() "))
    return [float(part) if "." in part else int(part) for part in parts]

"""Tables of measured networks: the columns r, d, ks, e and one for each measured value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Arch, Genes, Space

ARCH = ("r", "d", "ks", "e")


def read_table(path: str | Path, space: Space, column: str) -> tuple[Genes, NDArray[np.float64]]:
    """Genes (N, G) and one column (N,) of a table; rows without a value are left out.

    r: resolution in pixels; d: depth of each stage; ks, e: kernel and expand ratio of each block, as "3-5-7".
    Raises UserError for an absent file or column and for an architecture that is not of the space.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a CSV file with the columns {', '.join(ARCH)}") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file ({str(error).strip()})") from None
    if lacking := [name for name in (*ARCH, column) if name not in frame]:
        raise UserError(f"{path} lacks the column {lacking[0]}; it has {', '.join(map(str, frame.columns))}")
    frame = frame[frame[column].notna()]
    try:
        values = frame[column].to_numpy(dtype=np.float64)
        lists = [[tuple(map(int, str(row).split("-"))) for row in frame[name]] for name in ARCH[1:]]
    except ValueError as error:
        raise UserError(f"{path} has an entry that is no number: {error}") from None
    archs = [Arch(int(r), *rest) for r, *rest in zip(frame.r, *lists, strict=True)]
    return space.encode(archs), values

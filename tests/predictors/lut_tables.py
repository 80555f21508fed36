"""Look-up tables of made-up times in once-for-all's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from ofa.space import Space
from ofa.table import layer_table
from predictors.lookup import forms
from predictors.lut import network_keys


def write_tables(folder: Path, space: Space, *, proxyless: bool = False) -> Path:
    """Tables of 1 ms a key for every block of a space, in `folder`, which is returned."""
    table = layer_table(space, forms(space))
    for resolution in space.resolution:
        rows = np.flatnonzero(table.size_in[:, 0] == resolution)
        keys = {key for row in rows for _, key in network_keys(table, int(row), proxyless=proxyless)}
        content = {key: {"count": 1, "mean": 1.0, "std": 0.0} for key in sorted(keys)}
        (folder / f"{resolution}_lookup_table.yaml").write_text(yaml.safe_dump(content))
    return folder

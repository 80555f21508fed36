"""Published tables and networks as this project's genes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ofa.space import Arch, Genes, Space


def read_genes(space: Space, frame: pd.DataFrame) -> Genes:
    """Genes of a table's rows: columns r, d, ks, e."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split("-")))

    rows = zip(frame.r, frame.d, frame.ks, frame.e, strict=True)
    return space.encode([Arch(r, numbers(d), numbers(ks), numbers(e)) for r, d, ks, e in rows])


def published_nets(folder: Path, source: str) -> list[dict[str, Any]]:
    """Entries of published_subnets.json: "ofa_specialized" or "mcunet"."""
    nets: list[dict[str, Any]] = json.loads((folder / "tables/published_subnets.json").read_text())[source]["nets"]
    return nets

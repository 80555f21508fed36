"""What a person writes to name a network, and the files in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Name(NamedTuple):
    """The parts of <network>@<weights>, where a network may be <space>/<choice>; "" where there is no such part."""

    network: str
    weights: str
    space: str
    choice: str

    @property
    def files(self) -> list[Path]:
        """The parts that are files."""
        return [path for path in map(Path, dict.fromkeys(self)) if path.is_file()]


def parse(text: str) -> Name:
    """The parts of a network's name; a space is a name in conf/space or a file that ends in .yaml."""
    network, _, weights = text.partition("@")
    space, own, choice = network.partition(".yaml/")
    if own:
        return Name(network, weights, f"{space}.yaml", choice)
    space, _, choice = network.partition("/")
    return Name(network, weights, space if choice else "", choice)

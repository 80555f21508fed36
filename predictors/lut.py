"""Latency from once-for-all's look-up tables, of MobileNetV3 and of ProxylessNAS: YAML with a time for each block.

N architectures, L layers.  Times are milliseconds of one image on the device that the tables are of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space
from ofa.spec import NetSpec
from ofa.table import LayerTable, spec_table
from predictors.lookup import Lookup

Float = NDArray[np.float64]
FIRST = re.compile(r"Conv-input:(\d+)x\1x\d+-")  # the first convolution's key, which tells the resolution
BLOCK = "expanded_conv"


@dataclass(frozen=True)
class BlockTables:
    """Mean milliseconds of every key for every resolution in a folder of `*.yaml`, or in one such file.

    The keys are once-for-all's for MobileNetV3 (Cai et al. 2020; `MBv3LatencyTable`): the first convolution ("Conv"),
    each block with the channels, sides, middle channels, kernel, stride, shortcut, squeeze-excite and h_swish it has
    ("expanded_conv"), the last convolution ("Conv_1"), the pool ("AvgPool2D"), the convolution behind it ("Conv_2") and
    the classifier ("Logits"); or those for ProxylessNAS (Cai et al. 2019; `ProxylessNASLatencyTable`), whose blocks
    have an expand ratio for the middle channels and tell neither of the last two, and whose pool belongs to "Logits".
    A resolution without a table is not interpolated: the sides inside a network round up at each stride, so its blocks
    have keys of their own, which nobody measured.
    """

    path: Path
    times: Mapping[int, Mapping[str, float]]
    files: Mapping[int, Path]

    @staticmethod
    def load(path: str | Path) -> BlockTables:
        """Read a table, or every table of a folder; raises UserError where there is none or a file is no such table."""
        path = Path(path)
        files = [path] if path.is_file() else sorted(path.glob("*.y*ml"))
        if not files:
            raise UserError(f"{path} is no table and holds none (*.yaml); name a folder of look-up tables")
        times: dict[int, Mapping[str, float]] = {}
        origin: dict[int, Path] = {}
        for file in files:
            table = _read(file)
            for resolution in _resolutions(file, table):
                if resolution in times:
                    raise UserError(f"{file} and {origin[resolution]} are both of resolution {resolution}; remove one")
                times[resolution], origin[resolution] = table, file
        return BlockTables(path, times, origin)

    def __call__(self, resolution: int, key: str) -> float:
        """Mean milliseconds of one key; raises UserError where the tables lack it."""
        if resolution not in self.times:
            raise UserError(
                f"resolution {resolution} has no table in {self.path} and is not interpolated; "
                f"keep to the resolutions {', '.join(map(str, sorted(self.times)))}"
            )
        if key not in self.times[resolution]:
            raise UserError(
                f"{self.files[resolution]} lacks the key {key}; "
                "choose the space the tables are of, or measure the block"
            )
        return self.times[resolution][key]

    def of_proxyless(self, resolution: int) -> bool:
        """Whether the keys are those for ProxylessNAS."""
        return not any(key.startswith(BLOCK) and "-hs:" in key for key in self.times.get(resolution, ()))


class LutLatency:
    """Milliseconds of one image, the sum of a device's look-up tables: genes (N, G) to (N,) float64.

    folder: of the tables, or one table, as `BlockTables.load` reads it.  Raises UserError, before any network is
    priced, where the tables lack a resolution or a block of the space.
    """

    name, unit = "latency_ms", "ms"

    def __init__(self, space: Space, folder: str | Path) -> None:
        tables = BlockTables.load(folder)
        for resolution in space.resolution:
            if resolution not in tables.times:
                tables(resolution, "")
        self._lookup = Lookup(space, lambda table: layer_ms(table, tables))

    def __call__(self, genes: Genes) -> Float:
        """Milliseconds of each architecture, (N,)."""
        return np.asarray(self._lookup(genes), dtype=np.float64)


def spec_latency(spec: NetSpec, tables: BlockTables) -> float:
    """Milliseconds of one image in one plain network; raises UserError where the tables lack one of its blocks."""
    return float(layer_ms(spec_table(spec), tables).sum())


def layer_ms(table: LayerTable, tables: BlockTables) -> Float:
    """Milliseconds of each block, in the column of its first layer.

    Returns: (N, L), 0 for the other layers of a block and for skipped blocks.
    """
    found = np.zeros(table.cin.shape)
    proxyless = {size: tables.of_proxyless(int(size)) for size in np.unique(table.size_in[:, 0])}
    for row, ms in enumerate(found):
        size = int(table.size_in[row, 0])
        for layer, key in network_keys(table, row, proxyless=proxyless[size]):
            ms[layer] += tables(size, key)
    return found


def network_keys(table: LayerTable, row: int, *, proxyless: bool = False) -> Iterator[tuple[int, str]]:
    """The keys that one network of a layer table is the sum of, each with the layer it belongs to."""
    layers = np.flatnonzero(table.active[row])
    blocks = np.split(layers, np.flatnonzero(np.diff(table.block[layers])) + 1)
    for at, block in enumerate(blocks):
        layer = int(block[0])
        if len(block) > 1:
            yield layer, _block_key(table, row, block, proxyless)
        elif table.op[layer] == "linear":
            given = layer - 1 if proxyless else layer  # there it begins with the pool
            yield layer, f"Logits-input:{_shape(table, row, given, 'in')}-output:{table.cout[row, layer]}"
        elif not (proxyless and table.op[layer] == "pool"):
            yield layer, _plain_key(table, row, layer, first=at == 0)


def _plain_key(table: LayerTable, row: int, layer: int, *, first: bool) -> str:
    """The key of a pool or of a convolution outside the blocks."""
    behind = table.size_in[row, layer] == 1
    name = "AvgPool2D" if table.op[layer] == "pool" else "Conv" if first else "Conv_2" if behind else "Conv_1"
    return f"{name}-input:{_shape(table, row, layer, 'in')}-output:{_shape(table, row, layer, 'out')}"


def _block_key(table: LayerTable, row: int, block: NDArray[np.int64], proxyless: bool) -> str:
    first, last = int(block[0]), int(block[-1])
    depthwise = next((int(layer) for layer in block if table.names[layer].endswith(".depthwise")), None)
    if depthwise is None:
        raise UserError(
            f"{table.names[first]} is of no block that once-for-all's look-up tables know, mbconv alone; "
            "use predictor=latency_table, which has every operation"
        )
    middle = table.cin[row, last]
    parts = {
        "input": _shape(table, row, first, "in"),
        "output": _shape(table, row, last, "out"),
        "expand": round(middle / table.cin[row, first]) if proxyless else middle,
        "kernel": table.kernel[row, depthwise],
        "stride": table.stride[row, depthwise],
        "idskip": int(table.shortcut[first]),
    }
    if not proxyless:
        parts["se"] = int(any(table.names[layer].endswith(".se.reduce") for layer in block))
        parts["hs"] = int(table.act[depthwise] == "h_swish")
    return "-".join([BLOCK, *(f"{name}:{value}" for name, value in parts.items())])


def _shape(table: LayerTable, row: int, layer: int, end: str) -> str:
    """Side, side and channels of a layer's input ("in") or output ("out"), as keys have them."""
    size = (table.size_in if end == "in" else table.size_out)[row, layer]
    return f"{size}x{size}x{(table.cin if end == 'in' else table.cout)[row, layer]}"


def _resolutions(path: Path, table: Mapping[str, float]) -> list[int]:
    found = sorted({int(match[1]) for key in table if (match := FIRST.match(key))})
    if not found:
        raise UserError(
            f"{path} tells no resolution; a look-up table needs the first convolution, such as "
            "Conv-input:224x224x3-output:112x112x24"
        )
    return found


def _read(path: Path) -> dict[str, float]:
    import yaml

    try:
        root: Any = yaml.compose(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        named = [(key.value, entry.value) for key, entry in root.value if ":" in key.value]  # others say what it is of
        times = {key: float(entry if isinstance(entry, str) else _values(entry)["mean"]) for key, entry in named}
        if len(times) < len(named):
            twice = next(key for i, (key, _) in enumerate(named) if key in dict(named[:i]))
            raise ValueError(f"{twice} is there twice")
        if wrong := next((key for key, ms in times.items() if not 0 <= ms < np.inf), None):
            raise ValueError(f"{wrong} has {times[wrong]} ms")
        return times
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{path} is no look-up table ({why}); each key needs a mean in ms, as once-for-all writes it"
        ) from None


def _values(entries: Any) -> dict[str, str]:
    """A mapping of scalars that YAML read, as texts."""
    return {key.value: value.value for key, value in entries}

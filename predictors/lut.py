"""Latency from look-up tables in once-for-all's YAML format: one file for each resolution, one time for each block.

N architectures, L layers.  Times are milliseconds of one image on the device that the tables are of.
"""

from __future__ import annotations

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
SUFFIX = "_lookup_table.yaml"


@dataclass(frozen=True)
class BlockTables:
    """Mean milliseconds of every key of every resolution in a folder of `<resolution>_lookup_table.yaml`.

    The keys are once-for-all's for MobileNetV3 (Cai et al. 2020; `MBv3LatencyTable`): the first convolution ("Conv"),
    each block with the channels, sides, middle channels, kernel, stride, shortcut, squeeze-excite and h_swish it has
    ("expanded_conv"), the last convolution ("Conv_1"), the pool ("AvgPool2D"), the convolution behind it ("Conv_2") and
    the classifier ("Logits").  A resolution without a file is not interpolated: the sides inside a network round up at
    each stride, so its blocks have keys of their own, which nobody measured.
    """

    folder: Path
    times: Mapping[int, Mapping[str, float]]

    @staticmethod
    def load(folder: str | Path) -> BlockTables:
        """Read every table of a folder; raises UserError where there is none or a file is not such a table."""
        paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not paths:
            raise UserError(f"{folder} holds no file called <resolution>{SUFFIX}; name a folder of look-up tables")
        return BlockTables(Path(folder), {_resolution(path): _read(path) for path in paths})

    def __call__(self, resolution: int, key: str) -> float:
        """Mean milliseconds of one key; raises UserError where the tables lack it."""
        path = self.folder / f"{resolution}{SUFFIX}"
        if resolution not in self.times:
            raise UserError(
                f"resolution {resolution} has no table ({path} does not exist) and is not interpolated; "
                f"keep to the resolutions {', '.join(map(str, sorted(self.times)))}"
            )
        if key not in self.times[resolution]:
            raise UserError(f"{path} lacks the key {key}; choose the space the tables are of, or measure the block")
        return self.times[resolution][key]


class LutLatency:
    """Milliseconds of one image, the sum of a device's look-up tables: genes (N, G) to (N,) float64.

    folder: of the tables, as `BlockTables.load` reads it.  Raises UserError, before any network is priced, where the
    tables lack a resolution or a block of the space.
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
    for row, ms in enumerate(found):
        for layer, key in network_keys(table, row):
            ms[layer] += tables(int(table.size_in[row, 0]), key)
    return found


def network_keys(table: LayerTable, row: int) -> Iterator[tuple[int, str]]:
    """The keys that one network of a layer table is the sum of, each with the layer it belongs to."""
    layers = np.flatnonzero(table.active[row])
    blocks = np.split(layers, np.flatnonzero(np.diff(table.block[layers])) + 1)
    for at, block in enumerate(blocks):
        if len(block) > 1:
            yield int(block[0]), _block_key(table, row, block)
            continue
        layer = int(block[0])
        yield layer, _plain_key(table, row, layer, first=at == 0)


def _plain_key(table: LayerTable, row: int, layer: int, *, first: bool) -> str:
    """The key of a pool, of a convolution outside the blocks, or of the classifier, whose output has no side."""
    given = f"input:{_shape(table, row, layer, 'in')}-output:"
    if table.op[layer] == "pool":
        return f"AvgPool2D-{given}{_shape(table, row, layer, 'out')}"
    if table.op[layer] == "linear":
        return f"Logits-{given}{table.cout[row, layer]}"
    name = "Conv" if first else "Conv_2" if table.size_in[row, layer] == 1 else "Conv_1"
    return f"{name}-{given}{_shape(table, row, layer, 'out')}"


def _block_key(table: LayerTable, row: int, block: NDArray[np.int64]) -> str:
    first, last = int(block[0]), int(block[-1])
    depthwise = next(int(layer) for layer in block if table.names[layer].endswith(".depthwise"))
    parts = {
        "input": _shape(table, row, first, "in"),
        "output": _shape(table, row, last, "out"),
        "expand": table.cin[row, last],
        "kernel": table.kernel[row, depthwise],
        "stride": table.stride[row, depthwise],
        "idskip": int(table.shortcut[first]),
        "se": int(any(table.names[layer].endswith(".se.reduce") for layer in block)),
        "hs": int(table.act[depthwise] == "h_swish"),
    }
    return "-".join(["expanded_conv", *(f"{name}:{value}" for name, value in parts.items())])


def _shape(table: LayerTable, row: int, layer: int, end: str) -> str:
    """Side, side and channels of a layer's input ("in") or output ("out"), as keys have them."""
    size = (table.size_in if end == "in" else table.size_out)[row, layer]
    return f"{size}x{size}x{(table.cin if end == 'in' else table.cout)[row, layer]}"


def _resolution(path: Path) -> int:
    text = path.name.removesuffix(SUFFIX)
    if not text.isdecimal():
        raise UserError(f"{path} is not called <resolution>{SUFFIX}, such as 224{SUFFIX}; rename or remove it")
    return int(text)


def _read(path: Path) -> dict[str, float]:
    import yaml

    try:
        content: Any = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {str(key): float(entry["mean"]) for key, entry in content.items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"{path} is no look-up table ({why}); each key needs a mean in ms, as once-for-all writes it"
        ) from None

"""Published networks: tables with the columns r, d, ks, e and one for each measured value, and lists of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Arch, Genes, Space
from ofa.spec import NetSpec, Unit
from ofa.table import make_divisible

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


def read_blocks(net: Mapping[str, Any]) -> NetSpec:
    """The network of a block list, an entry of published_subnets.json: "head", "blocks", "image_size".

    A block is [in, out, kernel, stride, expand, middle, squeeze-excite, activation, shortcut]; squeeze-excite reduces
    to a quarter of the middle channels, divisible by 8.  With a "final_expand_layer" the network is a MobileNetV3,
    whose "feature_mix_layer" comes after the pool and has no batch norm.
    """
    head = net["head"]
    features, classes = head["classifier"][:2]
    classifier = Unit("linear", features, classes, bn=False)
    units = [_conv(head["first_conv"]), *(_block(*block) for block in net["blocks"])]
    last, mix = head.get("final_expand_layer"), head.get("feature_mix_layer")
    if last:
        units += [_conv(last), Unit("pool", last[1], last[1]), _conv([*mix[:3], 1, mix[4]], bn=False), classifier]
    else:
        units += [*([_conv(mix)] if mix else []), Unit("pool", features, features), classifier]
    return NetSpec(tuple(units), net["image_size"], in_channels=3, classes=classes)


def _conv(values: Sequence[Any], *, bn: bool = True) -> Unit:
    cin, cout, kernel, stride, act = values
    return Unit("conv", cin, cout, kernel, stride, act=act, bn=bn)


def _block(
    cin: int, cout: int, kernel: int, stride: int, expand: float, mid: int, se: int, act: str, shortcut: int
) -> Unit:
    reduced = int(make_divisible(mid // 4)) if se else 0
    return Unit("mbconv", cin, cout, kernel, stride, mid, reduced, act, expand=expand != 1, shortcut=bool(shortcut))

"""Published tables and networks as this project's genes and specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ofa.space import Arch, Genes, Space
from ofa.spec import NetSpec, Unit
from ofa.units import make_divisible


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


def published_spec(net: dict[str, Any]) -> NetSpec:
    """The network of one entry."""
    head = net["head"]
    classes = head["classifier"]
    return NetSpec(
        (_conv(*head["first_conv"]), *(_block(*block) for block in net["blocks"]), *_head(head)),
        net["image_size"],
        in_channels=3,
        classes=classes[1],
    )


def _conv(cin: int, cout: int, kernel: int, stride: int, act: str, *, bn: bool = True) -> Unit:
    return Unit("conv", cin, cout, kernel, stride, act=act, bn=bn)


def _block(
    cin: int, cout: int, kernel: int, stride: int, expand: float, mid: int, se: int, act: str, shortcut: int
) -> Unit:
    reduced = int(make_divisible(mid // 4)) if se else 0
    return Unit("mbconv", cin, cout, kernel, stride, mid, reduced, act, expand=expand != 1, shortcut=bool(shortcut))


def _head(head: dict[str, Any]) -> list[Unit]:
    cin, classes = head["classifier"][:2]
    mix, last = head.get("feature_mix_layer"), head.get("final_expand_layer")
    linear = Unit("linear", cin, classes)
    if mix and last:  # MobileNetV3 mixes after the pool, without batch norm
        mixed = _conv(mix[0], mix[1], mix[2], 1, mix[4], bn=False)
        return [_conv(*last), Unit("pool", last[1], last[1]), mixed, linear]
    return [*([_conv(*mix)] if mix else []), Unit("pool", cin, cin), linear]

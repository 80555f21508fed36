"""A network drawn block by block from its spec, as SVG: one row per unit, from the image down to the classes."""

from __future__ import annotations

import math

from ofa.blocks import BLOCKS
from ofa.report.markup import Html, el
from ofa.spec import NetSpec, Unit

ROW, TOP, WIDTH = 21, 24, 470
MIDDLE, HALF = 114, 58  # of the room for bars, in SVG units
SHADE = {1: 0.35, 3: 0.5, 5: 0.75}  # a larger kernel is darker
NAMES = {kind: block.title for kind, block in BLOCKS.items()} | {
    "maxpool": "max pool",
    "pool": "average pool",
    "linear": "linear",
}
ACTIVATIONS = {"relu": "ReLU", "relu6": "ReLU6", "h_swish": "h-swish", "none": ""}
COLUMNS = ((44, "end", "map"), (MIDDLE, "middle", "channels"), (192, "start", "block"), (312, "end", "expand"),
           (342, "end", "SE"), (378, "end", "stride"), (408, "end", "out"), (420, "start", "act."))  # fmt: skip


def draw(spec: NetSpec) -> Html:
    """Solid bar: output channels; pale bar: expanded channels (square-root scale); arc: shortcut; map: output side."""
    widest = max((max(unit.cout, unit.mid) for unit in spec.units if unit.kind != "linear"), default=1)
    unit_width = HALF / math.sqrt(widest)
    cells = [_text(x, 14, name, anchor=anchor, class_="head") for x, anchor, name in COLUMNS]
    cells.append(_row(0, f"{spec.resolution}²", "image", out=spec.in_channels))
    cells.append(_bar(0, spec.in_channels, unit_width, opacity=0.35))
    side = spec.resolution
    for i, unit in enumerate(spec.units, start=1):
        before, side = side, 1 if unit.kind in ("pool", "linear") else math.ceil(side / unit.stride)
        cells += _unit(i, unit, "" if side == before else f"{side}²", unit_width)
    height = TOP + ROW * (len(spec.units) + 1) + 4
    return el("svg", *cells, viewBox=f"0 0 {WIDTH} {height}", class_="net", xmlns="http://www.w3.org/2000/svg")


def block_name(unit: Unit) -> str:
    """What a unit is: "MBConv 5×5"."""
    return NAMES[unit.kind] + ("" if unit.kind in ("pool", "linear") else f" {unit.kernel}×{unit.kernel}")


def _unit(i: int, unit: Unit, side: str, unit_width: float) -> list[Html]:
    """The text, the bars and the arc of one unit in row `i`."""
    expand = f"×{(unit.mid or unit.cin) / unit.cin:.3g}" if unit.kind == "mbconv" else ""
    stride = f"/{unit.stride}" if unit.stride > 1 else ""
    marks = (expand, str(unit.se or ""), stride)
    cells = [_row(i, side, block_name(unit), *marks, out=unit.cout, act=ACTIVATIONS[unit.act])]
    if unit.mid:
        cells.append(_bar(i, unit.mid, unit_width, opacity=0.14))
    if unit.kind in BLOCKS:
        cells.append(_bar(i, unit.cout, unit_width, opacity=SHADE.get(unit.kernel, 1.0)))
    if unit.shortcut:
        x, top = MIDDLE + HALF + 4, TOP + ROW * i + 1
        cells.append(el("path", d=f"M{x} {top} q6 0 6 6 v{ROW - 14} q0 6 -6 6", class_="shortcut"))
    return cells


def _row(
    i: int, side: str, name: str, expand: str = "", se: str = "", stride: str = "", *, out: int, act: str = ""
) -> Html:
    values = (side, "", name, expand, se, stride, str(out), act)
    y = TOP + ROW * i + 14
    return Html("".join(_text(x, y, v, anchor=a) for (x, a, _), v in zip(COLUMNS, values, strict=True) if v))


def _bar(i: int, channels: int, unit_width: float, *, opacity: float) -> Html:
    half = max(1.0, unit_width * math.sqrt(channels))
    place = {
        "x": f"{MIDDLE - half:.1f}",
        "y": TOP + ROW * i + 2,
        "width": f"{2 * half:.1f}",
        "height": ROW - 4,
        "rx": 3,
    }
    return el("rect", **place, class_="bar", fill_opacity=opacity)


def _text(x: float, y: float, text: str, *, anchor: str = "start", class_: str = "cell") -> Html:
    return el("text", text, x=x, y=y, text_anchor=anchor, class_=class_)

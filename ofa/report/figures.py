"""Charts as inline SVG that takes its colours from the page, so that they follow light, dark and print.

A chart is a function that draws on a figure and returns a description for screen readers; `chart` makes it return SVG.
Matplotlib draws with the marker colours INK, SERIES, ..., which `_svg` replaces by the page's CSS variables.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any, Concatenate, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ofa.limits import sought
from ofa.report.load import Device, Search
from ofa.report.markup import Html
from ofa.report.summary import bound, label, scale

Values = NDArray[np.float64]
P = ParamSpec("P")

INK, MUTED, GRID, BAND, BAD, SURFACE = "#000101", "#000102", "#000103", "#000104", "#000105", "#000106"
SERIES = ("#000201", "#000202", "#000203", "#000204", "#000205", "#000206")
MARKERS, GLYPHS = "os^Dvp", "●■▲◆▼⬟"
CLOUD, CLOUD_OUT = "#7f8794", "#c08a8a"  # baked into a bitmap: legible on light and dark
BEYOND = 2  # times the limit: where the x axis of a front ends
DASHED = (0, (4, 3))
_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band", BAD: "bad", SURFACE: "surface"}
_NAMES |= {colour: f"c{i}" for i, colour in enumerate(SERIES)}
_NETS: dict[str, dict[str, Any]] = {
    "largest": {"color": SERIES[0], "marker": "o", "markersize": 3.5},
    "smallest": {"color": SERIES[1], "marker": "s", "markersize": 3.2},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "figure.dpi": 72,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def chart(width: float, height: float) -> Callable[[Callable[Concatenate[Figure, P], str]], Callable[P, Html]]:
    """Make a function that draws on a figure of so many inches return the figure's SVG, in the report's style."""

    def decorate(draw: Callable[Concatenate[Figure, P], str]) -> Callable[P, Html]:
        @wraps(draw)
        def chart(*args: P.args, **kwargs: P.kwargs) -> Html:
            with mpl.rc_context(_STYLE):
                figure = Figure(figsize=(width, height), layout="constrained")
                return _svg(figure, draw(figure, *args, **kwargs))

        return chart

    return decorate


@chart(11.5, 4.8)
def training(figure: Figure, log: Sequence[dict[str, Any]]) -> str:
    """Accuracy of the logged nets, and the loss below, against the epoch; the phases as bands."""
    epochs = [line["epoch"] for line in log]
    nets = sorted({name for line in log for name in line["val"]}, key=lambda name: (name in _NETS, name))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name in nets:
        values = [100 * line["val"].get(name, math.nan) for line in log]
        style = _NETS.get(name, {"color": MUTED, "linewidth": 0.8})
        top.plot(epochs, values, markevery=max(1, len(log) // 30), **style)
    bottom.plot(epochs, [line["loss"] for line in log], color=INK, linewidth=1.3)
    _phases(top, log, named=True)
    _phases(bottom, log, named=False)
    top.set_ylabel("accuracy (%)")
    bottom.set(xlabel="epoch", ylabel="loss", xlim=(0.5, max(epochs) + 0.5))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return "Accuracy and loss against the epoch"


@chart(5.4, 3.6)
def fronts(figure: Figure, device: Device, x: str, *, y: str, series: Sequence[str]) -> str:
    """What the agents tried and found for one device, the limit on `x` and the chosen net as a star."""
    (fx, ux), (fy, uy) = (scale(name, tried(device, [name])[name].max()) for name in (x, y))
    axes = figure.subplots()
    dots: dict[str, Any] = {
        "marker": ".",
        "linestyle": "",
        "alpha": 0.35,
        "markersize": 3.2,
        "markeredgewidth": 0,
        "rasterized": True,
    }
    for inside, colour in ((False, CLOUD_OUT), (True, CLOUD)):
        cloud = tried(device, [x, y], feasible=inside)
        axes.plot(cloud[x] / fx, cloud[y] / fy, color=colour, **dots)
    for search in device.searches:
        steps = _staircase(search, x, y)
        style = {"linewidth": 1.2, "drawstyle": "steps-post", "markersize": 4, **_series(series, search.agent)}
        axes.plot(steps[:, 0] / fx, steps[:, 1] / fy, **style)
    if limit_inside(device, x):
        _limit_line(axes, device.limits[x] / fx, f"limit {bound(x, device.limits[x])} {label(x)}")
    if x in device.predicted and y in device.predicted:
        star: dict[str, Any] = {"marker": "*", "markersize": 15, "markeredgecolor": SURFACE, "zorder": 5}
        axes.plot(device.predicted[x] / fx, device.predicted[y] / fy, color=INK, **star)
    named = f"{_source(device, y)} {label(y)}".strip()
    axes.set(xlabel=_axis(label(x), ux), ylabel=_axis(named, uy))
    return f"{device.name}: {named} against {label(x)}"


def front_axes(device: Device) -> tuple[str, list[str]]:
    """(metric of the y axis, metrics that get a panel as x axis) for the fronts of a device."""
    objectives = [name for search in device.searches for name in search.result.get("objectives", {})]
    names = list(dict.fromkeys(objectives)) or ["accuracy"]
    good = [name for name in ("accuracy", *names) if name in names and sought(name) < 0]
    y = good[0] if good else names[0] if len(names) > 1 else "accuracy"
    return y, [name for name in names if name != y] or ["macs"]


def tried(device: Device, metrics: list[str], *, feasible: bool | None = None) -> pd.DataFrame:
    """The metrics of every net that the agents evaluated, or of those that are (not) within the budget."""
    columns = [*metrics, "violation"]
    frame = pd.concat([search.evaluations.reindex(columns=columns) for search in device.searches]).dropna()
    return frame[metrics] if feasible is None else frame.loc[(frame["violation"] <= 0) == feasible, metrics]


def limit_inside(device: Device, metric: str) -> bool:
    """Whether the limit on a metric lies near enough to the nets evaluated to be drawn among them."""
    return metric in device.limits and bool(device.limits[metric] <= 1.25 * tried(device, [metric])[metric].max())


@chart(5.4, 3.0)
def hypervolume(figure: Figure, device: Device, series: Sequence[str]) -> str:
    """Hypervolume of each agent's front against the evaluations spent."""
    axes, best, low = figure.subplots(), best_hypervolume(device), 100.0
    for search in device.searches:
        curve = np.array(search.result.get("curve") or [], float).reshape(-1, 2) * (1, 100 / best)
        style: dict[str, Any] = {"markersize": 5, "markevery": [-1] if len(curve) else None}
        axes.plot(curve[:, 0], curve[:, 1], **style, **_series(series, search.agent))
        low = min([low, *curve[curve[:, 0] >= 0.05 * curve[:, 0].max(initial=0), 1]])  # the first steps start at 0
    axes.set(xlabel="evaluations", ylabel="hypervolume (% of the best)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0, 1.1 * low - 10), top=100 + 0.06 * (101 - low))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return f"{device.name}: hypervolume against evaluations"


def best_hypervolume(device: Device) -> float:
    """The largest hypervolume that an agent reached in the end; 1 where none found a net within the budget."""
    return max(search.result.get("hypervolume", 0.0) for search in device.searches) or 1.0


@chart(3.6, 3.2)
def agreement(figure: Figure, pairs: pd.DataFrame, metric: str) -> str:
    """Predicted against measured values of held-out nets; the line is where both are equal."""
    values = pairs[["measured", "predicted"]].to_numpy(float)
    factor, unit = scale(metric, values.max())
    low, high = values.min() / factor, values.max() / factor
    edge = 0.06 * ((high - low) or 1.0)
    ends = (low - edge, high + edge)
    axes = figure.subplots()
    axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=DASHED)
    axes.plot(*values.T / factor, "o", color=SERIES[0], alpha=0.6, markersize=4.2, markeredgewidth=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel=_axis(f"measured {label(metric)}", unit), ylabel=_axis(f"predicted {label(metric)}", unit))
    return f"Predicted against measured {label(metric)}"


@chart(3.6, 3.2)
def learning_curve(figure: Figure, curve: Sequence[dict[str, Any]]) -> str:
    """Kendall tau on held-out nets against the number of measured nets in the fit."""
    axes = figure.subplots()
    n, tau, spread = (np.array([point.get(key) or 0 for point in curve], float) for key in ("n", "tau", "tau_std"))
    axes.fill_between(n, tau - spread, tau + spread, color=SERIES[0], alpha=0.18, linewidth=0)
    axes.plot(n, tau, color=SERIES[0], marker="o", markersize=4)
    axes.set(xlabel="measured nets in the fit", ylabel="Kendall tau, held-out nets")
    axes.set_xlim(left=0)
    return "Kendall tau against the number of measured nets"


def _svg(figure: Figure, description: str) -> Html:
    """The figure as an <svg> element with ids of its own and the page's colours."""
    buffer, name = io.StringIO(), "f" + hashlib.blake2b(description.encode(), digest_size=4).hexdigest()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same ids for the same figure
        figure.savefig(buffer, format="svg", transparent=True, dpi=160)
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)
    text = text.replace("<svg", f'<svg class="chart" role="img" aria-label="{escape(description)}"', 1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Html(re.sub("|".join(_NAMES), lambda match: f"var(--{_NAMES[match[0]]})", text))


def _phases(axes: Axes, log: Sequence[dict[str, Any]], *, named: bool) -> None:
    """Shade every other phase; `named` writes their names on top, upright where one is wider than its band."""
    starts = [i for i, line in enumerate(log) if i == 0 or line["phase"] != log[i - 1]["phase"]]
    bands = [
        (log[i]["epoch"] - 0.5, log[j - 1]["epoch"] + 0.5) for i, j in zip(starts, [*starts[1:], len(log)], strict=True)
    ]
    names = [log[i]["phase"] for i in starts]
    room = 750 / (bands[-1][1] - bands[0][0])  # points per epoch; a letter needs about 5
    upright = any(5 * len(name) > room * (right - left) for name, (left, right) in zip(names, bands, strict=True))
    style: dict[str, Any] = {
        "rotation": 90 if upright else 0,
        "ha": "center",
        "va": "bottom",
        "fontsize": 8,
        "color": MUTED,
    }
    for left, right in bands[::2]:
        axes.axvspan(left, right, color=BAND, linewidth=0)
    for name, (left, right) in zip(names, bands, strict=True):
        if named:
            axes.text((left + right) / 2, 1.02, name, transform=axes.get_xaxis_transform(), **style)


def _limit_line(axes: Axes, value: float, text: str) -> None:
    """Draw a limit on x and shade what lies beyond it."""
    left, right = axes.get_xlim()
    right = min(max(right, value + 0.04 * (value - left)), BEYOND * value)
    axes.axvspan(value, right, color=BAD, alpha=0.07, linewidth=0)
    axes.axvline(value, color=BAD, linewidth=1.2, linestyle=DASHED)
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 8, "color": BAD}
    axes.annotate(text, (value, 0), (-3, 3), axes.get_xaxis_transform(), "offset points", **style)
    axes.set_xlim(left, right)


def _series(series: Sequence[str], agent: str) -> dict[str, Any]:
    """Colour and marker of an agent, the same in every figure."""
    i = series.index(agent) % len(SERIES)
    return {"color": SERIES[i], "marker": MARKERS[i], "markeredgecolor": SURFACE, "markeredgewidth": 0.4}


def _source(device: Device, metric: str) -> str:
    """Where the values of a metric come from; nothing where some searches measured it and others predicted it."""
    measures = {metric in search.result.get("measured", ()) for search in device.searches}
    if measures == {False}:
        return "predicted"
    return "measured" if measures == {True} else ""


def _staircase(search: Search, x: str, y: str) -> Values:
    """(N, 2): of an agent's front, the nets that none beats on both metrics, by x; other objectives keep more in it."""
    nets = search.evaluations.reindex(columns=[x, y, "front"]).dropna()
    points = nets.loc[nets["front"].astype(bool), [x, y]].to_numpy(float)
    objectives = search.result.get("objectives", {})
    costs = points * (objectives.get(x, 1), objectives.get(y, -1))
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    best = np.minimum.accumulate(np.r_[np.inf, costs[order, 1]])[:-1]
    keep = order[costs[order, 1] < best]
    return points[keep[np.argsort(points[keep, 0])]]


def _axis(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name

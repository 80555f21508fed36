"""The report's compression section: each network that `ofa-compress` worked on, its chains, what its layers bear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ofa.report.figures import MARKERS, SERIES, chart
from ofa.report.load import Chain, Run
from ofa.report.markup import Html, el, join
from ofa.report.summary import label, show
from ofa.report.table import heads

COLUMNS = ("accuracy", "macs", "sparse_macs", "bit_operations", "file_bytes", "peak_memory_bytes", "latency_ms")
NAMES = {
    "sparse_macs": "not by zero",
    "bit_operations": "bit-operations",
    "file_bytes": "packed file",
    "peak_memory_bytes": "PyTorch's peak memory",
}
MOST_COLOURED = 0.3  # of accuracy lost: the strongest colour of a cell


def compression(run: Run) -> Html | None:
    """A table, a front and, where it was measured, a table of sensitivities for each network."""
    sources = dict.fromkeys((chain.source, chain.network) for chain in run.chains)
    shared = Counter(name for _, name in sources)
    parts = [
        _network(name if shared[name] == 1 else source, [chain for chain in run.chains if chain.source == source])
        for source, name in sources
    ]
    return join(*parts) if parts else None


def _network(name: str, chains: Sequence[Chain]) -> Html:
    names = ("step", *(NAMES.get(metric, label(metric)) for metric in COLUMNS), "smaller")
    table = el("div", el("table", heads(names), *(_chain(chain) for chain in chains), class_="nets"), class_="wide")
    text = "Accuracy on the test images against the packed file, a line for each chain, from the network before it."
    panels = [el("figure", el("h3", name), front(name, chains), el("figcaption", text))]
    if measured := next((chain.sensitivity for chain in chains if chain.sensitivity), None):
        panels.append(_sensitivity(measured))
    return join(table, el("div", *panels, class_="grid below"))


def _chain(chain: Chain) -> Html:
    """One chain as a table body."""
    first = chain.steps[0]["file_bytes"]
    title = el("tr", el("th", el("h3", chain.title), colspan=len(COLUMNS) + 2), class_="across")
    rows = (
        el(
            "tr",
            el("th", step["step"]),
            *(el("td", show(metric, step.get(metric)), title=step.get(metric)) for metric in COLUMNS),
            el("td", f"{first / step['file_bytes']:.1f}×"),
            class_="step",
        )
        for step in chain.steps
    )
    return el("tbody", title, *rows)


def _sensitivity(rows: Sequence[dict[str, Any]]) -> Html:
    """Accuracy with one layer alone pruned, a line for each layer, darker where more is lost than at best."""
    levels = sorted({row["level"] for row in rows})
    found = {(row["layer"], row["level"]): row["accuracy"] for row in rows}
    weights = {row["layer"]: row["weights"] for row in rows}
    best = max(found.values())
    lines = (
        el("tr", el("th", layer), el("td", f"{n:,}"), *(_cell(found[layer, level], best) for level in levels))
        for layer, n in weights.items()
    )
    names = ("layer", "weights", *(f"{level:.0%}" for level in levels))
    table = el("div", el("table", heads(names), el("tbody", *lines), class_="dense"), class_="wide")
    text = "Accuracy (%) on validation images with so many of one layer's smallest weights at zero, all others whole."
    return el("figure", el("h3", "Sensitivity of the layers"), table, el("figcaption", text))


def _cell(accuracy: float, best: float) -> Html:
    lost = min(1.0, (best - accuracy) / MOST_COLOURED)
    return el(
        "td", f"{100 * accuracy:.1f}", style=f"background:color-mix(in srgb, var(--bad) {55 * lost:.0f}%, transparent)"
    )


@chart(5.4, 3.6)
def front(figure: Figure, name: str, chains: Sequence[Chain]) -> str:
    """Accuracy against the size of the packed file after each step, a line for each chain."""
    axes = figure.subplots()
    for i, chain in enumerate(chains):
        x, y = [step["file_bytes"] / 1e3 for step in chain.steps], [100 * step["accuracy"] for step in chain.steps]
        style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)], "markersize": 6}
        axes.plot(x, y, **style)
        side = -11 if i % 2 else 5  # chains often end side by side
        for j in range(1 if i else 0, len(x)):  # all chains begin at the same network
            axes.annotate(chain.steps[j]["step"], (x[j], y[j]), (5, side), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(_two_five))
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel="packed file (kB)", ylabel="test top-1 (%)")
    return f"{name}: accuracy against file size after each compression step"


def _two_five(value: float, _: object) -> str:
    """Labels of a log axis between its powers of ten: 2 and 5 times them alone."""
    digit = f"{value:e}"[0]
    return f"{value:g}" if digit in "25" else ""

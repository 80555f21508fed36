"""The report's main table: each device's net at each step, its budget, and what the columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ofa.limits import side
from ofa.report.load import Device, Run
from ofa.report.markup import Html, el, join
from ofa.report.summary import COLUMNS, arch_text, bound, cell, device_rows, label, machine, ranking_text, show

GLOSSARY = {
    "predicted": "what the search reckoned with: validation images (mode=iterate or shared: measured), the float net's "
    "latency, memory and weights of the int8 net unless configured otherwise",
    "accuracy": "share of the test images classified correctly; nothing before this table used them",
    "MACs": "multiply-accumulate operations for one image, in convolutions and linear layers",
    "peak memory": "largest sum of activations that are alive at the same time, for one image",
    "size on disk": "of the ONNX file; predicted: of its constants alone. 1 kB is 1,000 bytes",
    "latency": "median time of one image in ONNX Runtime on the machine above, ± half the span of the middle 80 %",
    "ONNX error": "largest difference of a logit between ONNX Runtime and PyTorch, on real images",
    "k5e4": "a block with a 5×5 kernel and expand ratio 4; slashes separate the stages",
}


def nets(run: Run) -> Html | None:
    """The main table: each device's net as predicted and as measured after each step, and its budget."""
    if not any(device.arch or device.infeasible for device in run.devices):
        return None
    names = ("model", *(label(metric) for metric in COLUMNS), "ONNX error")
    bodies = (_device_rows(device) for device in run.devices)
    glossary = (join(el("dt", term), el("dd", text)) for term, text in GLOSSARY.items())
    return join(el("div", el("table", heads(names), *bodies, class_="nets"), class_="wide"), el("dl", *glossary))


def badge(device: Device) -> Html:
    """The verdict on a device's budget, in a word and a colour."""
    if device.infeasible:
        return el("span", "no network fits", class_="badge bad")
    met = device.export.get("met")
    if met is None:
        return el("span", "not measured yet", class_="badge")
    return el("span", "budget met" if met else "budget not met", class_="badge good" if met else "badge bad")


def _device_rows(device: Device) -> Html:
    """One device as a table body: its name and verdict, its models, its budget, its architecture."""
    title = join(el("h3", device.title, " ", badge(device)), el("span", device.description))
    if device.infeasible:
        return el("tbody", _across("th", title), _across("td", el("div", device.infeasible)))
    limits = [_meter(limit) for limit in device.budget]
    return el(
        "tbody",
        _across("th", title),
        *(_model_row(row, shipped=row["model"] == device.export.get("shipped")) for row in device_rows(device)),
        _across("td", el("div", *limits, class_="budget")) if limits else None,
        _across("td", el("code", arch_text(device.arch))),
        _across("td", el("div", ranking_text(device.chosen["ranking"]))) if "ranking" in device.chosen else None,
    )


def _across(tag: str, content: Html) -> Html:
    """A row of one cell, whose elements, not bare text, stay in view where the table is scrolled."""
    return el("tr", el(tag, content, colspan=len(COLUMNS) + 2), class_="across")


def _model_row(row: dict[str, Any], *, shipped: bool) -> Html:
    cells = [el("td", cell(row, metric), title=row[metric]) for metric in COLUMNS]
    cells.append(el("td", "–" if row["parity_max_abs"] is None else f"{row['parity_max_abs']:.1g}"))
    return el("tr", el("th", row["model"], el("small", " shipped") if shipped else None), *cells, class_="model")


def _meter(limit: dict[str, Any]) -> Html:
    """One limit of the budget: a bar of value / limit, both numbers and the answer."""
    name, value, largest, answer = limit["limit"], limit["value"], limit["max"], "yes" if limit["met"] else "no"
    share = min(100.0, 100 * value / largest) if largest else 100.0
    bar = el("span", el("i", "", style=f"width:{share:.0f}%"), class_=f"meter {answer}")
    told = f"{show(name, value)}{machine(limit)} of {side(name)} {bound(name, largest)}: "
    text = el("span", told, el("b", answer, class_=answer), f" ({limit['source']})" if "source" in limit else None)
    return el("div", el("span", label(name)), bar, text)


def heads(names: Sequence[str]) -> Html:
    """The head of a table."""
    return el("thead", el("tr", *(el("th", name) for name in names)))

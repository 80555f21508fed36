"""The sections of the report, each a function from a run to its content, None where the run has not made it yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ofa.blocks import BLOCKS
from ofa.report import figures
from ofa.report.compression import compression
from ofa.report.drawing import draw
from ofa.report.load import Device, Run, Search
from ofa.report.markup import Html, el, join
from ofa.report.summary import bound, label, show
from ofa.report.table import heads, nets
from ofa.spec import NetSpec


def drawings(run: Run) -> Html | None:
    """Each exported net, block by block."""
    panels = []
    for device in run.devices:
        if spec := _spec(device):
            kinds = Counter(BLOCKS[unit.kind].title for unit in spec.units if unit.mid)
            size = (f"{spec.resolution}×{spec.resolution} pixels", f"{spec.classes} classes")
            text = ", ".join([*(f"{n} {kind} blocks" for kind, n in kinds.items()), *size])
            panels.append(_panel(device.title, draw(spec), f"{text}."))
    return el("div", *panels, class_="grid") if panels else None


def fronts(run: Run) -> Html | None:
    """Pareto fronts, a panel per device and objective."""
    series = _agents(run)
    panels = [
        _panel(device.title, figures.fronts(device, x, y=y, series=series), _front_caption(device, x, y))
        for device in run.devices
        if device.searches
        for y, xs in [figures.front_axes(device)]
        for x in xs
    ]
    clouds = ((figures.CLOUD, "●", "evaluated, within the budget"), (figures.CLOUD_OUT, "●", "evaluated, over it"))
    legend = _legend(*_agent_keys(series), *clouds, ("var(--ink)", "★", "chosen net"))
    return join(legend, el("div", *panels, class_="grid")) if panels else None


def hypervolume(run: Run) -> Html | None:
    """Hypervolume of each agent against evaluations, a panel per device."""
    series = _agents(run)
    panels = []
    for device in run.devices:
        alike: dict[str, list[Search]] = {}  # volumes of what is predicted and of what is measured are no rivals
        for search in device.searches:
            alike.setdefault(str([search.result.get(name) for name in ("measured", "reference")]), []).append(search)
        for part in (replace(device, searches=tuple(searches)) for searches in alike.values()):
            ends = ", ".join(_end(search, figures.best_hypervolume(part)) for search in part.searches)
            measured = part.searches[0].result.get("measured")
            title = f"{device.title}, {', '.join(map(label, measured))} measured" if measured else device.title
            panels.append(_panel(title, figures.hypervolume(part, series), f"In the end: {ends}."))
    return join(_legend(*_agent_keys(series)), el("div", *panels, class_="grid")) if panels else None


def training(run: Run) -> Html | None:
    """Accuracy and loss per epoch."""
    if not run.log:
        return None
    last = run.log[-1]
    randoms = sum(name not in ("largest", "smallest") for name in last["val"])
    keys = [("var(--c0)", "●", "largest net"), ("var(--c1)", "■", "smallest net")]
    keys.append(("var(--muted)", "–", f"{randoms} random nets"))
    return join(_legend(*keys), _panel(None, figures.training(run.log), _training_caption(run.log, run.ends)))


def predictors(run: Run) -> Html | None:
    """Predicted against measured, the learning curve and the scores."""
    panels = []
    for kind, metric in (("accuracy", "accuracy"), ("latency", "latency_ms")):
        pairs = run.predictions[run.predictions["kind"] == kind].dropna(subset=["predicted", "measured"])
        if len(pairs):
            score = run.fit.get(kind) or {}
            text = f"Kendall tau {_spread(score.get('tau'))}, {_error(score)}; n = {len(pairs)} held-out nets"
            text += f" (one of {score['repeats']} random splits)." if score.get("repeats") else "."
            panels.append(_panel(label(metric).capitalize(), figures.agreement(pairs, metric), text))
    curve = (run.fit.get("accuracy") or {}).get("curve") or []
    if len(curve) > 1:
        text = "Kendall tau of predicted accuracy on held-out nets; band: ± 1 standard deviation."
        panels.append(_panel("How many measured nets are enough", figures.learning_curve(curve), text))
    return join(el("div", *panels, class_="grid three"), _scores(run)) if panels or run.fit else None


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, one sentence for a newcomer, the content and the stage that makes it ("": a run need not have it)."""

    title: str
    stage: str
    content: Callable[[Run], Html | None]
    text: str

    def html(self, run: Run) -> Html | None:
        """The section, None where its content does not exist yet."""
        content = self.content(run)
        if content is None:
            return None
        return el("section", el("h2", self.title), el("p", self.text), content, id=self.title.lower().replace(" ", "-"))


SECTIONS = (
    Section(
        "Chosen nets",
        "search",
        nets,
        "For each device the net that the search chose: as predicted there, and as measured after each step since. "
        "The bars compare what ships with the budget.",
    ),
    Section(
        "Architectures",
        "export",
        drawings,
        "The nets block by block, from the image to the classes. Solid bar: output channels, stronger in colour for "
        "larger kernels; pale bar: expanded channels; both on a square-root scale. An arc is a shortcut. map: side of "
        "the output in pixels; SE: channels inside squeeze-and-excitation.",
    ),
    Section(
        "Pareto fronts",
        "search",
        fronts,
        "Every net that the search evaluated; the line of each agent joins the nets of its front (within the budget, "
        "beaten by none on all objectives at once) that none beats on the two axes shown. The star is the chosen net.",
    ),
    Section(
        "Search progress",
        "search",
        hypervolume,
        "The hypervolume, how much of the space of objectives an agent's front dominates, against the number of nets "
        "it evaluated: higher is better, and rising early means that fewer evaluations suffice. Nets beyond the budget "
        "count among those evaluated and add none.",
    ),
    Section(
        "Supernet training",
        "train",
        training,
        "Accuracy on the validation images of nets cut from the supernet, and the training loss, after each epoch; "
        "the bands are the phases of the schedule.",
    ),
    Section(
        "Predictors",
        "fit",
        predictors,
        "How well the search's predictions agree with measurements of nets that were not used to fit them. Kendall "
        "tau is 1 where predictions put all nets in the right order and 0 where the order is random.",
    ),
    Section(
        "Compression",
        "",
        compression,
        "Networks after each step of ofa-compress, on the test images. Zeros among the weights make the packed file "
        "smaller and give no speed in ONNX Runtime or LiteRT, which multiply by them like by any number (“not by "
        "zero” counts what a sparse runtime would do); fewer channels and lower ranks are faster. Latency is that "
        "of float32 in ONNX Runtime, and peak memory what PyTorch holds in float32, whatever the bits of the step.",
    ),
)


def _training_caption(log: Sequence[dict[str, Any]], tested: dict[str, float]) -> str:
    """How far training came, how good its nets are, how fast it went, and which net collapsed."""
    last, val = log[-1], log[-1]["val"]
    ends = ", ".join(f"{name} {show('accuracy', val[name])}" for name in ("largest", "smallest") if name in val)
    images = f", {last['val_images']:,} validation images" if "val_images" in last else ""
    text = f"Epoch {last['epoch']} of {last['epochs']}: {ends}; n = {len(val)} nets{images}."
    if tested:
        text += " Test images: " + ", ".join(f"{name} {show('accuracy', top1)}" for name, top1 in tested.items()) + "."
    if speeds := sorted(line["images_per_s"] for line in log if line.get("images_per_s")):
        text += f" Median speed: {speeds[len(speeds) // 2]:,.0f} images/s."
    if collapsed := [f"{name} in epoch {line['epoch']}" for line in log for name in line.get("collapsed", ())]:
        text += f" Collapsed: {', '.join(collapsed)}."
    return text


def _front_caption(device: Device, x: str, y: str) -> str:
    tried = sum(len(search.evaluations) for search in device.searches)
    inside = sum(int((search.evaluations["violation"] <= 0).sum()) for search in device.searches)
    text = f"{label(y)} against {label(x)}; n = {tried:,} evaluations, {inside:,} of them within the budget."
    if device.others:
        text += f" Left out, as their limits or objectives were others: {', '.join(device.others)}."
    if x in device.limits and not figures.limit_inside(device, x):
        text += f" The limit, {bound(x, device.limits[x])}, is right of everything shown."
    elif x in device.limits and figures.tried(device, [x])[x].max() > figures.BEYOND * device.limits[x]:
        text += f" Nets beyond {figures.BEYOND:g} times the limit are not drawn."
    return text[0].upper() + text[1:]


def _end(search: Search, best: float) -> str:
    """Where an agent's hypervolume ended, and after how much work."""
    share = f"{100 * search.result['hypervolume'] / best:.1f}\u00a0%"
    seed, seconds = search.result.get("seed", "–"), search.result.get("seconds", float("nan"))
    return f"{search.agent} {share} (n = {search.result['evaluations']:,} nets, {seconds:.1f} s, seed {seed})"


def _scores(run: Run) -> Html:
    """The predictors' scores as a table."""
    accuracy, latency = run.fit.get("accuracy") or {}, run.fit.get("latency") or {}
    names = ("predictor", "method", "made from", "Kendall tau", "error", "held out")
    rows = [("MACs, parameters, memory", "formula", "the architecture", "–", "none: exact", "–")]
    if accuracy:
        method, made = str(accuracy.get("model", "–")), f"{accuracy.get('n_fit', '–')} measured nets"
        rows.append(("accuracy", method, made, _spread(accuracy.get("tau")), _error(accuracy), _heldout(accuracy)))
    if latency:
        method, made = _latency_method(latency), f"{latency.get('shapes', '–')} measured layer shapes"
        rows.append(("latency", method, made, _spread(latency.get("tau")), _error(latency), _heldout(latency)))
    lines = (el("tr", *(el("td", cell) for cell in row)) for row in rows)
    return el("div", el("table", heads(names), el("tbody", *lines), class_="scores"), class_="wide")


def _heldout(score: dict[str, Any]) -> str:
    return f"{score.get('n_heldout', '–')} nets" + (f", {score['repeats']} splits" if score.get("repeats") else "")


def _latency_method(score: dict[str, Any]) -> str:
    """The sum over layers, and the straight line that corrects it."""
    if "slope" not in score:
        return "sum over layers"
    return f"{score['slope']:.3g} × sum over layers {score['intercept_ms']:+.3g} ms"


def _spread(value: Any) -> str:
    """A number, or a mean with its standard deviation."""
    if isinstance(value, dict):
        return f"{value['mean']:.3f}\u00a0±\u00a0{value.get('std', 0.0):.3f}"
    return "–" if value is None else f"{value:.3f}"


def _error(score: dict[str, Any]) -> str:
    """The error of a predictor in words: RMSE in points of accuracy, or MAPE."""
    if rmse := score.get("rmse"):
        mean, std = (rmse["mean"], rmse.get("std", 0.0)) if isinstance(rmse, dict) else (rmse, None)
        return f"RMSE {100 * mean:.2f}{'' if std is None else f' ± {100 * std:.2f}'} points"
    if score.get("mape") is None:
        return "error unknown"
    within = score.get("within_10_percent")
    more = "" if within is None else f", {100 * within:.0f}\u00a0% within 10\u00a0%"
    return f"MAPE {100 * score['mape']:.1f}\u00a0%{more}"


def _spec(device: Device) -> NetSpec | None:
    return NetSpec.from_dict(device.export["spec"]) if device.export.get("spec") else None


def _agents(run: Run) -> list[str]:
    """All agents of the run; their order gives them the same colour everywhere."""
    return sorted({search.agent for device in run.devices for search in device.searches})


def _agent_keys(series: Sequence[str]) -> list[tuple[str, str, str]]:
    count = len(figures.SERIES)
    return [(f"var(--c{i % count})", figures.GLYPHS[i % count], agent) for i, agent in enumerate(series)]


def _legend(*keys: tuple[str, str, str]) -> Html:
    """Keys of (colour, glyph, text)."""
    items = (el("span", el("b", glyph, style=f"color:{colour}"), " ", text) for colour, glyph, text in keys)
    return el("p", *items, class_="legend")


def _panel(title: str | None, image: Html, text: str) -> Html:
    """A figure with a heading and a caption."""
    return el("figure", el("h3", title) if title else None, image, el("figcaption", text))

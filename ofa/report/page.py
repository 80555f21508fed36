"""The report of a run: one HTML page with everything inside, which opens with no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ofa.files import atomic_write, write_json
from ofa.report.load import STAGES, Run, load_run
from ofa.report.markup import Html, el, join
from ofa.report.sections import SECTIONS, Section
from ofa.report.summary import outdated, summary
from ofa.report.table import badge

INTRODUCTION = (
    "One supernet holds many networks that share weights. It was trained once; subnets of it were measured, predictors "
    "fitted to them, and for each device the best subnet within its budget was searched, cut out, tuned, pruned, "
    "quantized to 8-bit integers, exported to ONNX and measured in ONNX Runtime."
)


def write_report(run: str | Path) -> Path:
    """Write report.html and report/summary.json into the run folder; returns the path of the page.

    What the run has not made yet is named on the page, with the command that makes it.
    """
    loaded = load_run(run)
    path = loaded.folder / "report.html"
    atomic_write(path, page(loaded))
    write_json(loaded.folder / "report/summary.json", summary(loaded))
    return path


def page(run: Run) -> str:
    """The whole page as text."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{run.name} · ofa-nas report"),
        el("style", Html(Path(__file__).with_name("style.css").read_text())),
    )
    sections = [(section, section.html(run)) for section in SECTIONS]
    absent = [section for section, content in sections if content is None and section.stage]
    main = el("main", _header(run), *(content for _, content in sections), _absent(run, absent), _reproduce(run))
    return "<!DOCTYPE html>\n" + el("html", head, el("body", main), lang="en") + "\n"


def _header(run: Run) -> Html:
    verdicts = [el("li", el("b", device.title), " ", badge(device)) for device in run.devices]
    return el(
        "header",
        el("p", "ofa-nas report", class_="kicker"),
        el("h1", run.name),
        el("ul", *verdicts, class_="verdicts") if verdicts else None,
        el("p", INTRODUCTION),
        _stopped(run) if run.missing else None,
        el("p", outdated(run), class_="note") if run.outdated else None,
        _stages(run),
        _facts(run),
    )


def _stopped(run: Run) -> Html:
    at = f"training stands at epoch {run.log[-1]['epoch']} of {run.log[-1]['epochs']}; " if run.log else ""
    at = at if "train" in run.missing else ""
    text = f"Not finished: {at}missing {', '.join(run.missing)}. Continue with "
    return el("p", text, el("code", run.command(run.missing[0])), class_="note")


def _stages(run: Run) -> Html:
    """The stages in order, each with the time it took."""
    steps = [
        el("li", el("b", stage), _duration(run.timings.get(stage)), class_="done")
        if stage in run.done
        else el("li", el("b", stage), "missing", class_="open")
        for stage in STAGES
    ]
    return el("ol", *steps, el("li", el("b", "total"), _duration(sum(run.timings.values()))), class_="stages")


def _facts(run: Run) -> Html:
    data, versions = run.info.get("data") or {}, dict(run.info.get("versions") or {})
    splits = {"train": "training", "val": "validation", "test": "test"}
    images = [f"{count:,} {splits.get(split, split)}" for split, count in data.get("images", {}).items()]
    about = [str(data.get("name", "")), f"{len(data['classes'])} classes" if "classes" in data else ""]
    about.append(f"{', '.join(images)} images" if images else "")
    facts = {
        "Data": ", ".join(filter(None, about)),
        "Machine": _machine(run),
        "Commit": str(versions.pop("commit", "")),
        "Versions": _pairs(versions),
    }
    return el("dl", *(join(el("dt", key), el("dd", value or "not recorded")) for key, value in facts.items()))


def _absent(run: Run, sections: list[Section]) -> Html | None:
    """The sections that the run has not made yet, each with the command that makes it."""
    lines = (el("li", section.title, ": ", el("code", run.command(section.stage))) for section in sections)
    return el("section", el("h2", "Not there yet"), el("ul", *lines), id="absent") if sections else None


def _reproduce(run: Run) -> Html:
    lines = [run.command("run"), "", "# or stage by stage", *map(run.command, (*STAGES, "report"))]
    text = "The first line makes everything, and continues a run that was stopped; each stage is a command too."
    return el("section", el("h2", "Reproduce"), el("p", text), el("pre", "\n".join(lines)), id="reproduce")


def _machine(run: Run) -> str:
    """The machine of the latency measurements: names as they are, counts with their key."""
    card = (run.fit.get("latency") or {}).get("device") or {}
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in card.items())


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"

"""What a run folder tells the report.  Any file may be absent: the report shows what exists and names what is missing.

Accuracies are fractions 0..1, sizes bytes, times as their names say.  Optional keys are in [brackets].

    <stage>/config.json {"done": when, "after": {an earlier stage's folder: when that was done}}
    command.json        {"command", ["run": the folder that it wrote], ["experiment"],
                         ["devices": [name] (searched for)], ["versions": {package: version, "commit"}],
                         ["data": {"name", "classes": [name], "images": {"train", "val", "test"}}]}
    timings.json        {stage: seconds}
    train/log.jsonl     {"phase", "epoch" (over all phases, from 1), "epochs" (of all phases), "loss", "lr", "seconds",
                         "images_per_s", ["val_images"], "val": {"largest": accuracy, "smallest": ..., "random_0": ...},
                         ["collapsed": names of nets that lost most of what they had learned],
                         ["diverged": whether none is above chance at over twice the loss of guessing]}
    fit/fit.json        {"accuracy": {"model", "n_fit", "tau": {"mean", "std"}, "rmse": {"mean", "std"}, "n_heldout",
                                      ["repeats": random splits], ["curve": [{"n", "tau", "tau_std", "rmse"}]]},
                         "latency":  {"tau", "mape", "within_10_percent", "n_heldout", "shapes", "device": {...},
                                      ["slope", "intercept_ms": the correction of the sum over layers]}}
    fit/predictions.parquet                       kind ("accuracy" | "latency"), predicted, measured; held-out nets only
    search/<device>/<agent>/evaluations.parquet   a column per metric, violation (0: within the budget), front (bool)
    search/<device>/<agent>/result.json           {"seed", "evaluations", "objectives": {metric: +1 | -1}, "limits":
                         {metric: number}, ["measured": [metric]], "hypervolume",
                         "curve": [[evaluations, hypervolume]], "seconds"}
    search/<device>/chosen.json      {"device": {"name", "description"}, "agent", "arch", "predicted",
                         ["ranking": of int8 against float]}
    search/<device>/infeasible.json  {"device": {"name", "description"}, "reason"} in place of chosen.json
    export/supernet/ends.json        {"largest": test accuracy, "smallest": test accuracy}
    specialize/<device>/result.json  its presence is all that counts
    export/<device>/result.json      {"device", "arch", "spec": NetSpec, "models": {"float" | "pruned" | "int8":
                         {"accuracy", "macs", "params", "peak_memory_bytes", "file_bytes", "latency_ms",
                          "latency_spread_ms" (90th minus 10th percentile), "parity_max_abs"}}, "predicted", "met",
                         "budget": [{"limit", "value", "max", "met", ["machine": that measured a latency]}],
                         ["shipped": the model that the budget is of], ["proofs": {runtime: {"met", "rows":
                         [{"limit", "value", "max", "met", "source"}]}}, one of which being met meets the budget]}
    compress/<network>/<chain>/table.json    {"network", "steps": [{"step", "accuracy", "macs", "sparse_macs",
                         "bit_operations", "file_bytes", "peak_memory_bytes", "latency_ms" (null: not measured)}]}
    compress/<network>/<chain>/sensitivity.json   [{"layer", "weights", "level": share of zeros, "accuracy"}]
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ofa.errors import UserError
from ofa.files import read_json, read_jsonl

PROVEN = ("peak_memory_bytes", "weight_bytes")  # what proofs measure; their other rows are the budget's
STAGES = ("train", "measure", "fit", "search", "specialize", "export")


@dataclass(frozen=True, slots=True)
class Search:
    """What one agent found for one device."""

    agent: str
    result: dict[str, Any]
    evaluations: pd.DataFrame


@dataclass(frozen=True, slots=True)
class Device:
    """One budget, and how far the run has come for it; dicts are empty where a stage has not written yet.

    name: of its folders; title: what people call it; infeasible: why no network fits it, empty where one may.
    searches: under the limits and for the objectives of the one that chose; others: the agents of earlier ones.
    """

    name: str
    title: str
    description: str
    limits: dict[str, float]
    searches: tuple[Search, ...]
    others: tuple[str, ...]
    chosen: dict[str, Any]
    infeasible: str
    specialized: bool
    export: dict[str, Any]

    @property
    def arch(self) -> dict[str, Any]:
        """The chosen architecture."""
        return self.export.get("arch") or self.chosen.get("arch") or {}

    @property
    def budget(self) -> list[dict[str, Any]]:
        """Each limit beside what was measured, and, for each runtime that was proven, what it takes of the memories."""
        proofs = self.export.get("proofs", {}).items()
        proven = ({"runtime": name} | row for name, proof in proofs for row in proof["rows"] if row["limit"] in PROVEN)
        return [*self.export.get("budget", []), *proven]

    @property
    def predicted(self) -> dict[str, float]:
        """Metrics of the chosen architecture as the search saw them."""
        return self.export.get("predicted") or self.chosen.get("predicted") or {}


@dataclass(frozen=True, slots=True)
class Chain:
    """A network after each step of one `ofa-compress`, the network itself first, and what its layers bear.

    network: of its folder; source: the card or name that was given, as networks of several runs share a folder's name.
    """

    network: str
    source: str
    steps: tuple[dict[str, Any], ...]
    sensitivity: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The steps in order: "magnitude, kmeans"."""
        return ", ".join(step["step"] for step in self.steps[1:])


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the report shows."""

    folder: Path
    info: dict[str, Any]
    timings: dict[str, float]
    log: list[dict[str, Any]]
    ends: dict[str, float]
    fit: dict[str, Any]
    predictions: pd.DataFrame
    devices: tuple[Device, ...]
    chains: tuple[Chain, ...]
    done: frozenset[str]
    outdated: tuple[str, ...]

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.info.get("experiment") or self.folder.name)

    @property
    def missing(self) -> tuple[str, ...]:
        """Stages that have not finished, in order."""
        return tuple(stage for stage in STAGES if stage not in self.done)

    def command(self, stage: str) -> str:
        """The shell line that runs one stage of this run ("run" for all of them)."""
        options = str(self.info.get("command", "")).partition(" ")[2]
        made = self.info.get("run")  # where the command wrote; the folder may have been moved or copied since
        if not options or (made and Path(made).resolve() != self.folder.resolve()):
            others = [option for option in shlex.split(options) if not option.startswith("run=")]
            options = shlex.join([*others, f"run={_value(str(self.folder))}"])
        return f"ofa-{stage} {options}"


def _value(text: str) -> str:
    """A value as the command line's grammar reads it back: in quotes where it holds more than a plain path."""
    if re.fullmatch(r"[\w./@+-]+", text, re.ASCII):
        return text
    return "'" + text.replace("'", r"\'") + "'"


def load_run(folder: str | Path) -> Run:
    """Read a run folder; raises UserError where the folder is absent or one of its files is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist; start the run with ofa-run run={folder}")
    info = _json(folder / "command.json")
    parts = [path.name for stage in ("search", "export") for path in folder.glob(f"{stage}/*") if path.is_dir()]
    names = set(parts) - {"supernet"}
    names |= set(info.get("devices", ()))
    devices = [_device(folder, name) for name in names]
    log, fit = read_jsonl(folder / "train/log.jsonl"), _json(folder / "fit/fit.json")
    return Run(
        folder=folder,
        info=info,
        timings=_timings(_json(folder / "timings.json"), log),
        log=log,
        ends=_json(folder / "export/supernet/ends.json"),
        fit=fit,
        predictions=_parquet(folder / "fit/predictions.parquet", ["kind", "predicted", "measured"]),
        devices=tuple(sorted(devices, key=lambda device: (device.limits.get("macs", float("inf")), device.name))),
        chains=tuple(_chain(path.parent) for path in sorted(folder.glob("compress/*/*/table.json"))),
        done=_done(folder, devices),
        outdated=_outdated(folder),
    )


def _outdated(folder: Path) -> tuple[str, ...]:
    """Stages that were made from what has been made again since, in order."""
    made = {path.parent.relative_to(folder): _json(path) for s in STAGES for path in (folder / s).rglob("config.json")}
    done = {str(place): config.get("done") for place, config in made.items()}
    old = {
        place.parts[0]
        for place, config in made.items()
        if any(done.get(earlier, then) != then for earlier, then in config.get("after", {}).items())
    }
    for path in folder.glob("search/*/chosen.json"):
        for stage in ("specialize", "export"):
            card = _json(folder / stage / path.parent.name / "float.json")
            if card and card.get("arch") != _json(path).get("arch"):  # another search has chosen since
                old.add(stage)
    return tuple(stage for stage in STAGES if stage in old)


def _chain(folder: Path) -> Chain:
    scan = folder / "sensitivity.json"
    table = _json(folder / "table.json")
    source, steps = table.get("network", folder.parent.name), tuple(table["steps"])
    return Chain(folder.parent.name, source, steps, read_json(scan) if scan.exists() else [])


def _timings(seconds: dict[str, float], log: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each stage; those of training at least as long as its log, which counts killed sessions too."""
    logged = sum(line.get("seconds", 0.0) for line in log)
    return seconds | ({"train": max(seconds["train"], logged)} if "train" in seconds else {})


def _device(folder: Path, name: str) -> Device:
    chosen = _json(folder / "search" / name / "chosen.json")
    export = _json(folder / "export" / name / "result.json")
    results = sorted((folder / "search" / name).glob("*/result.json"))
    searches = tuple(
        Search(path.parent.name, _json(path), _parquet(path.parent / "evaluations.parquet", ["violation", "front"]))
        for path in results
    )
    infeasible = _json(folder / "search" / name / "infeasible.json")
    about = infeasible.get("device") or export.get("device") or chosen.get("device") or {}
    known = {search.agent: _asked(search) for search in searches}
    asked = known.get(chosen.get("agent", ""), known[searches[0].agent] if searches else {})
    alike = tuple(search for search in searches if known[search.agent] == asked)
    return Device(
        name=name,
        title=about.get("name", name),
        description=about.get("description", ""),
        limits=alike[0].result.get("limits", {}) if alike else {},
        searches=alike,
        others=tuple(agent for agent in known if known[agent] != asked),
        chosen=chosen,
        infeasible=infeasible.get("reason", ""),
        specialized=(folder / "specialize" / name / "result.json").exists(),
        export=export,
    )


def _asked(search: Search) -> dict[str, Any]:
    """What a search was asked for."""
    return {name: search.result.get(name, {}) for name in ("limits", "objectives")}


def _done(folder: Path, devices: list[Device]) -> frozenset[str]:
    """Stages that have finished; a later stage's result proves the earlier ones, even where their files are gone."""
    within = [device for device in devices if not device.infeasible]
    finished = {
        "train": (folder / "train/supernet.safetensors").exists(),
        "measure": "measure" in _json(folder / "timings.json"),
        "fit": (folder / "fit/fit.json").exists(),
        "search": bool(devices) and all(device.chosen for device in within),
        "specialize": bool(within) and all(device.specialized for device in within),
        "export": bool(within) and all(device.export for device in within),
    }
    last = max((i for i, stage in enumerate(STAGES) if finished[stage]), default=-1)
    return frozenset(STAGES[: last + 1])


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}; run its stage again")
    return value


def _parquet(path: Path, columns: list[str]) -> pd.DataFrame:
    """The table in `path`, an empty one with `columns` where it is absent."""
    if not path.exists():
        return pd.DataFrame(columns=columns)
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}); delete it and run its stage again") from None

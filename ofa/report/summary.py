"""The main table: what each device's net costs and how good it is; as rows, as JSON and in the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ofa.limits import side, sought
from ofa.report.load import Device, Run, load_run

MODELS = ("float", "pruned", "int8")
LABELS = {
    "accuracy": "accuracy",
    "accuracy_int8": "int8 accuracy",
    "macs": "MACs",
    "params": "parameters",
    "peak_memory_bytes": "peak memory",
    "file_bytes": "size on disk",
    "weight_bytes": "weights",
    "latency_ms": "latency",
    "energy_uj": "energy",
}
COLUMNS = ("accuracy", "macs", "params", "peak_memory_bytes", "file_bytes", "latency_ms")


def summary_table(run: str | Path | Run) -> list[dict[str, Any]]:
    """One row per device and model ("predicted", "float", "pruned", "int8"), plain numbers, None where not known.

    Keys: device, model, accuracy (fraction), macs, params, peak_memory_bytes, file_bytes (predicted: of the constants
    alone), latency_ms, latency_spread_ms, parity_max_abs (largest difference between ONNX Runtime and PyTorch).
    """
    run = run if isinstance(run, Run) else load_run(run)
    return [row for device in run.devices for row in device_rows(device)]


def device_rows(device: Device) -> list[dict[str, Any]]:
    """The rows of one device; a model that has not been exported has none."""
    predicted = {"file_bytes": device.predicted.get("weight_bytes")} | device.predicted
    models = {"predicted": predicted if device.predicted else {}} | device.export.get("models", {})
    keys = (*COLUMNS, "latency_spread_ms", "parity_max_abs")
    order = [name for name in ("predicted", *MODELS) if models.get(name)]
    order += [name for name in models if name not in order and models[name]]
    return [{"device": device.name, "model": name, **{key: models[name].get(key) for key in keys}} for name in order]


def summary(run: Run) -> dict[str, Any]:
    """The content of report/summary.json."""
    return {
        "experiment": run.name,
        "devices": [
            {
                "device": device.name,
                "description": device.description,
                "arch": device.arch,
                "models": device_rows(device),
                "budget": device.budget,
                "met": device.export.get("met"),
                "infeasible": device.infeasible or None,
            }
            for device in run.devices
        ],
        "timings": run.timings,
        "missing": list(run.missing),
        "outdated": list(run.outdated),
        "next": run.command(run.missing[0]) if run.missing else None,
    }


def print_summary(console: Console, run: str | Path | Run) -> None:
    """Print, for each device, the net, its rows and its budget; fits 100 columns."""
    run = run if isinstance(run, Run) else load_run(run)
    for device in run.devices:
        console.print(f"\n[bold]{escape(device.title)}[/]  {_verdict(device)}  [dim]{escape(device.description)}[/]")
        if device.infeasible:
            console.print(device.infeasible, markup=False, highlight=False)
            continue
        console.print(f"[dim]net[/]     {escape(arch_text(device.arch))}", highlight=False)
        for i, limit in enumerate(device.budget):
            console.print(f"[dim]{'' if i else 'budget':6}[/]  {_limit(limit)}", highlight=False)
        console.print(_table(device))
    if run.outdated:
        console.print(outdated(run), style="yellow", markup=False, highlight=False, soft_wrap=True)
    if run.missing:
        missing = f"not there yet: {', '.join(run.missing)}; next: {run.command(run.missing[0])}"
        console.print(missing, style="yellow", markup=False, highlight=False, soft_wrap=True)


def outdated(run: Run) -> str:
    """What is shown of stages that were made again since."""
    first = run.outdated[0]
    return (
        f"{', '.join(run.outdated)}: made before what they build on was made again; "
        f"next: {run.command(first)} restart=true"
    )


def cell(row: dict[str, Any], metric: str) -> str:
    """One cell of the main table; a latency comes with half the span of its middle 80 %."""
    spread = row["latency_spread_ms"] if metric == "latency_ms" else None
    return show(metric, row[metric], None if spread is None else spread / 2)


def show(metric: str, value: float | None, spread: float | None = None) -> str:
    """A value with its unit: 5.12 M, 64.3 kB (kB: 1,000 bytes), 0.812 ms, 93.06 %; – where it is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    factor, unit = scale(metric, value)
    if unit == "%":
        return f"{value / factor:.2f} %"
    digits = max(_digits(value / factor), _digits(spread / factor, 1) if spread else 0)
    around = f" ± {spread / factor:.{digits}f}" if spread is not None else ""
    return f"{value / factor:.{digits}f}{around} {unit}".rstrip()


def bound(metric: str, value: float) -> str:
    """A limit with its unit, in full: 3 M, 65.536 kB."""
    factor, unit = scale(metric, value)
    return f"{value / factor:.6g} {unit}".rstrip()


def scale(metric: str, largest: float) -> tuple[float, str]:
    """(what to divide by, the unit's name) for values of a metric up to `largest`."""
    if sought(metric) < 0:
        return 0.01, "%"
    for ending, unit in (("_ms", "ms"), ("_uj", "µJ")):
        if metric.endswith(ending):
            return 1.0, unit
    unit = "B" if metric.endswith("_bytes") else ""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(largest) >= factor:
            return factor, prefix + ("B" if unit else "")
    return 1.0, unit


def label(metric: str) -> str:
    """The reader's name of a metric."""
    return LABELS.get(metric, metric.replace("_", " "))


def arch_text(arch: dict[str, Any]) -> str:
    """An architecture in one line: "24 px, depth 2-3: k3e4 k5e6 / k3e3 k7e6 k3e4"; k kernel, e expand ratio."""
    if not arch:
        return "none chosen yet"
    depth, kernels, expands = (list(arch.get(key, ())) for key in ("depth", "kernel", "expand"))
    width = [w for w in arch.get("width", ()) if w != 1]
    head = f"{arch.get('resolution')} px" + (f", width {'-'.join(f'{w:g}' for w in width)}" if width else "")
    if not depth or sum(depth) != len(kernels) or len(kernels) != len(expands):
        lists = {name: arch.get(name) for name in ("depth", "kernel", "expand", "op")}
        return ", ".join(
            [head, *(f"{name} {'-'.join(f'{v:g}' for v in values)}" for name, values in lists.items() if values)]
        )
    blocks = [f"k{k}e{e:g}" for k, e in zip(kernels, expands, strict=True)]
    ends = [sum(depth[: i + 1]) for i in range(len(depth))]
    stages = [" ".join(blocks[end - d : end]) for d, end in zip(depth, ends, strict=True)]
    return f"{head}, depth {'-'.join(map(str, depth))}: {' / '.join(stages)}"


def _digits(value: float, significant: int = 3) -> int:
    """Decimals that show so many significant digits, none beyond the fourth decimal."""
    return min(4, max(0, significant - 1 - math.floor(math.log10(abs(value))))) if value else 0


def _verdict(device: Device) -> str:
    if device.infeasible:
        return "[bold red]no network fits[/]"
    met = device.export.get("met")
    if met is None:
        return "[yellow]not measured yet[/]"
    return "[bold green]budget met[/]" if met else "[bold red]budget NOT met[/]"


def _limit(limit: dict[str, Any]) -> str:
    """One limit in rich's markup."""
    name, value, largest = limit["limit"], show(limit["limit"], limit["value"]), bound(limit["limit"], limit["max"])
    answer = "[green]yes[/]" if limit["met"] else "[bold red]NO[/]"
    return f"{escape(label(name)):12} {value:>10} of {side(name)} {largest:>8}  {answer}{escape(machine(limit))}"


def machine(limit: dict[str, Any]) -> str:
    """Where a limited latency was measured, as its limit may be of another device, or which runtime takes so much."""
    if "runtime" in limit:
        return f" in {limit['runtime']}"
    return f" on {limit['machine']}" if "machine" in limit else ""


def _table(device: Device) -> Table:
    table = Table("model", box=box.SIMPLE_HEAD, pad_edge=False)
    for metric in COLUMNS:
        table.add_column(label(metric), justify="right", overflow="fold")
    for row in device_rows(device):
        table.add_row(escape(row["model"]), *(cell(row, metric) for metric in COLUMNS))
    return table


def ranking_text(found: dict[str, Any]) -> str:
    """What a search found of int8 against float: whether the ranking of networks changed."""
    change = (
        f"the best in int8 is number {found['float_rank_of_best_int8']} in float"
        if found["changed"]
        else "the best network is the same"
    )
    tau = f"{found['kendall_tau']:.3f} over {found['networks']} networks within the limits"
    return f"int8 against float: {change}; Kendall tau of the two rankings {tau}"

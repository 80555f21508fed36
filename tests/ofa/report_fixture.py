"""A made-up run folder with the files of a finished run, for the tests of the report.  Nothing in it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ofa.files import append_jsonl, atomic_write, read_json, write_json, write_parquet

LIMITS: dict[str, dict[str, float]] = {
    "stm32f746": {"macs": 3e6, "peak_memory_bytes": 64e3, "weight_bytes": 400e3, "latency_ms": 1.5},
    "phone": {"macs": 300e6, "latency_ms": 2.5},
}
OBJECTIVES = {"stm32f746": {"accuracy": -1, "macs": 1, "latency_ms": 1}, "phone": {"accuracy": -1, "macs": 1}}
METRICS = ("accuracy", "macs", "params", "peak_memory_bytes", "weight_bytes", "latency_ms")
AGENTS = {"random": 0.0, "evolution": 0.012, "optuna": 0.008}
PHASES = {"full": 6, "kernel": 4, "depth": 6, "expand": 8}


def make_run(
    folder: Path, stages: tuple[str, ...] = ("train", "measure", "fit", "search", "specialize", "export")
) -> Path:
    """Write the files of these stages into `folder`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "command.json", command())
    write_json(folder / "timings.json", {stage: 7.5 * 2**i for i, stage in enumerate(stages)})
    makers = {"train": _train, "fit": _fit, "search": _search, "specialize": _specialize, "export": _export}
    for stage in stages:
        if stage in makers:
            makers[stage](folder, rng)
    return folder


def command() -> dict[str, Any]:
    """The content of command.json."""
    return {
        "command": "ofa-run experiment=digits",
        "experiment": "digits",
        "data": {
            "name": "scikit-learn digits",
            "classes": list("0123456789"),
            "images": {"train": 1149, "val": 288, "test": 360},
        },
        "versions": {"python": "3.11.9", "torch": "2.14.1", "onnxruntime": "1.27.0", "commit": "1a2b3c4"},
    }


def export_models(scale: float) -> dict[str, dict[str, float]]:
    """The models of export/<device>/result.json; `scale` multiplies every cost."""
    return {
        "float": {"accuracy": 0.9667, "macs": int(2861234 * scale), "params": int(91234 * scale),
                  "peak_memory_bytes": int(61440 * scale), "file_bytes": int(371234 * scale),
                  "latency_ms": 0.8123 * scale, "latency_spread_ms": 0.0213, "parity_max_abs": 3.1e-6},
        "pruned": {"accuracy": 0.9639, "macs": int(2212345 * scale), "params": int(70123 * scale),
                   "peak_memory_bytes": int(55296 * scale), "file_bytes": int(287654 * scale),
                   "latency_ms": 0.7011 * scale, "latency_spread_ms": 0.0187, "parity_max_abs": 2.8e-6},
        "int8": {"accuracy": 0.9611, "macs": int(2212345 * scale), "params": int(70123 * scale),
                 "peak_memory_bytes": int(13824 * scale), "file_bytes": int(98765 * scale),
                 "latency_ms": 0.5522 * scale, "latency_spread_ms": 0.0311, "parity_max_abs": 0.21},
    }  # fmt: skip


def _train(folder: Path, rng: np.random.Generator) -> None:
    phases = [phase for phase, epochs in PHASES.items() for _ in range(epochs)]
    for i, phase in enumerate(phases, start=1):
        grown = 0.97 * (1 - np.exp(-i / 4))
        small = max(0.1, grown - 0.5 * np.exp(-max(i - 8, 0) / 5)) if i > 6 else 0.1
        between = {
            f"random_{k}": small + (grown - small) * w + rng.normal(0, 0.006) for k, w in enumerate((0.3, 0.6, 0.8))
        }
        values = {"largest": grown + rng.normal(0, 0.004), "smallest": small + rng.normal(0, 0.008), **between}
        loss = 0.55 + 1.8 * np.exp(-i / 5) + rng.normal(0, 0.02)
        append_jsonl(folder / "train/log.jsonl", {
            "phase": phase, "epoch": i, "epochs": len(phases), "loss": loss, "val_images": 288,
            "lr": 0.1, "seconds": 0.3, "images_per_s": 1500 + rng.normal(0, 40), "val": values})  # fmt: skip
    atomic_write(folder / "train/supernet.safetensors", b"weights")


def _fit(folder: Path, rng: np.random.Generator) -> None:
    curve = [
        {"n": n, "tau": 0.93 - 2.2 / n, "tau_std": 1.2 / n, "rmse": 0.004 + 0.1 / n} for n in (10, 20, 40, 80, 120)
    ]
    score = {"model": "ridge on one-hot genes", "n_fit": 120, "n_heldout": 40, "repeats": 5, "curve": curve}
    accuracy = {**score, "tau": {"mean": 0.912, "std": 0.013}, "rmse": {"mean": 0.0049, "std": 0.0007}}
    latency = {
        "tau": 0.956,
        "mape": 0.043,
        "within_10_percent": 0.95,
        "n_heldout": 40,
        "shapes": 118,
        "device": {"machine": "Example CPU", "cores": 2},
    }
    write_json(folder / "fit/fit.json", {"accuracy": accuracy, "latency": latency})
    pairs = []
    for kind, low, high, noise in (("accuracy", 0.88, 0.968, 0.004), ("latency", 0.3, 2.4, 0.05)):
        measured = rng.uniform(low, high, 40)
        predicted = measured + rng.normal(0, noise, 40)
        pairs.append(pd.DataFrame({"kind": kind, "predicted": predicted, "measured": measured}))
    write_parquet(folder / "fit/predictions.parquet", pd.concat(pairs))


def _search(folder: Path, rng: np.random.Generator) -> None:
    for device, limits in LIMITS.items():
        for agent, skill in AGENTS.items():
            tried = _tried(rng, skill, limits)
            curve = [[n, 0.5 + skill * 4 + 0.3 * (1 - np.exp(-n / (150 - 5000 * skill)))] for n in range(20, 301, 20)]
            write_parquet(folder / f"search/{device}/{agent}/evaluations.parquet", tried)
            write_json(folder / f"search/{device}/{agent}/result.json", {
                "seed": 0, "evaluations": len(tried), "limits": limits, "objectives": OBJECTIVES[device],
                "hypervolume": curve[-1][1], "curve": curve, "seconds": 3.2})  # fmt: skip
        best = tried[tried["front"]].sort_values("accuracy").iloc[-1][list(METRICS)].to_dict()
        chosen = {"device": about(device), "agent": agent, "arch": _arch(), "predicted": best}
        write_json(folder / f"search/{device}/chosen.json", chosen)


def _specialize(folder: Path, rng: np.random.Generator) -> None:
    for device in LIMITS:
        write_json(folder / f"specialize/{device}/result.json", {})


def _export(folder: Path, rng: np.random.Generator) -> None:
    for device, factor in (("stm32f746", 1.0), ("phone", 4.8)):
        models, limits = export_models(factor), LIMITS[device]
        values = {**models["int8"], "weight_bytes": models["int8"]["file_bytes"]}
        budget = [{"limit": k, "value": values[k], "max": m, "met": values[k] <= m} for k, m in limits.items()]
        budget[-1]["machine"] = "a laptop"
        row = {"limit": "peak_memory_bytes", "value": 61_000, "max": 64_000, "met": True, "source": "its arena"}
        macs = {"limit": "macs", "value": values["macs"], "max": limits["macs"], "met": True, "source": "exact"}
        proofs = {"tflm": {"met": True, "rows": [row, macs], "notes": []}} if device == "stm32f746" else {}
        predicted = read_json(folder / f"search/{device}/chosen.json")["predicted"]
        write_json(folder / f"export/{device}/result.json", {
            "device": about(device), "arch": _arch(), "spec": _spec(), "models": models, "predicted": predicted,
            "proofs": proofs, "budget": budget, "met": all(limit["met"] for limit in budget),
            "shipped": "int8"})  # fmt: skip


def compress(folder: Path) -> None:
    """What two chains of ofa-compress leave in the run folder, the first with a scan of its layers."""
    first = {"step": "before", "accuracy": 0.9667, "macs": 2_861_234, "sparse_macs": 2_861_234, "file_bytes": 371_234}
    rest = {"bit_operations": 2_929_903_616, "peak_memory_bytes": 61_440, "latency_ms": 0.812}
    before = first | rest
    sparse = before | {"step": "magnitude", "accuracy": 0.9611, "sparse_macs": 915_000, "file_bytes": 120_500}
    coded = sparse | {"step": "kmeans", "accuracy": 0.9583, "bit_operations": 366_237_952, "file_bytes": 37_123}
    narrow = before | {"step": "channels", "accuracy": 0.95, "macs": 1_400_000, "latency_ms": None}
    scan = [
        {"layer": layer, "weights": n, "level": level, "accuracy": accuracy}
        for layer, n, scores in (("units.0.conv", 144, (0.9, 0.3)), ("units.<8>", 4800, (0.96, 0.95)))
        for level, accuracy in zip((0.5, 0.9), scores, strict=True)
    ]
    network = folder / "compress/stm32f746-float"
    write_json(network / "magnitude-kmeans/table.json", {"network": "float.json", "steps": [before, sparse, coded]})
    write_json(network / "magnitude-kmeans/sensitivity.json", scan)
    write_json(network / "channels/table.json", {"network": "float.json", "steps": [before, narrow]})


def about(device: str) -> dict[str, Any]:
    """A device as its YAML describes it."""
    text = {"stm32f746": "STM32F746 microcontroller: 320 kB SRAM, 1 MB flash", "phone": "A phone-class budget"}
    limits = {name.removesuffix("_bytes"): f"{limit / 1e3:g}k" for name, limit in LIMITS[device].items()}
    return {"name": device.upper(), "description": text[device], "limits": limits}


def _tried(rng: np.random.Generator, skill: float, limits: dict[str, float]) -> pd.DataFrame:
    n = 300
    macs = np.exp(rng.uniform(np.log(0.6e6), np.log(14e6), n))
    accuracy = 0.97 - 0.12 * (macs / 0.6e6) ** -0.7 - np.abs(rng.normal(0, 0.02 - skill, n))
    costs = {
        "params": macs / 31,
        "peak_memory_bytes": macs / 48,
        "weight_bytes": macs / 8,
        "latency_ms": macs / 3.4e6 * rng.uniform(0.85, 1.2, n),
    }
    frame = pd.DataFrame({"kernel.0.0": 0, "accuracy": accuracy, "macs": macs.astype(int), **costs})
    over = np.sum([np.maximum(frame[name] / limit - 1, 0) for name, limit in limits.items()], axis=0)
    return frame.assign(violation=over, front=~_beaten(frame.assign(accuracy=frame["accuracy"] - over)) & (over == 0))


def _beaten(nets: pd.DataFrame) -> NDArray[np.bool_]:
    """Which nets are beaten by another one on accuracy, MACs and latency at once."""
    costs = nets.assign(accuracy=-nets["accuracy"])[["accuracy", "macs", "latency_ms"]].to_numpy(float)
    return np.asarray(np.any(np.all(costs[None] < costs[:, None], axis=2), axis=1))


def _arch() -> dict[str, Any]:
    return {
        "resolution": 32,
        "depth": [2, 3, 2],
        "kernel": [3, 5, 3, 7, 5, 3, 5],
        "expand": [3, 4, 4, 6, 3, 4, 6],
        "width": [1],
    }


def _spec() -> dict[str, Any]:
    units: list[dict[str, Any]] = [{"kind": "conv", "cin": 1, "cout": 16, "kernel": 3, "stride": 2, "act": "h_swish"}]
    cin = 16
    for stage, (depth, cout) in enumerate(zip((2, 3, 2), (24, 40, 80), strict=True)):
        for i in range(depth):
            k, e = ((3, 3), (5, 4), (7, 6))[(stage + i) % 3]
            block = {"kind": "mbconv", "cin": cin, "cout": cout, "kernel": k, "stride": 1 if i else 2, "mid": cin * e}
            more = {"se": 24 if stage else 0, "act": "h_swish" if stage else "relu", "expand": True, "shortcut": i > 0}
            units.append(block | more)
            cin = cout
    units += [{"kind": "conv", "cin": 80, "cout": 480, "act": "h_swish"}, {"kind": "pool", "cin": 480, "cout": 480}]
    units.append({"kind": "linear", "cin": 480, "cout": 10})
    return {"units": units, "resolution": 32, "in_channels": 1, "classes": 10}

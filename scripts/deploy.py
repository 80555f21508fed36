"""What ofa-export adds to the ONNX files: other runtimes, and the proof that a microcontroller's budget is met."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.limits import beyond
from scripts.cli import make
from scripts.onnx_files import SHIPPED
from scripts.parts import check_devices
from scripts.stage import plain

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.export.budget import Proof
    from ofa.static import StaticNet

AGREES = 0.8  # share of images of the same class, below which a file computes something else
SIMULATED_IMAGES = 100  # that a microcontroller's interpreter runs here


def deploy(
    cfg: DictConfig,
    device: str,
    limits: Mapping[str, float],
    budget: list[dict[str, Any]],
    shipped: Mapping[str, Any],
    folder: Path,
    data: ImageData,
) -> dict[str, Any]:
    """Files of the other runtimes and proofs for one device, printed, written beside the ONNX files and returned.

    Returns: runtimes (what each measured), proofs (by runtime), met.
    """
    import torch

    from ofa.export.budget import Board, is_met, prove
    from ofa.export.c import Pixels
    from ofa.export.c.build import CORE
    from ofa.export.card import rebuild

    net = rebuild(folder / f"{SHIPPED}.json")
    side, settings = net.spec.resolution, make(cfg.compress).quantization
    ranges = torch.cat(list(data.calibration("val", settings.images, side)))
    found = {name: _run(cfg, name, net, ranges, folder, data) for name in cfg.runtime}
    for name, row in found.items():
        print(f"{device}: {name} {row['sqnr_db']:.1f} dB, {row['file_bytes']:,} bytes in {row['file']}{_latency(row)}")
        if row["agreement"] < AGREES:
            alike = f"names the same class as PyTorch for {100 * row['agreement']:.0f} % of {row['images']} images"
            print(f"warning: {device}: {name} {alike}; do not ship {row['file']}")
    board = plain(cfg.device[device])
    described = Board(board.get("core", CORE), Pixels(data.mean, data.std))
    proofs, missing = prove(board.get("runtimes", []), net, ranges, limits, shipped, folder, described)
    for line in [line for proof in proofs for line in proof.lines()] + missing:
        print(f"{device}: {line}")
    met = is_met(proofs, budget)
    over = [beyond(row["limit"], row["value"], row["max"]) for row in budget if not row["met"]]
    over += [f"{p.runtime} {beyond(r.limit, r.value, r.max)}" for p in proofs for r in p.rows if not r.met]
    print(f"{device}: budget {'met' if met else 'exceeded: ' + ', '.join(over)}")
    return {"runtimes": found, "proofs": {proof.runtime: proof.to_dict() for proof in proofs}, "met": met}


def require_runtimes(cfg: DictConfig) -> None:
    """Raise UserError where what runtimes need is not installed, which an export would find after all other work."""
    from ofa.export.budget import require_provable
    from ofa.export.c.build import find
    from ofa.extras import require_packages

    check_devices(cfg)
    for device, settings in plain(cfg.device).items():
        require_provable(device, settings.get("runtimes", []))
    for name in cfg.runtime:
        runtime = make(cfg.runtime[name])
        require_packages(runtime)
        for compiler in getattr(sys.modules[type(runtime).__module__], "COMPILERS", ()):
            find(compiler)


def proofs_of(result: Mapping[str, Any]) -> list[Proof]:
    """The proofs that `deploy` left in a device's result."""
    from ofa.export.budget import Proof, Row

    def row(values: Mapping[str, Any]) -> Row:
        return Row(**{key: value for key, value in values.items() if key != "met"})

    found = result.get("proofs", {})
    return [Proof(name, tuple(map(row, p["rows"])), tuple(p["notes"])) for name, p in found.items()]


def _run(cfg: DictConfig, name: str, net: StaticNet, ranges: Any, folder: Path, data: ImageData) -> dict[str, Any]:
    """Export to one runtime and measure: parity with PyTorch, accuracy on the same images, size, latency."""
    from ofa.export.onnx import compare, run_torch
    from ofa.export.runtime import latencies, run
    from ofa.export.runtimes.c import threads_of
    from ofa.export.runtimes.tflm import Tflm

    runtime, verification = make(cfg.runtime[name]), make(cfg.export)
    file = folder / f"{name}{runtime.suffix}"
    runtime.export(net, file, ranges)
    simulated = isinstance(runtime, Tflm)  # whose time says nothing
    count = min(verification.images, SIMULATED_IMAGES) if simulated else verification.images
    images, labels = next(data.batches("test", count, net.spec.resolution, rng=None))
    logits = run(runtime, file, images, threads=verification.threads)
    reference = run_torch(net, images)
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        given = f"logits {logits.shape}, of which {np.isfinite(logits).sum()} are finite"
        raise UserError(f"{name} computed {given}, from {file}; the network has {reference.shape} finite ones")
    row = asdict(compare(logits, reference)) | runtime.describe(file)
    row |= {"accuracy_on_these": float((logits.argmax(1) == labels.numpy()).mean())}
    row |= {"file": file.name, "file_bytes": file.stat().st_size}
    if simulated:
        return row
    calls = {name: runtime.load(file, verification.threads)}
    image = images[:1].contiguous().numpy()
    threads = threads_of(runtime, verification.threads)
    timed = latencies(calls, image, threads=threads, repeats=verification.repeats)
    return row | {"latency": asdict(timed[name])}


def _latency(row: Mapping[str, Any]) -> str:
    if "latency" not in row:
        return f", arena {row['arena_bytes']:,} bytes" if "arena_bytes" in row else ""
    timed = row["latency"]
    spread = f"{timed['p10_ms']:.3f} to {timed['p90_ms']:.3f}"
    return f", {timed['median_ms']:.3f} ms ({spread}, n {timed['n']}, {timed['threads']} threads)"

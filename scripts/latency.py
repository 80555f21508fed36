"""ofa-latency: how long a network takes in each runtime here, or a space's operations on a device elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import make, stage_command
from scripts.stage import command_line

CARRIERS = ("ssh", "adb", "folder")


@stage_command("runtime", "measure")
def main(cfg: DictConfig) -> None:
    """Time model=<card> in runtime=[onnx,litert,...] with threads=1 on this machine, and print the figures.

    An ONNX file stands for the card beside it, whose network is exported anew to each runtime: onnx, which is also what
    no runtime means, is int8, and onnx_float is float.

    Or, with remote=ssh:<host>, adb:<serial> or folder:<path>, measure the operations of the space on another device,
    which needs Python and ONNX Runtime; writes latency.parquet for predictor=[default,latency_table] into a folder of
    this device alone, <run>/remote/ssh-<host> or adb-<serial>.  remote=folder:<path> writes the folder to carry there
    by hand, and reads it once it holds results.json.  Results of another space or number of threads are refused.
    """
    if cfg.remote is not None:
        _elsewhere(cfg, *_carrier(cfg.remote))
        return
    if cfg.model is None:
        raise UserError("model has no value; give model=<card>, or remote=ssh:<host> to measure another device")
    for name, row in _here(cfg).items():
        spread = f"{row['p10_ms']:.3f} to {row['p90_ms']:.3f}"
        figures = f"10 % to 90 %: {spread}; n {row['n']}; {row['threads']} threads"
        print(f"{name}: {row['median_ms']:.3f} ms ({figures})")


def _here(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Export to every runtime, with ranges of random images, and time all in turns."""
    from dataclasses import asdict

    import torch

    from ofa.export.card import card_of, rebuild
    from ofa.export.runtime import latencies
    from ofa.export.runtimes.onnx import Onnx

    net, threads = rebuild(card_of(cfg.model)), cfg.threads or cfg.measure.threads
    torch.manual_seed(cfg.seed)
    images = torch.randn(16, net.spec.in_channels, net.spec.resolution, net.spec.resolution)
    folder, calls = Path(cfg.run, "latency"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in cfg.runtime or ["onnx"]:
        runtime = make(cfg.runtime[name]) if cfg.runtime else Onnx()
        file = folder / f"{name}{runtime.suffix}"
        runtime.export(net, file, images)
        calls[name] = runtime.load(file, threads)
    timed = latencies(calls, images[:1].numpy(), threads=threads, repeats=101)
    return {name: asdict(row) for name, row in timed.items()}


def _carrier(remote: str) -> tuple[str, str]:
    kind, _, place = str(remote).partition(":")
    if kind not in CARRIERS or not place:
        raise UserError(f"remote={remote} is not known; give ssh:<host>, adb:<serial> or folder:<path>")
    return kind, place


def _elsewhere(cfg: DictConfig, kind: str, place: str) -> None:
    from predictors.remote import RESULTS, over_adb, over_ssh, read_table, require_jobs, write_jobs
    from predictors.shapes import space_shapes
    from scripts.parts import load_parts

    folder = Path(place) if kind == "folder" else Path(cfg.run, "remote", f"{kind}-{quote(place, safe='@')}")
    shapes, threads = space_shapes(load_parts(cfg)[1]), cfg.threads or cfg.measure.threads
    if (folder / RESULTS).exists():
        require_jobs(shapes, folder, threads=threads)
    else:
        count = write_jobs(shapes, folder, threads=threads)
        print(f"{count} operations in {folder}")
        if kind == "folder":
            print(
                f"carry it to the device, run there: python3 runner.py jobs.json {RESULTS}; "
                f"bring {RESULTS} back here, and give this command again"
            )
            return
        {"ssh": over_ssh, "adb": over_adb}[kind](place, folder)
    table, target = read_table(folder), folder / "latency.parquet"
    table.save(target)
    print(f"{len(table.times)} operations on {table.device['machine']}, {table.device['runtime']}: {target}")
    priced = ("predictor=[default,latency_table]", f"predictor.latency_ms.table={target}")
    print(f"next: {command_line('search', *priced)}")


if __name__ == "__main__":
    main()

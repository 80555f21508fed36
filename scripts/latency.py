"""ofa-latency: how long a network, or each operation of a space, takes here or on a device elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import make, stage_command
from scripts.stage import CONFIG, command_line

if TYPE_CHECKING:
    from torch import Tensor

    from ofa.export.runtime import Runtime

CARRIERS = ("ssh", "adb", "folder")


@stage_command("runtime", "measure")
def main(cfg: DictConfig) -> None:
    """Time model=<card> in runtime=[onnx,litert,...] with threads=1 on this machine, and print the figures.

    An ONNX file stands for the card beside it, whose network is exported anew to each runtime: onnx, which is also what
    no runtime means, is int8, and onnx_float is float.

    With remote=ssh:<host>, adb:<serial> or folder:<path>, in ONNX Runtime or LiteRT of another device, which needs
    Python and these.  remote=folder:<path> writes the folder to carry there by hand, and reads it once it holds
    results.json.  Results of another network, space or number of threads are refused.

    With remote and no model, measure the operations of the space there; writes latency.parquet for
    predictor=[default,latency_table] into a folder of this device alone, <run>/remote/ssh-<host> or adb-<serial>.
    """
    if cfg.model is not None:
        rows = _here(cfg) if cfg.remote is None else _there(cfg, *_carrier(cfg.remote))
        for name, row in rows.items():
            spread = f"{row['p10_ms']:.3f} to {row['p90_ms']:.3f}"
            figures = f"10 % to 90 %: {spread}; n {row['n']}; {row['threads']} threads"
            print(f"{name}: {row['median_ms']:.3f} ms ({figures})")
    elif cfg.remote is not None:
        _operations(cfg, *_carrier(cfg.remote))
    else:
        raise UserError("model has no value; give model=<card>, or remote=ssh:<host> to measure another device")


def _threads(cfg: DictConfig) -> int:
    return int(cfg.threads or cfg.measure.threads)


def _here(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Time in every runtime, in turns."""
    from dataclasses import asdict

    from ofa.export.runtime import latencies
    from ofa.export.runtimes.c import threads_of

    runtimes = _runtimes(cfg)
    files, images = _export(cfg, runtimes, Path(cfg.run, "latency"))
    calls = {name: runtime.load(files[name], _threads(cfg)) for name, runtime in runtimes.items()}
    timed = latencies(calls, images[:1].numpy(), threads=_threads(cfg), repeats=101)
    return {name: asdict(row) | {"threads": threads_of(runtimes[name], row.threads)} for name, row in timed.items()}


def _there(cfg: DictConfig, kind: str, place: str) -> dict[str, dict[str, Any]]:
    """The same by the files alone on another device; nothing where they have to be carried there first."""
    from ofa.export.latency import summary
    from ofa.export.runtimes.litert import LiteRT
    from ofa.export.runtimes.onnx import Onnx
    from predictors.remote import read_times, write_model_jobs

    runtimes, folder = _runtimes(cfg), _folder(cfg, kind, place, "network")
    if others := [name for name, runtime in runtimes.items() if not isinstance(runtime, (LiteRT, Onnx))]:
        raise UserError(
            f"runtime={others[0]} is not timed elsewhere; choose from onnx, litert, onnx_float, litert_float"
        )
    files, _ = _export(cfg, runtimes, Path(cfg.run, "latency"))
    write_model_jobs(list(files.values()), folder, threads=_threads(cfg))
    if not _bring(kind, place, folder):
        return {}
    device, times = read_times(folder)
    print(f"on {device['machine']}, {device['cores']} cores:")
    return {name: summary(times[path.name]) | {"threads": _threads(cfg)} for name, path in files.items()}


def _runtimes(cfg: DictConfig) -> dict[str, Runtime]:
    from ofa.export.runtimes.onnx import Onnx
    from ofa.export.runtimes.tflm import Tflm

    runtimes = {name: make(options) for name, options in cfg.runtime.items()} if cfg.runtime else {"onnx": Onnx()}
    if simulated := [name for name, runtime in runtimes.items() if isinstance(runtime, Tflm)]:
        raise UserError(f"runtime={simulated[0]} only simulates a microcontroller, whose time it cannot tell; omit it")
    return runtimes


def _export(cfg: DictConfig, runtimes: dict[str, Runtime], folder: Path) -> tuple[dict[str, Path], Tensor]:
    """The model's file for each runtime, with ranges of random images, and these."""
    import torch

    from ofa.export.card import card_of, rebuild

    net = rebuild(card_of(cfg.model))
    torch.manual_seed(cfg.seed)
    images = torch.randn(16, net.spec.in_channels, net.spec.resolution, net.spec.resolution)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}{runtime.suffix}" for name, runtime in runtimes.items()}
    for name, runtime in runtimes.items():
        runtime.export(net, files[name], images)
    return files, images


def _carrier(remote: str) -> tuple[str, str]:
    kind, _, place = str(remote).partition(":")
    if kind not in CARRIERS or not place:
        raise UserError(f"remote={remote} is not known; give ssh:<host>, adb:<serial> or folder:<path>")
    return kind, place


def _folder(cfg: DictConfig, kind: str, place: str, part: str = "") -> Path:
    """What is carried there and back: the folder that was named, or one of this device alone."""
    return Path(place) if kind == "folder" else Path(cfg.run, "remote", f"{kind}-{quote(place, safe='@')}", part)


def _bring(kind: str, place: str, folder: Path) -> bool:
    """Run the folder's jobs on the device and bring results.json; whether it is there, where a person carries it."""
    from predictors.remote import RESULTS, over_adb, over_ssh

    if kind != "folder":
        {"ssh": over_ssh, "adb": over_adb}[kind](place, folder)
    elif not (folder / RESULTS).exists():
        print(
            f"carry {folder} to the device, run there: python3 runner.py jobs.json {RESULTS}; "
            f"bring {RESULTS} back here, and give this command again"
        )
        return False
    return True


def _operations(cfg: DictConfig, kind: str, place: str) -> None:
    from predictors.remote import RESULTS, read_table, require_jobs, write_jobs
    from predictors.shapes import space_shapes
    from scripts.parts import load_parts

    folder, shapes = _folder(cfg, kind, place), space_shapes(load_parts(cfg)[1])
    if (folder / RESULTS).exists():
        require_jobs(shapes, folder, threads=_threads(cfg))
    else:
        count = write_jobs(shapes, folder, threads=_threads(cfg))
        print(f"{count} operations in {folder}")
        if not _bring(kind, place, folder):
            return
    table, target = read_table(folder), folder / "latency.parquet"
    table.save(target)
    print(f"{len(table.times)} operations on {table.device['machine']}, {table.device['runtime']}: {target}")
    priced = ["predictor=[default,latency_table]", f"predictor.latency_ms.table={target}"]
    if any(Path(cfg.run, "search").glob(f"*/*/{CONFIG}")):  # by other latencies
        priced.append("restart=true")
    print(f"next: {command_line('search', *priced)}")


if __name__ == "__main__":
    main()

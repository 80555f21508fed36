"""Latency of a device elsewhere, by files: a folder of models and jobs goes there, a JSON file of times comes back.

`write_jobs` makes the folder, `runner.py` in it measures on the device with Python and ONNX Runtime alone, `read_table`
turns its results.json into a LatencyTable.  `over_ssh` and `over_adb` carry both ways.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ofa.errors import UserError
from ofa.export.latency import summary
from ofa.files import atomic_write, read_json, write_json
from predictors.latency_table import GROUP, REPEATS, SECONDS_PER_SHAPE, LatencyTable
from predictors.shapes import Shape

PROTOCOL = 1
JOBS, RESULTS, RUNNER, SHAPES = "jobs.json", "results.json", "runner.py", "shapes.json"


def write_jobs(shapes: Iterable[Shape], folder: Path, *, threads: int = 1, batch: int = 1) -> int:
    """Write two models for each shape, the jobs and the runner into a folder; returns the number of shapes.

    Raises UserError for no shapes, and for less than one thread or image.
    """
    from predictors.graphs import graphs

    wanted = list(dict.fromkeys(shapes))
    if not wanted or threads < 1 or batch < 1:
        raise UserError(f"{len(wanted)} shapes, threads {threads}, batch {batch}: each must be at least 1")
    rows: list[dict[str, Any]] = []
    for i, shape in enumerate(wanted):
        less, more, n = graphs(shape, batch)
        names = [f"{i:05}_less.onnx", f"{i:05}_more.onnx"]
        for name, content in zip(names, (less, more), strict=True):
            atomic_write(folder / name, content)
        rows.append({"shape": shape._asdict(), "files": names, "n": n})
    groups = [[name for row in rows[i : i + GROUP] for name in row["files"]] for i in range(0, len(rows), GROUP)]
    write_json(folder / SHAPES, rows)
    options = {"threads": threads, "batch": batch, "repeats": REPEATS, "seconds": SECONDS_PER_SHAPE * GROUP}
    _finish(folder, groups, again=False, **options)
    return len(wanted)


def write_model_jobs(models: Sequence[Path], folder: Path, *, threads: int = 1, repeats: int = 51) -> None:
    """Write a folder that times whole models (.onnx, .tflite), all in turns, whenever its runner runs.

    Raises UserError for no models, and for a folder that `write_jobs` made.
    """
    if (folder / SHAPES).exists():
        raise UserError(f"{folder} measures the operations of a space; give the models a folder of their own")
    if not models:
        raise UserError("there is no model to measure; name at least one .onnx or .tflite file")
    for model in models:
        atomic_write(folder / model.name, model.read_bytes())
    options = {"threads": threads, "batch": 1, "repeats": repeats, "seconds": 60.0}
    _finish(folder, [[model.name for model in models]], again=True, **options)


def _finish(folder: Path, groups: list[list[str]], **options: float) -> None:
    """Beside the models write the jobs, whose id is a digest of all that is measured, and the self-contained script."""
    contents = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for group in groups for name in group]
    digest = hashlib.sha256(json.dumps([options, groups, contents]).encode()).hexdigest()
    write_json(folder / JOBS, {"protocol": PROTOCOL, "id": digest, **options, "groups": groups})
    atomic_write(folder / RUNNER, Path(__file__).with_name("device_runner.py").read_bytes())


def require_jobs(shapes: Iterable[Shape], folder: Path, *, threads: int = 1, batch: int = 1) -> None:
    """Raise UserError where a folder's jobs are other shapes, or for another number of threads or images."""
    jobs, wanted = read_json(folder / JOBS), set(shapes)
    found = {Shape(**row["shape"]) for row in read_json(folder / SHAPES)}
    if found != wanted or (jobs["threads"], jobs["batch"]) != (threads, batch):
        raise UserError(
            f"{folder} has results of {len(found)} operations, {len(found & wanted)} of the {len(wanted)} wanted, with "
            f"threads {jobs['threads']} and batch {jobs['batch']}, not {threads} and {batch}; give the options that it "
            f"was made with, or another place, or remove {folder / RESULTS} to measure again"
        )


def read_times(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The device's description, and milliseconds of each file (R,).

    Raises UserError for unfinished results and for those of other jobs than the folder's.
    """
    jobs, results = read_json(folder / JOBS), read_json(folder / RESULTS)
    try:
        if results["protocol"] != PROTOCOL:
            raise UserError(
                f"{folder / RESULTS} has protocol {results['protocol']}, not {PROTOCOL}; use its own runner.py"
            )
        if results["id"] != jobs["id"]:
            raise UserError(
                f"{folder / RESULTS} has times of the jobs {results['id'][:8]}, not of {folder / JOBS}, "
                f"{jobs['id'][:8]}; remove it and run runner.py on all files of this folder"
            )
        times = {name: np.array(row, dtype=np.float64) for name, row in results["times"].items()}
        for name, row in times.items():
            if row.ndim != 1 or not len(row) or not (np.isfinite(row) & (row >= 0)).all():
                raise ValueError(f"{name} has times {row.tolist()}, not some of 0 and more")
        device = dict(results["device"])
        if lacking := {"machine", "cores", "runtime"} - set(device):
            raise ValueError(f"its device has no {min(lacking)}")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / RESULTS} is no result of runner.py ({error}); run it again") from None
    missing = [name for group in jobs["groups"] for name in group if name not in times]
    if missing:
        raise UserError(f"{folder / RESULTS} lacks {len(missing)} models, {missing[0]} first; run runner.py again")
    for group in jobs["groups"]:
        if uneven := [name for name in group if len(times[name]) != len(times[group[0]])]:
            counts = f"{len(times[uneven[0]])} times of {uneven[0]}, {len(times[group[0]])} of {group[0]}"
            raise UserError(f"{folder / RESULTS} has {counts}, which were measured in turns; run runner.py again")
    return device, times


def read_table(folder: Path) -> LatencyTable:
    """The latency table that a device measured."""
    device, times = read_times(folder)
    table = {}
    for row in read_json(folder / SHAPES):
        less, more = (times[name] for name in row["files"])
        table[Shape(**row["shape"])] = summary(np.maximum(more - less, 0) / row["n"])
    return LatencyTable(device, table)


def over_ssh(host: str, folder: Path, *, place: str = "ofa-latency", python: str = "python3") -> None:
    """Copy the folder to a host, run it there, bring results.json back; needs ssh and tar here, sh and tar there."""
    there, program = shlex.quote(place), shlex.quote(python)
    packed = _call(["tar", "-C", str(folder), "-cf", "-", "."])
    _call(["ssh", host, f"mkdir -p {there} && tar -C {there} -xf -"], given=packed)
    _call(["ssh", host, f"cd {there} && {program} {RUNNER} {JOBS} {RESULTS}"])
    atomic_write(folder / RESULTS, _call(["ssh", host, f"cat {there}/{RESULTS}"]))


def over_adb(serial: str, folder: Path, *, place: str = "/data/local/tmp/ofa-latency", python: str = "python3") -> None:
    """The same for an Android device; python: its interpreter there, such as Termux' full path."""
    adb, there = ["adb", "-s", serial], shlex.quote(place)
    _call([*adb, "push", f"{folder}/.", place])
    _call([*adb, "shell", f"cd {there} && {shlex.quote(python)} {RUNNER} {JOBS} {RESULTS}"])
    _call([*adb, "pull", f"{place}/{RESULTS}", str(folder / RESULTS)])


def _call(line: list[str], given: bytes = b"") -> bytes:
    """What a command prints; raises UserError with its last words where it is absent or fails."""
    try:
        answer = subprocess.run(line, input=given, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{line[0]} is not installed; install it, or carry the folder there by hand") from None
    if answer.returncode:
        said = " ".join((answer.stderr or answer.stdout).decode(errors="replace").split())[-300:]
        raise UserError(f"{' '.join(line[:4])} failed with status {answer.returncode}: {said}")
    return answer.stdout

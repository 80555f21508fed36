"""Times models on a device that has Python and a runtime, and nothing of this project; copied there as runner.py.

    python3 runner.py jobs.json results.json        # Python 3.10 or newer

jobs.json: {"protocol": 1, "id", "threads", "batch", "repeats", "seconds", "again", "groups": [[file, ...], ...]}; the
models of a group (.onnx or .tflite, beside jobs.json) are timed in turns, so that a busy moment hits all alike.
results.json: {"protocol": 1, "id", "device": {...}, "times": {file: [milliseconds, ...]}}, written after every group;
what it holds of the same jobs (id) on the same device is not measured again, unless they say so.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROTOCOL = 1
WARMUP = 3


def main(jobs_file: Path, results_file: Path) -> None:
    """Time all groups that the results lack."""
    jobs = json.loads(jobs_file.read_text())
    if jobs.get("protocol") != PROTOCOL:
        sys.exit(f"jobs.json has protocol {jobs.get('protocol')}, this runner speaks {PROTOCOL}")
    device = describe(load(str(jobs_file.parent / jobs["groups"][0][0]), jobs["threads"], jobs["batch"])[1], jobs)
    move_aside(results_file, jobs["id"])
    times = {} if jobs["again"] else earlier(results_file, device)
    for number, group in enumerate(jobs["groups"]):
        if all(name in times for name in group):
            continue
        calls = [load(str(jobs_file.parent / name), jobs["threads"], jobs["batch"])[0] for name in group]
        times.update(zip(group, measure(calls, jobs["repeats"], jobs["seconds"]), strict=True))
        part = results_file.with_suffix(".part")
        part.write_text(json.dumps({"protocol": PROTOCOL, "id": jobs["id"], "device": device, "times": times}))
        part.replace(results_file)
        print(f"{number + 1} of {len(jobs['groups'])} groups", flush=True)


def move_aside(results_file: Path, jobs_id: str) -> None:
    """Keep the times of other jobs under another name."""
    if results_file.exists() and json.loads(results_file.read_text()).get("id") != jobs_id:
        results_file.replace(results_file.with_name(results_file.name + ".old"))


def earlier(results_file: Path, device: dict[str, Any]) -> dict[str, list[float]]:
    """Times that are there of these jobs; those of another device are refused."""
    if not results_file.exists():
        return {}
    found = json.loads(results_file.read_text())
    for key, value in device.items():
        if found["device"].get(key) != value:
            sys.exit(
                f"{results_file} holds for {key} {found['device'].get(key)}, not {value}; times of two devices do not "
                f"mix: remove {results_file} to measure all of them here"
            )
    return found["times"]


def measure(calls: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[list[float]]:
    """Milliseconds of each call, in turns; stops after `seconds`, but not before 5 turns."""
    for call in list(calls) * WARMUP:
        call()
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < repeats and (len(times[0]) < 5 or time.perf_counter() - start < seconds):
        for call, row in zip(calls, times, strict=True):
            call()
            begin = time.perf_counter()
            call()
            row.append(1e3 * (time.perf_counter() - begin))
    return times


def load(path: str, threads: int, batch: int) -> tuple[Callable[[], object], str]:
    """A call that runs a model on random images, and the name of its runtime."""
    return load_tflite(path, threads) if path.endswith(".tflite") else load_onnx(path, threads, batch)


def load_onnx(path: str, threads: int, batch: int) -> tuple[Callable[[], object], str]:
    """In ONNX Runtime on the CPU."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else batch for side in given.shape]
    feed = {given.name: numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32)}
    return lambda: session.run(None, feed), "onnxruntime " + onnxruntime.__version__


def load_tflite(path: str, threads: int) -> tuple[Callable[[], object], str]:
    """In LiteRT, or the older tflite_runtime."""
    import numpy

    try:
        from ai_edge_litert import interpreter as lite
    except ImportError:
        from tflite_runtime import interpreter as lite
    made = lite.Interpreter(model_path=path, num_threads=threads)
    made.allocate_tensors()
    given = made.get_input_details()[0]
    image = numpy.random.default_rng(0).standard_normal(given["shape"])
    scale = given["quantization"][0] or 1
    made.set_tensor(given["index"], (image / scale).clip(-128, 127).astype(given["dtype"]))
    return made.invoke, lite.__name__.split(".")[0]


def describe(runtime: str, jobs: dict[str, Any]) -> dict[str, Any]:
    """What the times hold for."""
    provider = "CPUExecutionProvider" if runtime.startswith("onnxruntime") else "XNNPACK"
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "runtime": runtime,
        "provider": provider,
        "threads": jobs["threads"],
        "batch": jobs["batch"],
    }


def processor() -> str:
    """The processor's name, from Linux where it tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 runner.py jobs.json results.json")
    main(Path(sys.argv[1]), Path(sys.argv[2]))

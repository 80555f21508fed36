"""Latency of exported networks in ONNX Runtime on this machine: warm-up, interleaved repeats, median and spread.

M models, R repeats.  Times are milliseconds of wall clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa import processor
from ofa.errors import UserError
from ofa.space import Genes, Space

Float = NDArray[np.float64]
PROVIDER = "CPUExecutionProvider"
ERRORS_ONLY = 3
BURST = 3


def device_card(threads: int = 1, batch: int = 1) -> dict[str, Any]:
    """What a latency holds for: the processor, its cores, the runtime, threads, images at once."""
    import onnxruntime

    return {
        "machine": processor.name(),
        "cores": os.cpu_count(),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "provider": PROVIDER,
        "threads": threads,
        "batch": batch,
    }


def require_threads(threads: int) -> None:
    """Raise UserError for fewer threads than one."""
    if threads < 1:
        raise UserError(f"threads {threads} must be at least 1")


def open_session(model: bytes | str | Path, threads: int = 1) -> Any:
    """An ONNX Runtime session of a model, its bytes or its file; raises UserError where it cannot be loaded."""
    import onnxruntime

    require_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = ERRORS_ONLY
    content = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(content, options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        name = "the model" if isinstance(model, bytes) else str(model)
        raise UserError(f"ONNX Runtime cannot load {name}: {str(error).splitlines()[0]}; export it again") from None


def measure_onnx(model: bytes | str | Path, **options: Any) -> dict[str, Any]:
    """Latency of one model: median_ms, p10_ms, p90_ms, n and the device card.  Options as in `measure_models`."""
    return measure_models({"model": model}, **options)["model"]


def measure_models(
    models: Mapping[str, bytes | str | Path],
    *,
    threads: int = 1,
    batch: int = 1,
    repeats: int = 51,
    warmup: int = 5,
    seconds: float = 60.0,
) -> dict[str, dict[str, Any]]:
    """Latency of several models, measured in turns, so that a busy moment of the machine hits all of them alike.

    seconds: stop after so long, but not before 5 times of each.  Returns: for each model what `measure_onnx` gives.
    """
    card = device_card(threads, batch)
    calls = [runner(open_session(model, threads), batch) for model in models.values()]
    times = interleaved(calls, repeats=repeats, warmup=warmup, seconds=seconds)
    return {name: summary(row) | card for name, row in zip(models, times, strict=True)}


def measure_networks(space: Space, genes: Genes, **options: Any) -> list[dict[str, Any]]:
    """Latency of architectures (N, G), with random weights, exported as they ship: a row for each, with its arch."""
    from ofa.export.graph import onnx_model
    from ofa.static import build

    archs = space.decode(genes)
    models = {}
    for i, arch in enumerate(archs):
        shape = (space.in_channels, arch.resolution, arch.resolution)
        models[str(i)] = onnx_model(build(space, arch).eval(), shape).SerializeToString()
    rows = measure_models(models, **options)
    return [{"arch": arch.to_dict()} | rows[str(i)] for i, arch in enumerate(archs)]


def runner(session: Any, batch: int = 1) -> Callable[[], object]:
    """A call that runs the session once, on the same random images."""
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else batch for size in given.shape]
    feed = {given.name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    return lambda: session.run(None, feed)


def interleaved(
    calls: Sequence[Callable[[], object]], *, repeats: int, warmup: int = 2, seconds: float = 60.0, fewest: int = 5
) -> Float:
    """Time each call in turns: (M, R) ms.  Stops after `seconds`, but not before `fewest` times of each.

    A turn is one call that is not timed, since the turn before left its own data in the caches, and `BURST` that are.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    turns: list[list[list[float]]] = []
    start = perf_counter()
    while len(turns) * BURST < repeats and (len(turns) * BURST < fewest or perf_counter() - start < seconds):
        turns.append([_burst(call) for call in calls])
    return np.concatenate(turns, axis=1) * 1e3


def summary(times: Float) -> dict[str, Any]:
    """Median, 10th and 90th percentile, n of one model's times (R,)."""
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {"median_ms": float(middle), "p10_ms": float(low), "p90_ms": float(high), "n": len(times)}


def _burst(call: Callable[[], object]) -> list[float]:
    call()
    marks = [perf_counter()]
    for _ in range(BURST):
        call()
        marks.append(perf_counter())
    return list(np.diff(marks))

"""Latency of single operations, measured in ONNX Runtime on this machine and kept as a Parquet file.

R times of an operation.  Times are milliseconds of wall clock for one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.export.latency import device_card, interleaved, open_session, runner, summary
from ofa.files import write_parquet
from predictors.shapes import Shape, code_of

GROUP = 16  # shapes measured in turns
REPEATS = 15  # times of each shape
SECONDS_PER_SHAPE = 0.01
SAVE_EVERY = 3.0  # seconds
TIMING = ("median_ms", "p10_ms", "p90_ms", "n")


@dataclass(frozen=True)
class LatencyTable:
    """Measured operations: for each shape median_ms, p10_ms, p90_ms and n; `device` says where they hold."""

    device: dict[str, Any]
    times: dict[Shape, dict[str, float]]

    def save(self, path: str | Path) -> None:
        """Write as Parquet with the device card inside, atomically."""
        rows = [shape._asdict() | timing for shape, timing in self.times.items()]
        frame = pd.DataFrame(rows, columns=[*Shape._fields, *TIMING])
        frame.attrs["device"] = self.device
        write_parquet(path, frame)

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read what `save` wrote; raises UserError for any other file."""
        try:
            frame = pd.read_parquet(path, page_checksum_verification=True)
            shapes = frame[list(Shape._fields)].itertuples(index=False)
            timings = frame[list(TIMING)].to_dict("records")
            times = {Shape(*shape): timing for shape, timing in zip(shapes, timings, strict=True)}
            if len(times) < len(frame):
                raise ValueError(f"{len(frame)} rows are of {len(times)} operations")
            if wrong := next((shape for shape, timing in times.items() if not 0 <= timing["median_ms"] < np.inf), None):
                raise ValueError(f"{wrong} has {times[wrong]['median_ms']} ms")
            for shape in times:
                code_of(shape)
            return LatencyTable(frame.attrs["device"], times)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; measure the latency table first") from None
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no latency table ({error}); delete it and measure again") from None

    def require(self, device: Mapping[str, Any]) -> None:
        """Raise UserError where this table holds for another device, runtime or number of threads."""
        for key in sorted(set(device) | set(self.device)):
            if device.get(key) != self.device.get(key):
                raise UserError(
                    f"the latency table holds for {key} {self.device.get(key)}, not {device.get(key)}; latencies of "
                    "two devices do not mix: name another file, or delete this one and measure again"
                )


def measure_table(
    shapes: Iterable[Shape],
    path: str | Path,
    *,
    threads: int = 1,
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Measure the shapes that the table at `path` lacks, 5 to 20 ms each, and return the whole table.

    The file is written every few seconds: after a kill the same call goes on from there.  progress(done, total) follows
    every group.  Raises UserError where the file holds for another device, runtime or number of threads.
    """
    wanted, device = list(dict.fromkeys(shapes)), device_card(threads, batch)
    table = LatencyTable.load(path) if Path(path).exists() else LatencyTable(device, {})
    table.require(device)
    times = dict(table.times)
    missing = [shape for shape in wanted if shape not in times]
    saved = monotonic()
    for start in range(0, len(missing), GROUP):
        group = missing[start : start + GROUP]
        times |= zip(group, map(summary, _measure(group, threads, batch)), strict=True)
        if monotonic() - saved > SAVE_EVERY:
            LatencyTable(device, times).save(path)
            saved = monotonic()
        progress(len(wanted) - len(missing) + start + len(group), len(wanted))
    LatencyTable(device, times).save(path)
    return LatencyTable(device, times)


def _measure(shapes: list[Shape], threads: int, batch: int) -> list[NDArray[np.float64]]:
    """Times of one operation of each shape, (R,) each: what n more of it cost, divided by n."""
    from predictors.graphs import graphs

    built = [graphs(shape, batch) for shape in shapes]
    calls = [runner(open_session(model, threads), batch) for less, more, _ in built for model in (less, more)]
    times = interleaved(calls, repeats=REPEATS, seconds=SECONDS_PER_SHAPE * len(shapes))
    return [np.maximum(times[2 * i + 1] - times[2 * i], 0) / n for i, (*_, n) in enumerate(built)]

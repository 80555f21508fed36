"""A profile of some training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, TRACED = 2, 3  # steps


@contextmanager
def profiled(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Trace some steps after the first two into <folder>/trace.json (for chrome://tracing or ui.perfetto.dev).

    Gives a function of what the Trainer reports, to be called after each step.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    steps = schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1)

    def save(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))

    with profile(activities=activities, schedule=steps, on_trace_ready=save) as profiler:
        yield lambda values: None if {"val", "rollback", "measured"} & set(values) else profiler.step()

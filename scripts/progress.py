"""Progress of one long loop: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS, SHARE = 15.0, 0.1  # a line is due when this much time or this share of the work has passed
LEAST_SECONDS = 1.0  # and no two lines are closer than this


class Progress:
    """Show how far a loop is:

        with Progress("train") as progress:
            for step in range(steps):
                progress.update(step + 1, steps, loss=loss, accuracy=accuracy)

    Values stay visible until they are given again.  An instance is itself a callback for a mapping with "step" and
    "steps".  `print` writes a line above the bar.
    """

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        self.console = console or Console()
        self.title = title
        self.values: dict[str, Any] = {}
        self._started = self._line_time = time.monotonic()
        self._line_done = 0.0
        self._first: float | None = None
        count, left = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        text, values = TextColumn("{task.description}"), TextColumn("{task.fields[values]}")
        quiet = not self.console.is_terminal
        self._bars = Bars(text, BarColumn(), count, left, values, console=self.console, disable=quiet)
        self._task = self._bars.add_task(title, total=None, values="")

    def __enter__(self) -> Self:
        """Start the bar, on a terminal."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        self._bars.stop()

    def __call__(self, values: Mapping[str, Any]) -> None:
        """Take a mapping with "step", "steps" and whatever is to be shown."""
        rest = {key: value for key, value in values.items() if key not in ("step", "steps")}
        self.update(values["step"], values["steps"], **rest)

    def update(self, done: float, total: float, **values: Any) -> None:
        """Say that `done` of `total` is done, and what the current loss or accuracy is."""
        self.values |= {key: value for key, value in values.items() if isinstance(value, (str, int, float))}
        if self._first is None:
            self._first = self._line_done = done
            self._bars.reset(self._task, completed=int(done), total=total)
        self._bars.update(self._task, completed=done, total=total, values=self._text())
        if not self.console.is_terminal and self._due(done, total):
            self._line_time, self._line_done = time.monotonic(), done
            self.print(f"{self.title} {done:g}/{total:g} {self._left(done, total)}  {self._text()}".rstrip())

    def print(self, text: str) -> None:
        """Write a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _due(self, done: float, total: float) -> bool:
        waited = time.monotonic() - self._line_time
        if done >= total:
            return self._line_done < total
        return waited >= SECONDS or (done - self._line_done >= SHARE * total and waited >= LEAST_SECONDS)

    def _left(self, done: float, total: float) -> str:
        passed, worked = time.monotonic() - self._started, done - (self._first or 0)
        if worked <= 0 or done >= total:
            return f"{passed:.0f} s"
        return f"{passed:.0f} s, {passed / worked * (total - done):.0f} s left"

    def _text(self) -> str:
        return "  ".join(f"{key} {_short(value)}" for key, value in self.values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

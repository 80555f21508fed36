"""Progress: lines elsewhere, a bar on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scripts import progress, train
from scripts.progress import Progress


def run(terminal: bool, steps: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress("train", console=console) as bar:
        for step in range(1, steps + 1):
            bar({"step": step, "steps": steps, "loss": 1 / step, "val": {"not": "shown"}})
        bar.print("a note [kept]")
    return out.getvalue()


def test_lines_are_few_and_end_with_the_last_step() -> None:
    lines = run(terminal=False).splitlines()
    assert lines == ["train 100/100 0 s  loss 0.01", "a note [kept]"]


def test_a_tenth_of_the_work_makes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    lines = run(terminal=False).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{n}/100" for n in (*range(11, 100, 10), 100)]
    assert "left" in lines[0] and "loss 0.09091" in lines[0]


def test_terminal_shows_a_bar_with_count_and_values() -> None:
    text = run(terminal=True)
    assert "100/100" in text and "loss 0.01" in text and "a note [kept]" in text and "━" in text


def test_nets_measured_before_a_phase_are_shown_until_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    out = io.StringIO()
    with Progress("train", console=Console(file=out, width=120)) as bar:
        for measured in ("1/64 nets", "2/64 nets"):
            train._show(bar, {"step": 5, "steps": 100, "phase": "attentive", "measured": measured}, "lower lr")
        train._show(bar, {"step": 6, "steps": 100, "phase": "attentive", "loss": 0.5}, "lower lr")
    first, second, step = out.getvalue().splitlines()
    assert "train 5/100" in first and "measured 1/64 nets" in first and "measured 2/64 nets" in second
    assert "measured" not in step and "loss 0.5" in step

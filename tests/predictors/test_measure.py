"""Subnets are chosen by a rule, measured once each, by any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ofa.data import ImageData, digits
from ofa.errors import UserError
from ofa.files import read_jsonl
from ofa.space import Genes, Space, load_space
from ofa.supernet import Supernet
from predictors import Accuracy, Macs
from predictors.choose import RULES, choose_on_front, choose_stratified, choose_subnets, measure_subnets
from predictors.measure import SubnetAccuracy, read_measured

SPACE = load_space("digits_mbv3")


def load(process: int) -> tuple[Supernet, ImageData]:
    torch.manual_seed(0)
    return Supernet(SPACE).eval(), digits()


def measurer(path: Path, **options: Any) -> SubnetAccuracy:
    return SubnetAccuracy(SPACE, load, path, images=40, calibration=40, **options)


def log_macs(genes: Genes) -> np.ndarray:
    return np.log(Macs(SPACE)(genes))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_different_networks_with_both_ends_and_the_same_again(rule: str) -> None:
    genes, values = measure_subnets(SPACE, log_macs, rule, 24, batch=5)
    assert len(np.unique(genes, axis=0)) == len(genes) == 24
    assert any((row == SPACE.largest()[0]).all() for row in genes)
    assert any((row == SPACE.smallest()[0]).all() for row in genes)
    np.testing.assert_array_equal(values, log_macs(genes))
    np.testing.assert_array_equal(measure_subnets(SPACE, log_macs, rule, 24, batch=5)[0], genes)
    with pytest.raises(UserError, match=r"measure.batch is 0; give 1 or more"):
        measure_subnets(SPACE, log_macs, rule, 24, batch=0)
    with pytest.raises(UserError, match=f"measure.choose 'best' is not known; choose from {', '.join(RULES)}"):
        measure_subnets(SPACE, log_macs, "best", 24)


@pytest.mark.parametrize("choose", [choose_subnets, choose_stratified])
def test_as_many_networks_as_the_space_holds_are_all_of_them(choose: Callable[[Space, int, int], Genes]) -> None:
    tiny = SPACE.restrict(resolution=1, width=1, depth=[1], expand=[2, 3])
    assert [len(choose(tiny, n, seed)) for seed in range(5) for n in (64, 100)] == [tiny.size] * 10
    branched = SPACE.restrict(resolution=1, width=1, kernel=1)
    assert len(choose(branched, branched.size, 0)) == branched.size  # some are drawn seldom


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_measures_all_of_a_space_that_is_smaller_than_asked(rule: str) -> None:
    few = SPACE.restrict(resolution=[12, 20], width=1, depth=1, kernel=1, expand=1)
    assert len(measure_subnets(few, log_macs, rule, 24)[0]) == few.size == 2


def test_strata_spread_the_macs_more_evenly_than_chance() -> None:
    def widest_gap(genes: Genes) -> float:
        return float(np.diff(np.sort(log_macs(genes))).max())

    gaps = [
        [widest_gap(choose(SPACE, 40, seed)) for seed in range(5)] for choose in (choose_stratified, choose_subnets)
    ]
    assert np.mean(gaps[0]) < 0.7 * np.mean(gaps[1])


def test_the_front_rule_asks_for_networks_that_promise_more_at_their_cost() -> None:
    rng = np.random.default_rng(0)
    depth = SPACE.columns("depth")

    def quality(genes: Genes) -> np.ndarray:
        return genes[:, depth].sum(1) + 0.1 * genes[:, 0]

    known = choose_subnets(SPACE, 30, 0)
    chosen = choose_on_front(Accuracy(SPACE, "gp").fit(known, quality(known)), known, 10, rng)
    assert not {row.tobytes() for row in chosen} & {row.tobytes() for row in known}
    chance = SPACE.sample(2000, rng)
    line = np.polyfit(log_macs(chance), quality(chance), 1)
    above = quality(chosen) - np.polyval(line, log_macs(chosen))
    assert above.mean() > np.std(quality(chance) - np.polyval(line, log_macs(chance)))


@pytest.mark.parametrize("wrong", [71.5, -0.1, float("nan")])
def test_an_accuracy_that_is_no_share_is_refused_with_its_row(wrong: float, tmp_path: Path) -> None:
    rows = [{"arch": arch.to_dict(), "accuracy": 0.7} for arch in SPACE.decode(choose_subnets(SPACE, 3, 0))]
    rows[1]["accuracy"] = wrong
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"log.jsonl, row 2: accuracy {wrong} must be a share, 0 to 1; mend the row"):
        read_measured(tmp_path / "log.jsonl", SPACE, "accuracy")


def test_a_network_is_measured_once_and_a_log_is_continued(tmp_path: Path) -> None:
    genes = choose_subnets(SPACE, 5, 0)
    with measurer(tmp_path / "log.jsonl") as measure:
        first = measure(genes[:3])
    seen: list[dict[str, Any]] = []
    with measurer(tmp_path / "log.jsonl", report=seen.append) as measure:
        both = measure(np.concatenate([genes, genes[:1]]))
    assert len(seen) == 2
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 5
    np.testing.assert_array_equal(both[:3], first)
    with pytest.raises(UserError, match="workers=0 must be at least 1"):
        measurer(tmp_path / "log.jsonl", workers=0)


def test_a_choice_in_batches_counts_out_of_all_its_networks(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"total": 14, "report": lambda values: told.append((values["step"], values["steps"]))}
    with measurer(tmp_path / "log.jsonl", **options) as measure:
        genes, _ = measure_subnets(SPACE, measure, "front", 14, batch=2)
    assert len(genes) == 14 and told == [(n, 14) for n in range(1, 15)]
    rows = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(rows[:12]))  # killed in the second batch
    with measurer(tmp_path / "log.jsonl", **options) as measure:
        measure_subnets(SPACE, measure, "front", 14, batch=2)
    assert told[14:] == [(13, 14), (14, 14)]


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    genes = choose_subnets(SPACE, 6, 0)
    logs = []
    for workers in (1, 2):
        with measurer(tmp_path / f"{workers}.jsonl", workers=workers) as measure:
            np.testing.assert_allclose(measure(genes), measure(genes))
            measure.settle(genes)
        logs.append((tmp_path / f"{workers}.jsonl").read_text())
    assert logs[0] == logs[1]
    found, accuracies = read_measured(tmp_path / "2.jsonl", SPACE, "accuracy")
    np.testing.assert_array_equal(found, genes)
    assert accuracies.shape == (6,)


def test_workers_end_with_the_process_that_started_them_and_lose_nothing(tmp_path: Path) -> None:
    log, code = tmp_path / "log.jsonl", "from tests.predictors.test_measure import slow; slow()"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"LOG": str(log)}, cwd=Path.cwd())
    end = time.monotonic() + 120
    while not read_jsonl(log) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_jsonl(log)
    assert rows
    assert len({json.dumps(row["arch"]) for row in rows}) == len(rows)
    while time.monotonic() < end and subprocess.run(["pgrep", "-f", f"LOG={log}"], check=False).returncode == 0:
        time.sleep(0.2)
    with measurer(log) as measure:
        measure(choose_subnets(SPACE, len(rows) + 1, 0))
    assert len(read_jsonl(log)) >= len(rows) + 1


def slow() -> None:
    """Measure many networks with two workers, until killed."""
    with measurer(Path(os.environ["LOG"]), workers=2) as measure:
        measure(choose_subnets(SPACE, 2000, 0))

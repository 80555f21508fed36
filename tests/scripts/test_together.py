"""Where processes that share a search meet: equal searches in one study, others in another."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import load_space
from predictors import Macs
from scripts.iterate import iterate
from scripts.search import check
from scripts.together import _place, together
from search.feasible import InfeasibleError


def configuration(run: Path, *options: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [f"run={run}", "mode=shared", *options])


def place(run: Path, *options: str, weights: bytes = b"1") -> tuple[str, str]:
    (run / "train").mkdir(parents=True, exist_ok=True)
    (run / "train/supernet.safetensors").write_bytes(weights)
    return _place(configuration(run, *options), "stm32l073", run / "search/stm32l073/shared")


def test_machines_meet_where_their_searches_are_equal(tmp_path: Path) -> None:
    storage = "agent.optuna.storage=postgresql+psycopg://user@host/name"
    first = place(tmp_path / "a", storage)
    assert first == place(tmp_path / "b", storage, "workers=2", "search.measurements=9", "agent.optuna.sampler=gp")
    assert first[0] == "postgresql+psycopg://user@host/name"
    others = {
        first[1],
        place(tmp_path / "a", weights=b"2")[1],
        place(tmp_path / "a", "device.stm32l073.limits.macs=1M")[1],
        place(tmp_path / "a", "objectives=[accuracy,params]")[1],
        place(tmp_path / "a", "measure.images=100")[1],
        place(tmp_path / "a", "seed=1")[1],
    }
    assert len(others) == 6


def test_without_a_storage_they_meet_in_a_journal_of_the_run(tmp_path: Path) -> None:
    assert place(tmp_path)[0] == f"journal:{tmp_path}/search/stm32l073/shared/study.journal"


def test_a_shared_search_needs_optuna(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mode=shared searches by Optuna; give agent=optuna"):
        check(configuration(tmp_path, "agent=[random,evolution]"))
    check(configuration(tmp_path, "agent=optuna"))
    with pytest.raises(UserError, match=r"mode=shared measures for one seed, not seeds=2"):
        check(configuration(tmp_path, "seeds=2"))


@pytest.mark.parametrize("mode", ["shared", "iterate"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("+device.stm32l073.limits.accuracy=0.9", r"limit accuracy is of a measured value; leave it out"),
        ("objectives=[macs,params]", r"mode=MODE measures accuracy, which objectives=\[macs,params\] leaves out"),
    ],
)
def test_a_measured_accuracy_is_sought_and_no_limit(tmp_path: Path, mode: str, option: str, words: str) -> None:
    options = (f"mode={mode}", option)
    with pytest.raises(UserError, match=words.replace("MODE", mode)):
        check(configuration(tmp_path, *options))
    check(configuration(tmp_path, *options, "mode=predict"))


def test_one_objective_needs_no_list_and_a_wrong_one_is_refused_before_any_work(tmp_path: Path) -> None:
    check(configuration(tmp_path, "objectives=accuracy"))
    with pytest.raises(UserError, match=r"objective macs=2 has no direction; 1 minimises, -1 maximises"):
        check(configuration(tmp_path, "search.objectives.macs=2"))
    with pytest.raises(UserError, match=r"a search needs an objective"):
        check(configuration(tmp_path, "objectives=[]"))


def test_limits_out_of_reach_are_answered_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, limits = load_space("digits_mbv3"), {"macs": 1}
    predictors = {"macs": Macs(space), "accuracy": Macs(space)}
    monkeypatch.setattr("scripts.together.fitted", lambda *_: predictors)
    cfg = configuration(tmp_path)
    cfg.device.stm32l073.limits = limits
    with pytest.raises(InfeasibleError):
        together(cfg, "stm32l073", space, tmp_path / "stage", [])
    with pytest.raises(InfeasibleError):
        iterate(cfg, predictors, limits, space, tmp_path / "stage", [])
    assert not (tmp_path / "stage").exists()

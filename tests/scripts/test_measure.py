"""What would be too little for ofa-fit, or wrong for ofa-search and ofa-export, is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ofa.errors import UserError
from scripts import measure, run, search


def composed(folder: Path, *options: str) -> DictConfig:
    """The configuration of a short run in a new folder."""
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [f"run={folder}/run", "schedule.epochs=0.01", *options])


@pytest.mark.parametrize("stage", [run.main, measure.main])
@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("measure.subnets=11", "measure.subnets=11 is too few for ofa-fit to learn from; give at least 12"),
        ("measure.int8_subnets=4", "measure.int8_subnets=4 is .* give at least 5, or 0 for none"),
        ("measure.latency_nets=2", "measure.latency_nets=2 is .* give at least 3"),
        (
            "space={resolution: [12], width: [1.0], stages: [{channels: 8, kernel: [3, 5], expand: [2, 3]}]}",
            "space digits_mbv3 holds 4 networks, too few for ofa-fit to learn from; give choices that make at least 12",
        ),
        ("objectives=[macs] predictor=[macs]", r"predictor=\[macs\] leaves out accuracy, which ofa-fit learns; add it"),
        ("+predictor.accuracy.colour=red", "predictors.accuracy.Accuracy has no option 'colour'"),
        ("predictor.accuracy.model=forest", "'forest' is not known; choose from auto, gp, ridge"),
        ("fit.share=1.5", "share=1.5 must be above 0 and below 1"),
        ("fit.repeats=0", "repeats=0 must be a whole number, 1 or more"),
        ("measure.batch=-1", "measure.batch=-1 must be a whole number, 1 or more"),
        ("measure.threads=0", "measure.threads=0 must be a whole number, 1 or more"),
        ("measure.images=0", "measure.images=0 must be a whole number, 1 or more, or null"),
    ],
)
def test_what_ofa_fit_cannot_learn_from_is_refused_before_any_work(
    tmp_path: Path, stage: Callable[..., None], option: str, rule: str
) -> None:
    with pytest.raises(UserError, match=rule):
        stage(composed(tmp_path, *([option] if "{" in option else option.split())))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [run.main, measure.main])
def test_accuracy_after_int8_without_quantized_subnets_is_refused_before_any_work(
    tmp_path: Path, stage: Callable[..., None]
) -> None:
    with pytest.raises(UserError, match=r"predictor=int8 learns from quantized subnets, .*; give at least 5"):
        stage(composed(tmp_path, "predictor=int8", "objectives=[accuracy_int8,macs]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("objectives=[acuracy]", "'acuracy' is not known; choose from macs, .*, accuracy"),
        ("objectives=[accuracy_int8,macs]", "'accuracy_int8' is not known; choose from"),
        ("+device.stm32f746.limits.colour=5", "'colour' is not known; choose from"),
        ("device.stm32f746.limits.macs=7apples", "limit macs=7apples is not understood"),
        ("search.evaluations=0", "search.evaluations=0 must be a whole number, 1 or more"),
        ("device.stm32f746.runtimes=tflm", r"device stm32f746 has runtimes=tflm; give a list of tflm, c, or \[\]"),
        ("device.stm32f746.runtimes=[arm]", r"has runtimes=\['arm'\]; give a list of tflm, c"),
        ("search.stall=2.5", "search.stall=2.5 must be a whole number, 1 or more, or null"),
        ("mode=iterat", "mode=iterat is not known"),
        ("agent.evolution.population=-1", "population -1 cannot breed; take at least 2"),
        ("+agent.evolution.colour=5", "colour"),
        ("compress.pruning=null", "Compression has pruning=None; leave that out"),
        ("ondevice.memory=plenty", "limit ondevice.memory=plenty is not understood"),
    ],
)
def test_ofa_run_refuses_what_a_later_stage_cannot_do_before_any_work(tmp_path: Path, option: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        run.main(composed(tmp_path, option))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("runtime", ["litert", "tflm", "executorch_float"])
def test_ofa_run_refuses_runtimes_that_are_not_installed_before_any_work(
    tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofa.extras.installed", lambda module: False)
    with pytest.raises(UserError, match=r'is not installed; install it with: pip install "ofa-nas\['):
        run.main(composed(tmp_path, f"runtime={runtime}"))
    assert not (tmp_path / "run").exists()


def test_ofa_run_refuses_limits_that_no_export_proves_before_any_work(tmp_path: Path) -> None:
    options = ("+predictor.heat._target_=predictors.Macs", "+device.stm32f746.limits.heat=5")
    with pytest.raises(UserError, match="ofa-export cannot prove the limits of device stm32f746: 'heat'"):
        run.main(composed(tmp_path, *options))
    assert not (tmp_path / "run").exists()


def test_the_search_knows_the_names_of_all_limits_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'colour' is not known; choose from"):
        search.main(composed(tmp_path, "+device.stm32f746.limits.colour=5"))

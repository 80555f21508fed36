"""ofa-measure: what would be too little for ofa-fit is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from ofa.errors import UserError
from scripts import measure, run


@pytest.mark.parametrize("stage", [run.main, measure.main])
@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("measure.subnets=11", "measure.subnets=11 is too few for ofa-fit to learn from; give at least 12"),
        ("measure.int8_subnets=4", "measure.int8_subnets=4 is .* give at least 5, or 0 for none"),
        ("measure.latency_nets=2", "measure.latency_nets=2 is .* give at least 3"),
    ],
)
def test_too_few_networks_to_learn_from_are_refused_before_any_work(
    tmp_path: Path, stage: Callable[..., None], option: str, rule: str
) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", [f"run={tmp_path}/run", "schedule.epochs=0.01", option])
    with pytest.raises(UserError, match=rule):
        stage(cfg)
    assert not (tmp_path / "run").exists()

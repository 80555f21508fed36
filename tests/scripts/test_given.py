"""ofa-export network=: a device's limits as people write them, and those that no export can prove."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.export import main

PLACE = "prove/digits_mbv3-smallest/server"


def config(run: Path, limit: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", [f"run={run}", "network=digits_mbv3/smallest", "device=[server]"])
    name, _, value = limit.partition("=")
    cfg.device.server.limits = {name: value}
    return cfg


def test_a_limit_may_leave_out_its_unit(tmp_path: Path) -> None:
    main(config(tmp_path, "peak_memory=320KB"))
    result = json.loads((tmp_path / PLACE / "result.json").read_text())
    assert result["device"]["limits"] == {"peak_memory_bytes": 320_000}
    assert [(row["limit"], row["max"], row["met"]) for row in result["budget"]] == [
        ("peak_memory_bytes", 320_000, True)
    ]


@pytest.mark.parametrize("limit", ["energy_uj=50", "accuracy=0.5"])
def test_a_limit_that_is_not_measured_is_refused_before_any_work(tmp_path: Path, limit: str) -> None:
    name = limit.partition("=")[0]
    with pytest.raises(UserError, match=f"limits of device server: '{name}' is not known; choose from macs, params, w"):
        main(config(tmp_path, limit))
    assert not (tmp_path / PLACE).exists()

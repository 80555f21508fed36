"""ofa-export network=: a device's limits as people write them, and those that no export can prove."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.export import budget
from ofa.export.card import Card, save_net
from ofa.space import Arch, load_space
from predictors.energy import Energy
from scripts.export import main
from tests.ofa.nets import SPEC, random_net

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


def test_a_limit_of_energy_is_held_to_the_estimate_that_the_search_goes_by(tmp_path: Path) -> None:
    cfg = config(tmp_path, "energy=1mJ")
    OmegaConf.update(cfg, "predictor.energy_uj", {"weights": "sram"}, force_add=True)
    main(cfg)
    (row,) = json.loads((tmp_path / PLACE / "result.json").read_text())["budget"]
    space = load_space("digits_mbv3")
    assert row["value"] == pytest.approx(Energy(space, weights="sram")(space.smallest())[0])
    assert row["value"] < 0.8 * Energy(space)(space.smallest())[0]
    assert (row["max"], row["met"]) == (1000, True)


class Altered:
    """A runtime that multiplies PyTorch's logits by a factor."""

    suffix = ".altered"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        self.net = net
        path.write_bytes(b"-")

    def load(self, path: Path, threads: int = 1) -> Any:
        return lambda images: self.factor * self.net(torch.from_numpy(images)).detach().numpy()

    def describe(self, path: Path) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("factor", "told"),
    [(1.0, ""), (-1.0, "mine names the same class as PyTorch for 0 % of"), (float("nan"), "of which 0 are finite")],
)
def test_a_runtime_that_computes_something_else_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, told: str
) -> None:
    cfg = config(tmp_path, "macs=1G")
    cfg.runtime = {"mine": {"_target_": f"{__name__}.Altered", "factor": factor}}
    if factor != factor:
        with pytest.raises(UserError, match=told):
            main(cfg)
        return
    main(cfg)
    out = capsys.readouterr().out
    assert told in out and ("warning: " in out) == bool(told)


def test_a_network_of_other_channels_is_answered_in_one_line(tmp_path: Path) -> None:
    cfg = config(tmp_path, "macs=1G")
    spec = replace(SPEC, in_channels=3, units=(replace(SPEC.units[0], cin=3), *SPEC.units[1:]))
    save_net(tmp_path / "net.json", random_net(spec), Card(Arch(16), {}, spec, {}, {}, 0))
    cfg.network = str(tmp_path / "net.json")
    with pytest.raises(UserError, match=r"net\.json takes 3 channels, the images of digits have 1; give its own data"):
        main(cfg)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"runtime": ["c"]}, "device server has no option 'runtime'; choose from name, description, limits, runtimes"),
        ({"runtimes": "tflm"}, "device server has runtimes=tflm; give a list of tflm, c"),
        ({"runtimes": ["tflm"]}, r"nothing here can prove device server in tflm; pip install \"ofa-nas\[tflite\]\".*"),
    ],
)
def test_a_device_that_could_not_be_proven_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], answer: str
) -> None:
    monkeypatch.setattr(budget, "installed", lambda module: module != "tflite_micro")
    cfg = config(tmp_path, "macs=1G")
    OmegaConf.update(cfg, "device.server", options, force_add=True)
    with pytest.raises(UserError, match=answer):
        main(cfg)
    assert not (tmp_path / PLACE).exists()


@pytest.mark.parametrize("limit", ["heat=50", "accuracy=0.5"])
def test_a_limit_that_is_not_measured_is_refused_before_any_work(tmp_path: Path, limit: str) -> None:
    name = limit.partition("=")[0]
    with pytest.raises(UserError, match=f"limits of device server: '{name}' is not known; choose from macs, params, w"):
        main(config(tmp_path, limit))
    assert not (tmp_path / PLACE).exists()

"""ofa-latency: which network a card or an ONNX file names, and what is said of its times."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ofa.data import digits
from ofa.errors import UserError
from ofa.export.card import Card, save_net
from ofa.space import Arch
from scripts.latency import main
from tests.ofa.nets import random_net


def config(run: Path, model: Path, *more: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [f"run={run}", f"model={model}", *more])


def test_an_onnx_file_stands_for_the_card_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = random_net()
    save_net(tmp_path / "net.json", net, Card(Arch(net.spec.resolution), {}, net.spec, {}, digits().describe(), 0))
    (tmp_path / "net.onnx").touch()
    for model in ("net.json", "net.onnx"):
        main(config(tmp_path, tmp_path / model))
        assert capsys.readouterr().out.startswith("onnx: ")


def test_an_onnx_file_without_a_card_is_explained(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    with pytest.raises(UserError, match=r"net\.json does not exist; a model needs the card"):
        main(config(tmp_path, tmp_path / "net.onnx"))


def test_plain_c_is_said_to_run_on_one_thread_and_a_simulation_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = random_net()
    save_net(tmp_path / "net.json", net, Card(Arch(net.spec.resolution), {}, net.spec, {}, digits().describe(), 0))
    main(config(tmp_path, tmp_path / "net.json", "runtime=[onnx,c]", "threads=2"))
    onnx, c = capsys.readouterr().out.splitlines()
    assert onnx.endswith("; 2 threads)") and c.endswith("; 1 threads)")
    with pytest.raises(UserError, match="runtime=tflm only simulates a microcontroller"):
        main(config(tmp_path, tmp_path / "net.json", "runtime=[onnx,tflm]"))

"""ofa-specialize and ofa-export: limits on memory and latency are answered in time, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

from ofa.data import Augment, digits
from ofa.errors import UserError
from ofa.export.card import rebuild
from ofa.files import read_json
from ofa.finetune import finetune
from ofa.space import load_space
from ofa.spec import NetSpec
from ofa.static import build
from ofa.supernet import Supernet
from ofa.training.trained import SUPERNET
from ofa.weights import save_tensors
from scripts.compress import main as compress
from scripts.distill import main as distill
from scripts.export import main as export
from scripts.parts import SEARCH, TRAIN, finetuning
from scripts.specialize import main
from scripts.stage import open_stage
from tests.conftest import ROOT
from tests.second_device import second_device


@dataclass(frozen=True)
class Inverted(Augment):
    """An augmentation of one's own."""

    seen: ClassVar[list[int]] = []

    def pixels(self, x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        self.seen.append(len(x))
        return 255 - x


SHORT = (
    "device=stm32f746",
    "compress.finetuning.epochs=0.1",
    "ondevice.finetuning.epochs=0.1",
    "ondevice.batches=1",
)


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an untrained supernet and the smallest network as what a search chose."""
    cfg, space = compose("config", [f"run={tmp_path}", *SHORT]), load_space("digits_mbv3")
    with open_stage(cfg, "train", TRAIN) as stage:
        torch.manual_seed(0)
        save_tensors(stage.folder / SUPERNET, Supernet(space).state_dict())
    for device, genes in (("stm32f746", space.smallest()), ("stm32l073", space.largest())):
        with open_stage(cfg, f"search/{device}", SEARCH) as stage:
            chosen = {"arch": space.decode(genes)[0].to_dict()}
            (stage.folder / "chosen.json").write_text(json.dumps(chosen))
    return tmp_path


def specialize(run: Path, *options: str) -> None:
    main(compose("config", [f"run={run}", *SHORT, *options]))


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("ondevice.memory=plenty", "limit ondevice.memory=plenty is not understood"),
        ("ondevice.memory=0.1KB", r"no update fits 100 bytes; .* needs 120 bytes: raise ondevice\.memory"),
        ("ondevice={memory: 16KB, method: all}", "ondevice.method 'all' is not known"),
        ("ondevice={memory: 16KB, images: 1.5}", "OnDevice has images=1.5; give a whole number"),
        ("ondevice={memory: 16KB, finetuning: {lr: null}}", "Finetuning has lr=None; give a number"),
    ],
)
def test_a_mistake_is_answered_before_any_training_and_leaves_nothing(run: Path, option: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        specialize(run, option)
    assert not (run / "specialize").exists()
    specialize(run)


def test_a_limit_that_a_later_device_cannot_meet_is_answered_before_the_first_is_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: NetSpec, options: dict[str, Any]) -> None:
        if spec.resolution == 20:
            raise UserError("too little for the largest")

    monkeypatch.setattr("scripts.specialize.require_room", refuse)
    with pytest.raises(UserError, match="too little for the largest"):
        specialize(run, "device=[stm32f746,stm32l073]", "ondevice.memory=16KB")
    assert not (run / "specialize").exists()


def test_another_limit_trains_only_what_depends_on_it(run: Path) -> None:
    folder = run / "specialize/stm32f746"
    specialize(run)
    trained = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    limits = (16_000, 8_000, 8_000)
    written = []
    for limit in limits:
        specialize(run, f"ondevice.memory={limit}")
        plan = read_json(folder / "plan.json")
        assert plan["memory"]["total"] <= plan["limit"] == limit
        written.append((folder / "ondevice.safetensors").stat().st_mtime_ns)
    assert written[0] < written[1] == written[2], "the same options are not trained again"
    assert {path.name for path in trained} == {"float.safetensors", "pruned.safetensors"}
    assert trained == {path: path.stat().st_mtime_ns for path in trained}


def test_no_state_of_a_fine_tuning_is_left_behind(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)
    specialize(run, "finetune.epochs=0.1")
    assert not list(run.rglob("*-state.safetensors"))


def test_a_fine_tuning_augments_as_training_did_but_for_what_it_is_given(run: Path) -> None:
    specialize(run, "finetune.epochs=0.1", "finetune.augment.erase=0.5")
    card = read_json(run / "specialize/stm32f746/float.json")
    assert card["training"]["finetuning"][0]["augment"] == {
        "operations": 0, "magnitude": 9, "erase": 0.5, "mixup": 0.0, "cutmix": 0.0,
    }  # fmt: skip
    assert finetuning(compose("config", ["augment.mixup=0.1"])).augment == Augment(mixup=0.1)
    assert finetuning(compose("config", ["augment.mixup=0.1", "finetune.augment=null"])).augment == Augment(mixup=0.1)
    own = compose("config", ["augment.mixup=0.1", "finetune.augment.erase=0.5", "finetune.epochs=0.1"])
    assert finetuning(own).augment == Augment(erase=0.5, mixup=0.1)
    own.augment = {"_target_": f"{__name__}.Inverted", "erase": 0.1}
    settings, space = finetuning(own), load_space("digits_mbv3")
    assert settings.augment == Inverted(erase=0.5)
    finetune(build(space, space.decode(space.smallest())[0]), digits(), settings)
    assert sum(Inverted.seen) >= 100
    own.finetune.augment = "randaugment"
    with pytest.raises(UserError, match="no record of conf/augment"):
        finetuning(own)


def test_a_fine_tuning_that_ruins_a_network_is_told_with_its_setting(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, device = ("finetune.epochs=6", "compress.pruning.macs_ratio=1"), "ondevice.memory=16KB"
    for options, warning in (
        ([device], ""),
        ([device, "ondevice.finetuning.lr=1e3"], r"on-device network fell .*; lower ondevice.finetuning.lr"),
        (["restart=true", "compress.finetuning.lr=1e3"], r"pruned network fell .*; lower compress.finetuning.lr, or"),
    ):
        specialize(run, *learn, *options)
        out = capsys.readouterr().out
        assert re.search(f"warning: the {warning}", out) if warning else "warning" not in out


def test_a_latency_searched_in_float_and_judged_in_int8_is_told_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, own = run / "search/stm32f746/chosen.json", ("device.stm32f746.runtimes=[]", "export.images=10")
    device = {"name": "STM32F746", "limits": {"latency_ms": 500.0}}
    path.write_text(json.dumps(read_json(path) | {"device": device, "predicted": {"latency_ms": 0.25}}))
    specialize(run, *own)
    export(compose("config", [f"run={run}", *SHORT, *own]))
    models = read_json(run / "export/stm32f746/result.json")["models"]
    int8, measured = (f"{models[name]['latency_ms']:.3f}" for name in ("int8", "float"))
    told = f"latency_ms {int8} is of int8; the search went by the float network's, predicted 0.250, measured {measured}"
    assert told in capsys.readouterr().out


def test_a_latency_searched_for_another_device_and_judged_here_is_told_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ("predictor=[default,latency_table]", "predictor.latency_ms.table=board.parquet")
    own = ("device.stm32f746.runtimes=[]", "export.images=10", *table)
    chosen = read_json(run / "search/stm32f746/chosen.json")
    chosen |= {"device": {"name": "STM32F746", "limits": {"latency_ms": 500.0}}, "predicted": {"latency_ms": 3.25}}
    searched = compose("config", [f"run={run}", *SHORT, *table, "restart=true"])
    with open_stage(searched, "search/stm32f746", SEARCH) as stage:
        (stage.folder / "chosen.json").write_text(json.dumps(chosen))
    specialize(run, *own)
    export(compose("config", [f"run={run}", *SHORT, *own]))
    judged = read_json(run / "export/stm32f746/result.json")["models"]["int8"]["latency_ms"]
    told = f"latency_ms {judged:.3f} is of int8 on this machine; the search went by another device's, predicted 3.250 "
    assert told + "(predictors.latency.latency_from_table)" in capsys.readouterr().out


def test_networks_learn_on_train_device(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[torch.device] = []

    def tuned(net: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places.append(next(net.parameters()).device)
        return finetune(net, *args, **kwargs)

    monkeypatch.setattr("ofa.finetune.finetune", tuned)
    card = run / "specialize/stm32f746/float.json"
    with second_device() as gpu:
        monkeypatch.setattr("ofa.parallel.found_device", lambda *given: gpu)
        specialize(run, "finetune.epochs=0.1", "ondevice.memory=16KB")
        options = (f"run={run}", "student=digits_mbv3/smallest", f"teacher={card}", "finetune.epochs=0.1")
        distill(compose("config", [*options]))
        step = ("step=qat", "step.qat.finetuning.epochs=0.1")
        compress(compose("config", [f"run={run}", f"network={card}", *step]))
    assert places == [gpu] * 5, "float, pruned, on the device, the student, the quantized"
    for path in (card, run / "distill/student.json"):
        assert next(rebuild(path).parameters()).device.type == "cpu"


@pytest.mark.slow
def test_two_processes_write_what_one_would_and_speak_once(run: Path) -> None:
    def started(command: str, *options: str) -> str:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", command]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*line, f"run={run}", *options], env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = started("scripts.specialize", *SHORT, "finetune.epochs=0.2", "ondevice.memory=16KB")
    assert said.count("stm32f746: validation top-1 float") == said.count("on-device plan") == 1
    folder = run / "specialize/stm32f746"
    for name in ("float", "pruned", "ondevice"):
        rebuild(folder / f"{name}.json")
    assert not list(folder.glob("*state*"))
    assert "already done" in started("scripts.specialize", *SHORT, "finetune.epochs=0.2", "ondevice.memory=16KB")
    options = (f"teacher={folder}/float.json", "student=digits_mbv3/smallest", "finetune.epochs=0.2")
    assert started("scripts.distill", *options).count("validation top-1 at") == 1
    assert rebuild(run / "distill/student.json").spec.classes == 10
    assert not list((run / "distill").glob("state*"))

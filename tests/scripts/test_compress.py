"""ofa-compress: a chain on a real network, what it leaves behind, and how it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from PIL import Image

from ofa.compress.channels import Channels
from ofa.compress.magnitude import Magnitude
from ofa.compress.packed import load_packed
from ofa.compress.quantize import check_quantized
from ofa.data import digits
from ofa.distill.nets import load_net
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.export.card import Card, load_card, save_net
from ofa.export.onnx import accuracy_onnx
from ofa.serve.settings import Served
from ofa.space import Arch, load_space
from ofa.static import build
from ofa.weights import load_weights
from scripts.compress import main
from tests.ofa.nets import SPEC, random_net

SMALLEST = load_space("digits_mbv3").smallest()
FOLDER = "compress/digits_mbv3-smallest/magnitude-channels"


def config(run: Path, *options: str) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose(
            "config",
            [
                f"run={run}",
                "network=digits_mbv3/smallest",
                "step=[magnitude,channels]",
                "step.magnitude.finetuning.epochs=0",
                "step.channels.finetuning.epochs=0",
                *options,
            ],
        )


def test_a_chain_leaves_the_same_numbers_and_a_file_after_each_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(tmp_path, "sensitivity.images=20", "sensitivity.levels=[0.5]"))
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / FOLDER / "table.json").read_text())["steps"]
    assert [row["step"] for row in rows] == ["before", "magnitude", "channels"]
    before, sparse, narrow = rows
    assert sparse["macs"] == before["macs"] > narrow["macs"], "zeros are multiplied like any other number"
    assert sparse["sparse_macs"] < before["sparse_macs"]
    assert sparse["file_bytes"] < before["file_bytes"]
    assert before["bit_operations"] == 32 * 32 * before["macs"]
    assert all(row["latency_ms"] > 0 for row in rows)
    for name in ("before", "magnitude", "channels"):
        assert (tmp_path / FOLDER / f"{name}.ofap").stat().st_size == rows[
            ["before", "magnitude", "channels"].index(name)
        ]["file_bytes"]
    assert not list((tmp_path / FOLDER).glob("*.pt"))
    assert "share of zeros in one layer alone" in out and "units.0.conv" in out
    assert (tmp_path / FOLDER / "front.svg").read_text().count("<svg") == 1


def test_a_packed_file_is_the_network_that_was_measured(tmp_path: Path) -> None:
    main(config(tmp_path))
    rows = json.loads((tmp_path / FOLDER / "table.json").read_text())["steps"]
    space = load_space("digits_mbv3")
    arch = space.decode(space.smallest())[0]
    net = build(space, arch).eval()
    tensors, about = load_packed(tmp_path / FOLDER / "magnitude.ofap")
    load_weights(net, tensors, "magnitude.ofap")
    assert about["step"] == "magnitude"
    assert accuracy(net, digits(), "test", resolution=arch.resolution) == rows[1]["accuracy"]


def test_each_step_leaves_a_network_that_other_commands_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_net(tmp_path / "net.json", random_net(), Card(Arch(16), {}, SPEC, {}, {}, 0))
    given, chain = f"network={tmp_path}/net.json", ["magnitude", "channels", "int8", "norms"]
    options = [given, f"step=[{','.join(chain)}]", "step.magnitude.size=0.8", "step.channels.macs=0.7"]
    options += ["step.int8.weight_bits=7"]  # x86 without VNNI saturates at more
    folder = tmp_path / f"compress/{tmp_path.name}-net" / "-".join(chain)
    assert main(config(tmp_path, *options)) == [f"network={folder}/norms.json"]
    assert f"norms.onnx and norms.json in {folder}" in capsys.readouterr().out
    rows = {row["step"]: row for row in json.loads((folder / "table.json").read_text())["steps"]}
    data = digits()
    for name in chain:
        top1 = accuracy_onnx(folder / f"{name}.onnx", data.batches("test", 256, 16, rng=None))
        assert top1 == pytest.approx(rows[name]["accuracy"], abs=0.02), "as it was measured, up to int8's other sums"
        again = load_net(f"{folder}/{name}.json", data).net
        assert accuracy(again, data, "test", resolution=16) == pytest.approx(rows[name]["accuracy"], abs=0.02)
    check_quantized(onnx.load(folder / "int8.onnx"))
    assert load_card(folder / "channels.json").metrics["accuracy"].value == rows["channels"]["accuracy"]
    assert load_card(folder / "channels.json").training == {"steps": ["magnitude", "channels"]}
    assert Served.find(folder / "int8.json").file == folder / "int8.onnx"
    assert not (folder / "before.onnx").exists()


def test_a_packed_file_gives_its_weights_to_the_network_that_it_was_made_of(tmp_path: Path) -> None:
    main(config(tmp_path))
    data, file = digits(), tmp_path / FOLDER / "magnitude.ofap"
    rows = json.loads((tmp_path / FOLDER / "table.json").read_text())["steps"]
    net = load_net(f"digits_mbv3/smallest@{file}", data).net
    assert accuracy(net, data, "test", resolution=net.spec.resolution) == rows[1]["accuracy"]  # type: ignore
    beside = file.with_suffix(".json")
    for wrong in (str(file), f"{beside}@{file}"):
        with pytest.raises(UserError, match=f"give {beside}"):
            load_net(wrong, data)
    beside.unlink()
    with pytest.raises(UserError, match=r"holds weights, but not the layers .* as <network>@"):
        load_net(str(file), data)


def test_a_network_of_other_layers_is_left_as_onnx_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["step=[magnitude,channels,low_rank]", "step.low_rank.macs=0.8", "step.low_rank.finetuning.epochs=0"]
    assert main(config(tmp_path, *options)) == []
    assert {path.name for path in tmp_path.rglob("low_rank.*")} == {"low_rank.ofap", "low_rank.onnx"}
    assert "low_rank: no card: its layers" in (out := capsys.readouterr().out) and "channels: no" not in out


def test_a_network_that_was_replaced_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    card = Card(Arch(16), {}, SPEC, {}, {}, 0)
    options = config(tmp_path / "run", f"network={tmp_path}/net.json")
    for seed in (0, 0, 1):
        save_net(tmp_path / "net.json", random_net(seed=seed), card)
        if not seed:
            main(options)
    with pytest.raises(
        UserError, match=r"net\.json was changed after .*channels was made; give restart=true to make it"
    ):
        main(options)
    main(config(tmp_path / "run", f"network={tmp_path}/net.json", "restart=true"))


def test_the_files_of_a_space_of_ones_own_are_watched_too(tmp_path: Path) -> None:
    space = load_space("digits_mbv3").to_dict()
    (tmp_path / "own.yaml").write_text(json.dumps(space))
    (tmp_path / "arch.json").write_text(json.dumps(Arch.to_dict(load_space("digits_mbv3").decode(SMALLEST)[0])))
    for file in ("own.yaml", "arch.json"):
        options = [f"network={tmp_path}/own.yaml/{tmp_path}/arch.json", "step.magnitude.finetuning.epochs=0"]
        main(config(tmp_path / f"run-{file}", *options))
        (tmp_path / file).write_text((tmp_path / file).read_text() + " ")
        with pytest.raises(UserError, match=rf"{file} was changed after"):
            main(config(tmp_path / f"run-{file}", *options))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = random_net()
    net.units[0].conv.weight.data[0] = torch.nan
    save_net(tmp_path / "a.json", net, Card(Arch(16), {}, SPEC, {}, {}, 0))
    with pytest.raises(UserError, match=r"values in units\.0\.conv\.weight that are no finite floats"):
        main(config(tmp_path / "run", f"network={tmp_path}/a.json"))


def test_a_stopped_chain_goes_on_after_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watch(step: type, name: str, stopped: list[int]) -> None:
        call = step.__call__

        def watched(self: Any, net: Any, work: Any) -> Any:
            called.append(name)
            if len(called) in stopped:
                raise KeyboardInterrupt
            return call(self, net, work)

        monkeypatch.setattr(step, "__call__", watched)

    watch(Magnitude, "magnitude", [])
    watch(Channels, "channels", [2])
    with pytest.raises(KeyboardInterrupt):
        main(config(tmp_path / "a"))
    main(config(tmp_path / "a"))
    assert called == ["magnitude", "channels", "channels"], "the first step is not done again"
    monkeypatch.undo()
    main(config(tmp_path / "b"))
    assert (tmp_path / "a" / FOLDER / "channels.ofap").read_bytes() == (
        tmp_path / "b" / FOLDER / "channels.ofap"
    ).read_bytes()


def test_a_chain_stopped_after_its_last_step_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def stopping(path: Path) -> None:
        unlink(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(config(tmp_path))
    monkeypatch.undo()
    for path in (tmp_path / FOLDER).glob("*.pt"):
        path.unlink()
    main(config(tmp_path))
    assert len(json.loads((tmp_path / FOLDER / "table.json").read_text())["steps"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["network=null"], "network or step has no value"),
        (["network=nowhere"], "nowhere"),
        (["network=mcunet/smallest", "data=digits", "step.channels.macs=0"], "macs"),
        (["step=[magnitude,channels,xnor,pt2e]", "step.xnor.keep=[units.0*]"], "step pt2e cannot follow xnor"),
        (["step=[magnitude,channels,int8]", "step.int8.inputs=8"], r"inputs=8 must be bits by patterns of layers"),
        (["step.magnitude.size=1.5"], "^size=1.5 is neither a share"),
        (["sensitivity.images=-5"], "sensitivity.images=-5 must be a whole number"),
        (["sensitivity.images=5", "sensitivity.levels=[2]"], r"sensitivity.levels=\[2\] must be shares"),
    ],
)
def test_mistakes_are_answered_before_the_work_begins(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(config(tmp_path, *options))
    assert not list(tmp_path.rglob("steps.jsonl"))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_images_too_small_for_a_network_are_answered(tmp_path: Path) -> None:
    for i in range(20):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(folder / f"{i}.png")
    options = ["network=googlenet", "data=folder", f"data.path={tmp_path}/images"]
    with pytest.raises(UserError, match=r"network googlenet cannot take images of 8 x 8 pixels in 3 channels .*larger"):
        main(config(tmp_path / "run", *options))


@pytest.mark.parametrize(
    "options",
    [
        ["step=[magnitude]", "step.magnitude.size=30KB"],
        ["step=[channels]", "step.channels.macs=100k"],
        ["step=[int8]", "step.int8.layers={units.0.*:3}"],
        ["step=[int8]", "+step.int8.layers={units.0.*:3}", "step.int8.inputs={units.1*:4,units.0.*:32}"],
        ["step=[kmeans]", "step.kmeans.layers={units.0.*:32}", "step.kmeans.finetuning=null"],
        ["step=[mine]", "--config-dir=my"],
    ],
)
def test_amounts_with_units_and_bits_of_single_layers_are_taken_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    step = tmp_path / "my" / "step" / "mine.yaml"
    step.parent.mkdir(parents=True)
    step.write_text(
        "# @package step.mine\n_target_: ofa.compress.linear.Linear\nlayers: {units.0.*: 3}\ninputs: {units.1.*: 4}\n"
    )
    epochs = [f"{name}.finetuning.epochs=0" for name in ("step.magnitude", "step.channels") if name in str(options)]
    given = ["network=digits_mbv3/smallest", f"run={tmp_path}/run", *options, *epochs]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ofa-compress", *given])
    main()
    assert "before" in (out := capsys.readouterr().out) and "is not" not in out
    rows = json.loads(next((tmp_path / "run").rglob("table.json")).read_text())["steps"]
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"] and rows[1]["macs"] <= 100_000 + rows[0]["macs"] * (
        "channels" not in str(options)
    )

"""ONNX files against PyTorch, and cards from which networks are built again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ofa.data import ImageData
from ofa.errors import UserError
from ofa.export.card import Card, Metric, load_card, rebuild, save_card, save_net
from ofa.export.graph import OPSET, onnx_model
from ofa.export.onnx import (
    Verification,
    accuracy_onnx,
    compare,
    export,
    load_onnx,
    require_parity,
    run_onnx,
    run_torch,
    verify,
    weight_bytes,
)
from ofa.space import load_space
from ofa.static import StaticNet, build
from tests.ofa.nets import RESNET, SPEC, random_net


@pytest.fixture
def file(tmp_path: Path) -> Path:
    export(random_net(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


# -- ONNX --------------------------------------------------------------------------------------------------------------


def test_an_onnx_file_gives_the_logits_of_the_network(file: Path, images: Tensor) -> None:
    parity = verify(file, random_net(), images)
    assert parity.max_relative < 1e-4
    assert parity.agreement == 1
    assert parity.sqnr_db > 80
    assert np.ptp(run_onnx(file, images), axis=0).min() > 1, "logits follow the image"


@pytest.mark.parametrize("side", [16, 14, 13])
def test_a_residual_network_is_exported_at_odd_sizes_too(side: int, images: Tensor, tmp_path: Path) -> None:
    net, x = random_net(RESNET), nn.functional.interpolate(images, (side, side))
    net.spec = replace(net.spec, resolution=side)
    export(net, tmp_path / "net.onnx")
    assert verify(tmp_path / "net.onnx", net, x).max_relative < 1e-4


def test_one_weight_changed_by_a_percent_is_seen(file: Path, images: Tensor) -> None:
    net = random_net()
    with torch.no_grad():
        net.units[0].conv.weight[0, 0, 1, 1] *= 1.01  # type: ignore[union-attr,index,operator]
    assert verify(file, net, images).max_relative > 1e-4


def test_a_file_that_differs_from_its_network_is_not_let_through(file: Path, images: Tensor) -> None:
    require_parity(file, verify(file, random_net(), images), Verification())
    with pytest.raises(
        RuntimeError, match=r"net\.onnx differs from the network by .* more than export\.tolerance 0\.0001"
    ):
        require_parity(file, verify(file, random_net(seed=1), images), Verification())
    with pytest.raises(UserError, match=r"images=1.* must be at least 2"):
        Verification(images=1)


def test_every_subnet_of_a_space_can_be_exported(images: Tensor) -> None:
    import onnxruntime

    space = load_space("digits_mbv3")
    for arch in space.decode(space.sample(10, np.random.default_rng(0))):
        net, side = build(space, arch).eval(), arch.resolution
        x = nn.functional.interpolate(images[:8], (side, side))
        session = onnxruntime.InferenceSession(onnx_model(net, (1, side, side)).SerializeToString())
        (logits,) = session.run(None, {"input": x.contiguous().numpy()})
        assert compare(logits, run_torch(net, x)).max_relative < 1e-4


def test_the_graph_is_plain_inference(file: Path) -> None:
    model = load_onnx(file)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BatchNormalization"] == 0, "folded into the convolutions"
    assert kinds["Conv"] == 18
    assert kinds["GlobalAveragePool"] == 3
    assert [opset.version for opset in model.opset_import] == [OPSET]
    (image,), (logits,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)]
    assert (image.name, logits.name, shapes) == ("input", "output", [["batch", 1, 16, 16], ["batch", 10]])


def test_the_batch_size_is_free(file: Path, images: Tensor) -> None:
    whole = run_onnx(file, images)
    np.testing.assert_allclose(run_onnx(file, images, batch_size=1, threads=2), whole, rtol=1e-4, atol=1e-5)


def test_exporting_leaves_the_network_unchanged_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = random_net().train()
    export(net, tmp_path / "net.onnx")
    assert all(module.training for module in net.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), random_net().state_dict().values(), strict=True)
    )
    assert capfd.readouterr() == ("", "")


def test_the_accuracy_of_a_file_is_that_of_its_logits(file: Path, data: ImageData) -> None:
    x, y = next(data.batches("test", data.size("test"), 16, rng=None))
    expected = (run_torch(random_net(), x).argmax(1) == y.numpy()).mean()
    assert accuracy_onnx(file, data.batches("test", 100, 16, rng=None)) == pytest.approx(expected)


def test_parity_has_the_figures_of_its_formulas() -> None:
    reference = np.array([[0.0, 4.0], [2.0, 0.0]], dtype=np.float32)
    logits = reference + np.array([[0.1, 0.0], [-0.1, 0.0]], dtype=np.float32)
    parity = compare(logits, reference)
    assert (parity.images, parity.agreement) == (2, 1)
    assert parity.max_abs == pytest.approx(0.1)
    assert parity.max_relative == pytest.approx(0.025)
    assert parity.sqnr_db == pytest.approx(10 * np.log10(10 / 0.02), abs=1e-4)
    assert compare(reference[::-1], reference).agreement == 0
    assert np.isfinite(compare(reference, reference).sqnr_db), "JSON has no number for what is beyond all"


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_a_damaged_file_is_named(size: int, file: Path, images: Tensor) -> None:
    file.write_bytes(file.read_bytes()[:size])
    for use in (load_onnx, lambda path: run_onnx(path, images)):
        with pytest.raises(UserError, match=r"net\.onnx.*export it again"):
            use(file)


def test_an_absent_file_is_named(tmp_path: Path, images: Tensor) -> None:
    for use in (load_onnx, lambda path: run_onnx(path, images)):
        with pytest.raises(UserError, match=r"none\.onnx.*export"):
            use(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([nn.Conv2d(1, 4, 3), nn.GELU()], "_1 is a GELU, which cannot be exported; use .*Conv2d"),
        ([nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3)], "_0 is a BatchNorm2d"),
        ([nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2)], "_1 pools to 2; only global"),
        ([nn.Conv2d(1, 4, 3, padding="same")], "_0 pads by 'same'"),
        ([nn.Conv2d(1, 4, 3), nn.Flatten(2)], "_1 flattens dimensions 2 to -1"),
    ],
)
def test_what_cannot_be_exported_is_named(layers: list[nn.Module], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        onnx_model(nn.Sequential(*layers), (1, 16, 16))


class _Function(nn.Module):
    """A convolution of 4 channels, pooled, and any function of it and of another one, which runs last."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.other, self.function = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), function

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).flatten(1)
        return self.function(y, self.other(x).flatten(1))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda y, z: y + 1, r"add has a number among .*two maps"),
        (lambda y, z: 2 * y, r"mul has a number among .*two maps"),
        (lambda y, z: (y, z), r"gives \(flatten, flatten_1\); ONNX export needs one output"),
        (lambda y, z: {"logits": y}, r"gives \{'logits': flatten\}; ONNX export needs one output"),
    ],
)
def test_numbers_and_several_outputs_are_named(function: Callable[[Tensor, Tensor], Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        onnx_model(_Function(function), (1, 3, 3))


def test_a_map_for_an_output_is_named() -> None:
    with pytest.raises(UserError, match=r"does not give logits \(N, 4\)"):
        onnx_model(nn.Sequential(nn.Conv2d(1, 4, 3)), (1, 16, 16))


def test_what_the_logits_do_not_need_is_left_out(tmp_path: Path) -> None:
    net, images = _Function(lambda y, z: y).eval(), torch.randn(3, 1, 3, 3)
    (tmp_path / "net.onnx").write_bytes(onnx_model(net, (1, 3, 3)).SerializeToString())
    torch.testing.assert_close(torch.from_numpy(run_onnx(tmp_path / "net.onnx", images)), net(images))
    assert weight_bytes(tmp_path / "net.onnx") == 4 * (4 * 9 + 4)


class _Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.norm(input=self.conv(input=x)))
        return torch.minimum(torch.flatten(input=y, start_dim=1), other=torch.flatten(y, start_dim=1))


def test_what_is_called_by_keywords_is_exported(tmp_path: Path) -> None:
    net, images = _Keywords().eval(), torch.randn(3, 1, 16, 16)
    (tmp_path / "net.onnx").write_bytes(onnx_model(net, (1, 16, 16)).SerializeToString())
    np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", images), run_torch(net, images), rtol=1e-4, atol=1e-5)


def test_a_pool_dilated_by_one_each_way_is_exported() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, dilation=(1, 1)), nn.Flatten())
    plain = nn.Sequential(net[0], nn.MaxPool2d(2), nn.Flatten())
    assert onnx_model(net, (1, 4, 4)) == onnx_model(plain, (1, 4, 4))


# -- cards -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(data: ImageData) -> Card:
    space = load_space("digits_mbv3")
    arch = space.decode(space.sample(1, np.random.default_rng(0)))[0]
    metrics = {"accuracy": Metric(0.96, "share"), "latency_ms": Metric(0.2, "ms")}
    return Card(arch, space.to_dict(), SPEC, metrics, data.describe(), seed=7)


def test_a_network_is_rebuilt_bit_for_bit_from_its_card(card: Card, tmp_path: Path, images: Tensor) -> None:
    net = random_net()
    saved = save_net(tmp_path / "float.json", net, card)
    again = rebuild(tmp_path / "float.json")
    assert load_card(tmp_path / "float.json") == saved
    assert load_space(saved.space).decode(load_space(saved.space).encode([saved.arch])) == [card.arch]
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    np.testing.assert_array_equal(run_torch(again, images), run_torch(net, images))


def test_a_card_says_what_made_the_file(card: Card, tmp_path: Path) -> None:
    save_net(tmp_path / "float.json", random_net(), card)
    values = json.loads((tmp_path / "float.json").read_text())
    assert values["metrics"]["latency_ms"] == {"value": 0.2, "unit": "ms"}
    assert values["data"]["name"] == "digits"
    assert (values["seed"], values["arch"]["resolution"]) == (7, card.arch.resolution)
    assert {"torch", "onnxruntime", "python"} <= set(values["versions"])
    assert values["commit"]
    assert list(values["files"]) == ["float.safetensors"]


def test_a_card_may_speak_for_the_model_and_the_weights_it_came_from(card: Card, tmp_path: Path) -> None:
    save_net(tmp_path / "float.json", random_net(), card)
    export(random_net(), tmp_path / "float.onnx")
    save_card(tmp_path / "float.json", card, [tmp_path / "float.onnx", tmp_path / "float.safetensors"])
    assert isinstance(rebuild(tmp_path / "float.json"), StaticNet)


def test_one_wrong_byte_among_the_weights_is_named(card: Card, tmp_path: Path) -> None:
    save_net(tmp_path / "float.json", random_net(), card)
    weights = tmp_path / "float.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"float\.safetensors is not the file that .*float\.json was written with"):
        rebuild(tmp_path / "float.json")
    weights.unlink()
    with pytest.raises(UserError, match=r"float\.safetensors does not exist"):
        rebuild(tmp_path / "float.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"arch": 1, "metrics": {}, "spec": {}}'])
def test_a_broken_card_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "float.json").write_text(content)
    with pytest.raises(UserError, match=r"float\.json"):
        load_card(tmp_path / "float.json")


def test_a_card_without_weights_or_with_an_unknown_field_is_refused(card: Card, tmp_path: Path) -> None:
    save_card(tmp_path / "float.json", card, [])
    with pytest.raises(UserError, match=r"float\.json names 0 files ending in \.safetensors"):
        rebuild(tmp_path / "float.json")
    with pytest.raises(UserError, match="colour"):
        Card.from_dict(card.to_dict() | {"colour": "red"})
    assert Card.from_dict(card.to_dict()) == card != replace(card, seed=8)


@pytest.mark.parametrize(
    ("place", "value", "answer"),
    [
        (("spec", "resolution"), -16, "resolution -16 is no side of an image"),
        (("spec", "resolution"), 16.5, "resolution 16.5 is no side of an image"),
        (("spec", "resolution"), None, "resolution None is no side of an image"),
        (("spec", "in_channels"), 3, "has 3 input channels and 10 classes, but its units read 1 and give 10"),
        (("spec", "classes"), 7, "has 1 input channels and 7 classes, but its units read 1 and give 10"),
        (("spec", "bn_eps"), "1e-5", "bn_eps '1e-5' must be a number above 0"),
        (("spec", "bn_eps"), 0, "bn_eps 0 must be a number above 0"),
        (("spec", "units"), [], "the network has no units"),
        (("spec", "units", 2, "cout"), 24.0, "unit 2 has 24.0 channels of 16, .*; give whole numbers"),
        (("spec", "units", 2, "stride"), 0, "unit 2 has .*, stride 0; give whole numbers"),
        (("spec", "units", 2, "se"), -8, "unit 2 has .*, -8 of squeeze-excite, .*; give whole numbers"),
        (("spec", "units", 2, "cout"), 32, "unit 3 reads 24 channels, but gets 32; make them equal"),
        (("spec", "units", 2, "bn"), False, "unit 2, a block of mbconv, always has batch norm"),
        (("spec", "units", -1, "kernel"), 3, "linear; leave its kernel, stride and act out"),
        (("spec", "units", 2, "shortcut"), True, "unit 2 adds its input to another shape"),
        (("files",), ["float.safetensors"], r"files of a card is a record of names and values, not \['float"),
        (("files",), None, "files of a card is a record of names and values, not None"),
        (("data",), 3, "data of a card is a record of names and values, not 3"),
        (("arch",), 3, "an architecture has the fields .*, not 3"),
    ],
)
def test_a_card_edited_by_hand_into_no_network_is_answered(
    place: tuple[str | int, ...], value: object, answer: str, card: Card, tmp_path: Path
) -> None:
    save_net(tmp_path / "float.json", random_net(), card)
    values = json.loads((tmp_path / "float.json").read_text())
    *where, last = place
    inner = values
    for key in where:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "float.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"float\.json: .*{answer}"):
        rebuild(tmp_path / "float.json")


def test_a_file_of_another_network_is_not_loaded(card: Card, tmp_path: Path) -> None:
    save_net(tmp_path / "float.json", random_net(), card)
    other = replace(load_card(tmp_path / "float.json"), spec=replace(SPEC, units=(*SPEC.units[:3], *SPEC.units[4:])))
    save_card(tmp_path / "float.json", other, [tmp_path / "float.safetensors"])
    with pytest.raises(UserError, match=r"float\.safetensors does not fit"):
        rebuild(tmp_path / "float.json")


def test_onnx_files_are_valid(file: Path) -> None:
    onnx.checker.check_model(str(file), full_check=True)


def test_weight_bytes_are_those_of_every_folded_parameter(tmp_path: Path) -> None:
    net = random_net()
    export(net, tmp_path / "a.onnx")
    kernels = sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    biases = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    biases += sum(m.bias.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None)
    limits = 2 * sum(isinstance(m, nn.ReLU6) for m in net.modules())
    assert weight_bytes(tmp_path / "a.onnx") == 4 * (kernels + biases + limits)

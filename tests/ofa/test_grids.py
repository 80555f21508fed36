"""Quantized networks as ONNX files of whole numbers: what ONNX Runtime computes is what the network does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.equalize import Equalization
from ofa.compress.fidelity import sqnr
from ofa.compress.layers import weight_layers
from ofa.compress.linear import Linear, quantize_linear
from ofa.compress.quantize import check_quantized
from ofa.data import digits
from ofa.export.graph import onnx_model
from ofa.export.grids import whole_numbers
from ofa.finetune import Finetuning
from ofa.spec import NetSpec
from tests.ofa.nets import RESNET, SPEC, random_net

SHAPE = (1, 16, 16)
INT8 = Linear()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat(list(digits().calibration("val", 96, 16, batch_size=32)))


def run(net: nn.Module, images: Tensor, path: Path, *, as_written: bool = False) -> Tensor:
    """Logits of the network's file; as_written: node by node in float, without integer kernels."""
    path.write_bytes(onnx_model(net, SHAPE, grids=True).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI would saturate
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = net(images)
    return result


@pytest.mark.parametrize("spec", [SPEC, RESNET])
@pytest.mark.parametrize(
    "settings",
    [
        INT8,
        Linear(per_channel=False, symmetric_activations=True),
        Linear(per_channel=False, symmetric=False),
        Linear(4, 8, layers={"units.0.*": 8}),
        Linear(8, 6),
        Linear(8, 8, layers={"units.5*": 32}, inputs={"units.5*": 32}),
    ],
    ids=["int8", "signed", "unsigned", "w4", "a6", "one float"],
)
def test_onnx_runtime_computes_what_the_quantized_network_does(
    settings: Linear, spec: NetSpec, images: Tensor, tmp_path: Path
) -> None:
    net = random_net(spec)
    small = quantize_linear(net, settings, [images])
    exact, rounded = logits(net, images), logits(small, images)
    assert sqnr(rounded, run(small, images, tmp_path / "net.onnx", as_written=True)) > 38
    # Integer kernels sum in another order, a value on the border of two numbers falls on the other side, and layers
    # behind it round differently: some of the noise that rounding has made is made anew.
    assert sqnr(rounded, run(small, images, tmp_path / "net.onnx")) > sqnr(exact, rounded) + 3


def test_every_layer_of_an_int8_network_reads_whole_numbers(images: Tensor) -> None:
    small = quantize_linear(random_net(), INT8, [images])
    model = onnx_model(small, SHAPE, grids=True)
    counts, layers = check_quantized(model), weight_layers(small)
    assert counts["QuantizeLinear"] == len(layers)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, layer in layers.items():
        key = name.replace(".", "_")
        values, scale = held[f"{key}.weight.values"], held[f"{key}.weight.scale"]
        assert values.dtype == np.int8
        steps = scale.reshape(-1, *[1] * (values.ndim - 1))
        np.testing.assert_allclose(values * steps, layer.weight.detach(), rtol=1e-5)
    assert len(model.SerializeToString()) < 0.6 * len(onnx_model(small, SHAPE).SerializeToString())


def test_weights_alone_on_their_grids_change_nothing(images: Tensor, tmp_path: Path) -> None:
    small = quantize_linear(random_net(), Linear(4, 32), [images])
    torch.testing.assert_close(run(small, images, tmp_path / "net.onnx"), logits(small, images), rtol=0, atol=1e-4)
    other = quantize_linear(random_net(), Linear(4, 32), [images])
    layer = weight_layers(other)["units.5.conv"]
    layer.weight.data[0] += layer.weight_scale[0]  # type: ignore[index, operator]
    assert not torch.allclose(run(other, images, tmp_path / "other.onnx"), logits(small, images), atol=1e-2)


def test_a_weight_that_left_its_grid_is_written_in_float(images: Tensor, tmp_path: Path) -> None:
    small = quantize_linear(random_net(), INT8, [images])
    layer = weight_layers(small)["units.5.conv"]
    assert whole_numbers(layer) is not None
    layer.weight.data *= 1.01
    assert whole_numbers(layer) is None
    found = run(small, images, tmp_path / "net.onnx")
    assert sqnr(logits(small, images), found) > 20
    (conv,) = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if node.name == "units_5_conv"]
    assert conv.input[1] == "units_5_conv.weight" and conv.input[2] == "units_5_conv.bias"


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_channel_without_weights_keeps_its_bias(per_channel: bool, images: Tensor, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 10)).eval()
    with torch.no_grad():
        net[0].weight[1] = net[0].bias[1] = 0
        net[3].weight[:2] = 0
        net[3].bias[:2] = torch.tensor([0.1234, -5e-5])
    small = quantize_linear(net, Linear(per_channel=per_channel), [images])
    found = run(small, images, tmp_path / "net.onnx")[:, :2]
    torch.testing.assert_close(found, logits(small, images)[:, :2], rtol=1e-3, atol=0 if per_channel else 1e-4)


@pytest.mark.parametrize(
    "settings", [INT8, Linear(4, 4), Linear(finetuning=Finetuning(epochs=0.2, lr=1e-3), learned_steps=True)]
)
def test_files_of_equalized_and_trained_networks_hold_their_biases_too(
    settings: Linear, images: Tensor, tmp_path: Path
) -> None:
    work = Work(digits(), 16)
    small = settings(Equalization()(random_net(), work), work)
    found = run(small, images, tmp_path / "net.onnx", as_written=True)
    same = ((logits(small, images) - found).abs() < 1e-4).all(dim=1)
    assert same.float().mean() > 0.85, "but for values on the border of two numbers"
    for layer in weight_layers(small).values():
        if layer.bias is not None:
            layer.bias.data += 0.4 * layer.weight_scale * layer.input_grid.scale  # type: ignore[operator, union-attr]
    moved = run(small, images, tmp_path / "net.onnx", as_written=True)
    assert torch.equal(moved, found) and ((logits(small, images) - found).abs() > 1e-4).any(dim=1).float().mean() > 0.9
    check_quantized(onnx.load(tmp_path / "net.onnx"))

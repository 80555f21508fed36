"""Pruning, fine-tuning and quantization, each against an independent truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from ofa.blocks.bottleneck.modules import Plain as Bottleneck
from ofa.blocks.mbconv.modules import Plain as MBConv
from ofa.compress.compression import Compression
from ofa.compress.criteria import CRITERIA, Groups, channel_groups
from ofa.compress.prune import Pruning, macs, prune
from ofa.compress.quantize import Quantization, check_quantized, quantize
from ofa.data import ImageData
from ofa.errors import UserError
from ofa.export.onnx import export, run_onnx, run_torch, verify, weight_bits, weight_bytes
from ofa.finetune import Finetuning, finetune
from ofa.space import load_space
from ofa.spec import Unit
from ofa.static import StaticNet, build
from predictors import WeightBytes
from tests.ofa.nets import RESNET, SPEC, random_net


@pytest.fixture(scope="module")
def trained(data: ImageData) -> StaticNet:
    return finetune(random_net(), data, Finetuning(epochs=6, lr=0.1))


# -- pruning -----------------------------------------------------------------------------------------------------------


WRITERS = (".project", ".conv3", "")


def keep_only(net: StaticNet, kept: dict[int, list[int]]) -> StaticNet:
    """Silence, by hooks on the original, all channels but those kept: what pruning must equal."""

    def silence(module: nn.Module, group: int) -> None:
        if group in kept:
            module.register_forward_hook(lambda m, inputs, out: mask(out, kept[group]))

    for unit, group in zip(net.units, channel_groups(net.spec), strict=True):
        silence(unit, group.outer)
        if isinstance(unit, MBConv):
            silence(unit.depthwise, group.mid)
        if isinstance(unit, Bottleneck):
            silence(unit.conv1, group.mid)
            silence(unit.conv2, group.mid)
    return net


def mask(x: Tensor, kept: list[int]) -> Tensor:
    return x * torch.isin(torch.arange(x.shape[1]), torch.tensor(kept)).view(1, -1, *[1] * (x.ndim - 2))


def kept_channels(net: StaticNet, small: StaticNet) -> dict[int, list[int]]:
    """Channels that survive, found from batch-norm biases (random values are all different)."""
    kept, before, after = {}, net.state_dict(), small.state_dict()
    for i, group in enumerate(channel_groups(net.spec)):
        for layer, number in ((".depthwise", group.mid), (".conv2", group.mid), *((n, group.outer) for n in WRITERS)):
            key = f"units.{i}{layer}.bn.bias"
            if key in before:
                kept[number] = positions(before[key], after[key])
    return kept


def positions(old: Tensor, new: Tensor) -> list[int]:
    found = (old[:, None] == new).nonzero()
    assert len(found) == len(new), "every kept channel is one of the original's"
    return found[:, 0].tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pruned_net_equals_the_original_with_the_pruned_channels_silenced(criterion: str, images: Tensor) -> None:
    net = random_net()
    small = prune(net, Pruning(0.6, criterion))
    assert small.spec != net.spec
    expected = run_torch(keep_only(net, kept_channels(net, small)), images)
    np.testing.assert_allclose(run_torch(small, images), expected, rtol=1e-5, atol=1e-4)


def test_a_pruned_stream_is_cut_from_everything_that_writes_to_it_or_reads_it(images: Tensor) -> None:
    spec = replace(SPEC, units=(*SPEC.units[:7], Unit("linear", 64, 10)))
    net = random_net(spec)
    small = prune(net, Pruning(0.4, streams=True))
    assert all(new.cout < old.cout for new, old in zip(small.spec.units[1:4], spec.units[1:4], strict=True))
    expected = run_torch(keep_only(net, kept_channels(net, small)), images)
    np.testing.assert_allclose(run_torch(small, images), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_bottlenecks_are_pruned_too(criterion: str, streams: bool, images: Tensor) -> None:
    net = random_net(RESNET)
    small = prune(net, Pruning(0.7, criterion, streams=streams))
    assert any(new.mid < old.mid for new, old in zip(small.spec.units, RESNET.units, strict=True))
    assert small.spec.bn_eps == RESNET.bn_eps
    expected = run_torch(keep_only(net, kept_channels(net, small)), images)
    np.testing.assert_allclose(run_torch(small, images), expected, rtol=1e-5, atol=1e-4)


def test_silencing_one_channel_more_is_seen(images: Tensor) -> None:
    net = random_net()
    small = prune(net, Pruning(0.6))
    kept = kept_channels(net, small)
    kept[channel_groups(SPEC)[3].mid].pop()
    assert np.abs(run_torch(small, images) - run_torch(keep_only(net, kept), images)).max() > 1e-2


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4])
def test_macs_are_at_most_the_target_and_one_step_short_of_it(ratio: float, streams: bool) -> None:
    spec = prune(random_net(), Pruning(ratio, streams=streams)).spec
    step = max(unit.cin + unit.cout + unit.kernel**2 for unit in SPEC.units[1:5]) * 8**2 * 8
    assert ratio * macs(SPEC) - 4 * step < macs(spec) <= ratio * macs(SPEC)
    assert (spec.resolution, spec.in_channels, spec.classes) == (SPEC.resolution, SPEC.in_channels, SPEC.classes)


def test_macs_are_those_of_the_formula() -> None:
    se = 2 * 64 * 16
    units = replace(SPEC, units=(SPEC.units[0], SPEC.units[2], Unit("pool", 24, 24), Unit("linear", 24, 10)))
    assert macs(units) == 64 * 9 * 16 + 64 * 16 * 64 + 16 * 25 * 64 + se + 16 * 64 * 24 + 240


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_widths_are_multiples_and_never_zero(multiple: int) -> None:
    spec = prune(random_net(), Pruning(0.5, multiple=multiple)).spec
    for old, new in zip(SPEC.units, spec.units, strict=True):
        assert new.mid == old.mid or (new.mid % multiple == 0 and 0 < new.mid < old.mid)


def test_a_ratio_of_one_prunes_nothing(images: Tensor) -> None:
    net = random_net()
    same = prune(net, Pruning(1.0, streams=True))
    assert same.spec == net.spec
    np.testing.assert_array_equal(run_torch(same, images), run_torch(net, images))


def test_the_least_important_channels_go_first() -> None:
    net = random_net()
    unit = net.units[3]
    assert isinstance(unit, MBConv) and unit.expand is not None
    with torch.no_grad():
        for weight in (unit.expand.conv.weight, unit.depthwise.conv.weight, unit.project.conv.weight.transpose(0, 1)):
            weight[10:22] *= 1e-3
    kept = kept_channels(net, prune(net, Pruning(0.97)))[channel_groups(SPEC)[3].mid]
    assert kept == [i for i in range(76) if not 10 <= i < 22]


def test_groups_follow_the_shortcuts() -> None:
    groups = channel_groups(SPEC)
    assert groups[0] == Groups(0, 0, 1)
    assert groups[1] == Groups(1, 1, 1)
    assert groups[3].inner == groups[3].outer == groups[2].outer
    assert len({group for g in groups for group in g}) == 10


def test_pruning_leaves_its_argument_unchanged() -> None:
    net = random_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    prune(net, Pruning(0.5))
    assert net.spec == SPEC
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_target_below_the_smallest_widths_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"macs_ratio 0.01 cannot be met: widths of 8 leave 0\.\d+ .*; raise macs_ratio"
    ):
        prune(random_net(), Pruning(0.01))


@pytest.mark.parametrize("wrong", [{"macs_ratio": 0}, {"macs_ratio": 1.5}, {"criterion": "l3"}, {"multiple": 0}])
def test_wrong_pruning_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} .*{next(iter(wrong.values()))}"):
        Pruning(**wrong)  # type: ignore[arg-type]


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def accuracy(net: StaticNet, data: ImageData) -> float:
    x, y = next(data.batches("test", data.size("test"), 16, rng=None))
    return float((run_torch(net, x).argmax(1) == y.numpy()).mean())


@pytest.mark.parametrize("distilled", [False, True])
def test_finetuning_repairs_a_pruned_net(distilled: bool, trained: StaticNet, data: ImageData) -> None:
    before, losses = accuracy(trained, data), []
    assert before > 0.9
    small = prune(trained, Pruning(0.7))
    teacher = trained if distilled else None
    tuned = finetune(small, data, Finetuning(epochs=4), teacher=teacher, report=lambda v: losses.append(v["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    broken = accuracy(small, data)
    assert broken < before - 0.1
    assert accuracy(tuned, data) > broken + 0.8 * (before - broken)


def test_finetuning_is_reproducible_and_leaves_its_arguments_unchanged(trained: StaticNet, data: ImageData) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    first, second = (finetune(trained, data, Finetuning(epochs=0.2), teacher=trained, seed=3) for _ in range(2))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not trained.training


def test_a_part_of_an_epoch_is_at_least_one_step(data: ImageData) -> None:
    seen: list[dict[str, float]] = []
    finetune(random_net(), data, Finetuning(epochs=0), report=seen.append)
    assert not seen
    finetune(random_net(), data, Finetuning(epochs=0.01), report=seen.append)
    assert [values["steps"] for values in seen] == [1]


def test_finetuning_in_half_the_bits_learns_as_well_and_resumes(
    trained: StaticNet, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Finetuning(epochs=2, precision="bfloat16")
    start = random_net()
    exact, half = (finetune(start, data, replace(settings, precision=name)) for name in ("float32", "bfloat16"))
    assert accuracy(half, data) > 0.5 and abs(accuracy(half, data) - accuracy(exact, data)) < 0.1
    assert not torch.equal(half.units[0].conv.weight, exact.units[0].conv.weight)  # type: ignore[union-attr, arg-type]
    short = replace(settings, epochs=0.3)
    whole = finetune(start, data, short)
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)

    def killed(values: dict[str, float]) -> None:
        if values["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(start, data, short, report=killed, checkpoint=tmp_path / "part.safetensors")
    resumed = finetune(start, data, short, checkpoint=tmp_path / "part.safetensors")
    for name, tensor in whole.state_dict().items():
        assert tensor.dtype != torch.bfloat16 and torch.equal(tensor, resumed.state_dict()[name])


def test_a_loss_that_is_not_finite_is_reported(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"loss is nan at step .*; lower lr"):
        finetune(random_net(), data, Finetuning(epochs=2, lr=1e8))


class Endless(torch.autograd.Function):
    """Passes images on, and gradients that no scale makes finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.inf


class Last(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Endless.apply(super().forward(x))


def test_gradients_that_float16_cannot_hold_end_the_training_and_few_overflows_do_not(data: ImageData) -> None:
    settings = Finetuning(epochs=1, precision="float16")
    with pytest.raises(UserError, match=r"gradients overflow float16 at step 16; give precision=bfloat16, or lower lr"):
        finetune(nn.Sequential(nn.Flatten(), Last(64, 10)), data, settings)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    losses: list[float] = []
    finetune(net, data, settings, report=lambda values: losses.append(values["loss"]))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_a_precision_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"precision 'int8' is not known; choose from float32, bfloat16, float16"):
        Finetuning(precision="int8")


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0}, {"batch_size": 1}, {"soft_labels": 2}])
def test_wrong_finetuning_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(wrong))}( is)? {next(iter(wrong.values()))}.*give"):
        Finetuning(**wrong)  # type: ignore[arg-type]


# -- quantization ------------------------------------------------------------------------------------------------------


def calibration(data: ImageData) -> Iterator[Tensor]:
    return (x for x, _ in data.batches("val", 32, 16, rng=None))


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_an_int8_file_keeps_the_accuracy_and_is_smaller(
    method: str, trained: StaticNet, data: ImageData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(trained, tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration(data), Quantization(method))
    assert capfd.readouterr() == ("", "")
    x, y = next(data.batches("test", data.size("test"), 16, rng=None))
    right = (run_onnx(tmp_path / "int8.onnx", x).argmax(1) == y.numpy()).mean()
    assert right > accuracy(trained, data) - 0.02
    parity = verify(tmp_path / "int8.onnx", trained, x)
    assert parity.agreement > 0.96
    assert 15 < parity.sqnr_db < 60, "8 bits, neither worse nor as good as float"


def test_every_layer_reads_8_bit_weights_and_activations(trained: StaticNet, data: ImageData, tmp_path: Path) -> None:
    export(trained, tmp_path / "float.onnx")
    counts = quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration(data), Quantization())
    model = onnx.load(tmp_path / "int8.onnx")
    layers = Counter(node.op_type for node in model.graph.node)
    assert layers["Conv"] == 18
    assert counts["QuantizeLinear"] == layers["QuantizeLinear"] > 18
    assert counts["DequantizeLinear"] == layers["DequantizeLinear"] > 3 * 18
    kernels = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in kernels} == {onnx.TensorProto.INT8}
    scales = [t for t in model.graph.initializer if "weight" in t.name and "scale" in t.name]
    assert any(t.dims == [64] for t in scales), "a scale for each output channel"


@pytest.mark.parametrize("name", ["digits_mbv3", "cifar_mbv3", "cifar_pool", "nas_bench_macro"])
def test_predicted_weight_bytes_are_those_of_the_int8_file(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    for i, genes in enumerate((space.smallest(), space.sample(1, np.random.default_rng(0)))):
        net = build(space, space.decode(genes)[0]).eval()
        export(net, tmp_path / f"{i}.onnx")
        images = torch.randn(2, net.spec.in_channels, net.spec.resolution, net.spec.resolution)
        quantize(tmp_path / f"{i}.onnx", tmp_path / f"int8_{i}.onnx", [images], Quantization())
        found = weight_bytes(tmp_path / f"int8_{i}.onnx")
        (predicted,) = WeightBytes(space, 8, quantized=True)(genes)
        assert predicted == pytest.approx(found, rel=2e-3)
        assert WeightBytes(space, 8)(genes)[0] < 0.999 * found


def test_a_reduced_range_has_weights_of_7_bits(data: ImageData, tmp_path: Path) -> None:
    export(random_net(), tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration(data), Quantization(reduce_range=True))
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    kernels = [onnx.numpy_helper.to_array(t).astype(int) for t in tensors if len(t.dims) > 1]
    assert max(np.abs(kernel).max() for kernel in kernels) == 64
    assert weight_bits(tmp_path / "int8.onnx") == 7
    assert weight_bits(tmp_path / "float.onnx") == 0
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration(data), Quantization(reduce_range=False))
    assert weight_bits(tmp_path / "int8.onnx") == 8


def test_a_float_file_does_not_pass_for_a_quantized_one(tmp_path: Path) -> None:
    export(random_net(), tmp_path / "float.onnx")
    with pytest.raises(RuntimeError, match="left 19 of 19 layers in float"):
        check_quantized(onnx.load(tmp_path / "float.onnx"))


def test_quantization_without_images_or_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    export(random_net(), tmp_path / "float.onnx")
    with pytest.raises(UserError, match="no calibration images"):
        quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", [], Quantization())
    (tmp_path / "float.onnx").write_bytes((tmp_path / "float.onnx").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"float\.onnx is no usable ONNX file"):
        quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", [torch.zeros(1, 1, 16, 16)], Quantization())
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.parametrize("wrong", [{"method": "kl"}, {"images": 0}, {"percentile": 20}])
def test_wrong_quantization_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}.* .*{next(iter(wrong.values()))}.*; "):
        Quantization(**wrong)  # type: ignore[arg-type]


def test_the_configuration_is_the_default() -> None:
    settings = instantiate(OmegaConf.create((files("conf") / "compress" / "default.yaml").read_text()))
    assert settings == Compression()

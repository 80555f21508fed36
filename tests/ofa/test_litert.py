"""LiteRT and TensorFlow Lite Micro on real digits: fidelity, arenas, weights inside the file, broken files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofa.compress.affine import without_grids
from ofa.compress.equalize import Equalization, equalize
from ofa.compress.linear import Linear, quantize_linear
from ofa.data import digits
from ofa.errors import UserError
from ofa.export import flatbuffer
from ofa.export.onnx import compare, run_torch
from ofa.export.runtime import run
from ofa.export.runtimes.litert import LiteRT, convert, quantize
from ofa.export.runtimes.onnx import Onnx
from ofa.export.runtimes.tflm import UNITS, Tflm, _runs, arena, open_micro, units_apart
from ofa.integer.tflite import read_tflite
from ofa.modules import ConvBN, SqueezeExcite
from tests.ofa.nets import SPEC, random_net

pytest.importorskip("litert_torch")
pytest.importorskip("tflite_micro")
flatbuffers = pytest.importorskip("flatbuffers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return next(digits().batches("test", 128, 16, rng=None))[0]


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return torch.cat(list(digits().calibration("val", 64, 16)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, calibration: Tensor) -> Path:
    """float.tflite, int8.tflite, average.tflite of the other calibration, outside.tflite with weights behind it."""
    folder = tmp_path_factory.mktemp("tflite")
    content = convert(random_net(), calibration)
    (folder / "float.tflite").write_bytes(flatbuffer.inline(content))
    (folder / "int8.tflite").write_bytes(flatbuffer.inline(quantize(content, calibration)))
    (folder / "outside.tflite").write_bytes(moved_out((folder / "int8.tflite").read_bytes()))
    (folder / "average.tflite").write_bytes(flatbuffer.inline(quantize(content, calibration, "average")))
    return folder


def packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), file_identifier=flatbuffer.IDENTIFIER)
    return bytes(builder.Output())


def moved_out(content: bytes) -> bytes:
    """The same model as large files are written: weights behind the flatbuffer, found by their offsets."""
    model, tail = flatbuffer.parse(content), b""
    moved = [buffer for buffer in model.buffers if buffer.data is not None and len(buffer.data) > 256]
    weights = [bytes(buffer.data) for buffer in moved]
    for buffer in moved:
        buffer.data, buffer.offset, buffer.size = None, 2, 2
    length = len(packed(model))
    for buffer, data in zip(moved, weights, strict=True):
        tail += b"\0" * (-(length + len(tail)) % 16)
        buffer.offset, buffer.size = length + len(tail), len(data)
        tail += data
    return packed(model) + tail


def test_a_float_file_gives_the_logits_of_the_network(folder: Path, images: Tensor) -> None:
    parity = compare(run(LiteRT(32), folder / "float.tflite", images), run_torch(random_net(), images))
    assert parity.max_relative < 1e-4
    other = compare(run(LiteRT(32), folder / "float.tflite", images), run_torch(random_net(seed=1), images))
    assert other.max_relative > 1e-1


def test_int8_is_as_close_as_onnx_runtime_where_ranges_are_extremes(
    folder: Path, images: Tensor, calibration: Tensor, tmp_path: Path
) -> None:
    expected = run_torch(random_net(), images)
    Onnx().export(random_net(), tmp_path / "net.onnx", calibration)
    theirs = compare(run(Onnx(), tmp_path / "net.onnx", images), expected).sqnr_db
    ours = compare(run(LiteRT(), folder / "int8.tflite", images), expected).sqnr_db
    average = compare(run(LiteRT(), folder / "average.tflite", images), expected).sqnr_db
    assert ours > theirs - 3
    assert average < ours, "the default of the quantizer clips"


def test_an_equalized_network_is_wholly_int8(calibration: Tensor, images: Tensor, tmp_path: Path) -> None:
    net, path = random_net(), tmp_path / "equal.tflite"
    LiteRT().export(equalize(net, Equalization()), path, calibration)
    assert compare(run(LiteRT(), path, images), run_torch(net, images)).sqnr_db > 12
    assert read_tflite(path).ops


def test_grids_of_activations_stay_in_float_and_are_left_out_in_int8(
    calibration: Tensor, images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, path = quantize_linear(random_net(), Linear(activation_bits=3), [calibration]), tmp_path / "net.tflite"
    LiteRT(32).export(net, path, calibration)
    assert compare(run(LiteRT(32), path, images), run_torch(net, images)).sqnr_db > 60 and not caplog.text
    LiteRT().export(net, path, calibration)
    assert compare(run(LiteRT(), path, images), run_torch(without_grids(net), images)).sqnr_db > 12
    assert "int8 LiteRT leaves out the grids of what 19 layers read" in caplog.text


def test_the_micro_interpreter_computes_what_litert_does(folder: Path, images: Tensor) -> None:
    assert units_apart(folder / "int8.tflite", images) <= UNITS
    expected = run_torch(random_net(), images)
    assert compare(run(Tflm(), folder / "int8.tflite", images), expected).agreement > 0.9


def test_the_arena_holds_at_least_the_tensors_alive_at_once(folder: Path) -> None:
    found, fullest = arena(folder / "int8.tflite"), flatbuffer.peak(folder / "int8.tflite")
    assert fullest.bytes == sum(fullest.alive)
    assert fullest.bytes <= found.tensors <= 1.25 * fullest.bytes + 64
    assert found.total == found.tensors + found.tables and found.planning == 0
    assert Tflm().describe(folder / "int8.tflite")["arena_bytes"] == found.total


def test_an_arena_that_planning_outgrows_is_measured_by_trying(calibration: Tensor, tmp_path: Path) -> None:
    last = replace(SPEC.units[-1], cout=3000)
    spec, path = replace(SPEC, units=(*SPEC.units[:-1], last), classes=3000), tmp_path / "net.tflite"
    Tflm().export(random_net(spec), path, calibration)
    found = arena(path)
    assert found.planning > 0.05 * found.total
    assert _runs(path, found.total) and not _runs(path, int(0.98 * found.total))


def test_weights_outside_the_flatbuffer_are_refused_and_can_be_moved_inside(folder: Path, images: Tensor) -> None:
    outside = (folder / "outside.tflite").read_bytes()
    with pytest.raises(RuntimeError, match=r"buffers lie outside the flatbuffer"):
        flatbuffer.require_inline(outside)
    with pytest.raises(UserError, match=r"Micro cannot run .*outside\.tflite: .* outside the flatbuffer"):
        open_micro(folder / "outside.tflite")
    whole = flatbuffer.inline(outside)
    assert flatbuffer.inline(whole) == whole, "nothing is left to move"
    (folder / "whole.tflite").write_bytes(whole)
    assert units_apart(folder / "whole.tflite", images[:8]) <= UNITS
    np.testing.assert_array_equal(
        run(Tflm(), folder / "whole.tflite", images[:8]), run(Tflm(), folder / "int8.tflite", images[:8])
    )


def test_an_emptied_buffer_is_noticed(folder: Path) -> None:
    model = flatbuffer.parse((folder / "int8.tflite").read_bytes())
    largest = max(model.buffers, key=lambda buffer: 0 if buffer.data is None else len(buffer.data))
    largest.data = largest.data[:-1]
    with pytest.raises(RuntimeError, match="in its buffer"):
        flatbuffer.require_inline(packed(model))


@pytest.mark.parametrize("size", [0, 100, -3000])
@pytest.mark.parametrize("runtime", [LiteRT(), Tflm()])
def test_a_damaged_file_is_named(size: int, runtime: LiteRT | Tflm, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.tflite"
    file.write_bytes((folder / "int8.tflite").read_bytes()[:size])
    with pytest.raises(UserError, match=r"net\.tflite.*export it again"):
        runtime.load(file)
    with pytest.raises(UserError, match=r"none\.tflite does not exist"):
        runtime.load(tmp_path / "none.tflite")


def test_the_files_are_as_small_as_int8_is(folder: Path) -> None:
    params = sum(p.numel() for p in random_net().parameters())
    assert params < (folder / "int8.tflite").stat().st_size < (folder / "float.tflite").stat().st_size
    kinds = flatbuffer.operators(folder / "int8.tflite")
    assert kinds["QUANTIZE"] == kinds["DEQUANTIZE"] == 0
    assert kinds["CONV_2D"] + kinds["DEPTHWISE_CONV_2D"] + kinds["FULLY_CONNECTED"] == 19


@torch.no_grad()
def test_filters_that_died_keep_their_biases_and_closed_gates_can_be_loaded(
    images: Tensor, calibration: Tensor, tmp_path: Path
) -> None:
    net = random_net()
    for module in net.modules():
        if isinstance(module, ConvBN):
            module.conv.weight[0] *= 1e-9
            module.conv.weight[1] = 0
        if isinstance(module, SqueezeExcite):
            nn.init.constant_(module.reduce.bias, -100.0)  # type: ignore[arg-type]
    path = tmp_path / "net.tflite"
    LiteRT().export(net, path, calibration)
    assert compare(run(LiteRT(), path, images), run_torch(net, images)).sqnr_db > 13  # 5.5 with biases cut off
    assert units_apart(path, images[:8]) <= UNITS
    read_tflite(path)  # which refuses sums beyond 2^30


@pytest.mark.parametrize("first", [nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, groups=3)])
def test_inputs_too_large_for_a_relu6_are_refused_before_the_file_is_written(first: nn.Module, tmp_path: Path) -> None:
    net, path, images = nn.Sequential(first, nn.ReLU6(), nn.Conv2d(3, 2, 10), nn.Flatten()), tmp_path / "a", noise()
    LiteRT().export(net, path, 1e4 * images)
    run(LiteRT(), path, 1e4 * images)
    path.unlink()
    with pytest.raises(UserError, match="steps of its output, and int8 kernels take less than 256; normalise"):
        LiteRT().export(net, path, 1e6 * images)
    assert not path.exists()


def noise() -> Tensor:
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Sorted(nn.Module):
    """An operator that TFLite lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.mean(1))


def test_an_unsupported_operator_or_option_is_named(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LiteRT cannot take this network"):
        LiteRT(32).export(Sorted(), tmp_path / "net.tflite", images)
    with pytest.raises(UserError, match="calibration 'median' is not known"):
        LiteRT(calibration="median")
    with pytest.raises(UserError, match="bits 4 is not known"):
        LiteRT(4)
    with pytest.raises(UserError, match="give at least one"):
        convert(random_net(), images[:0])
    assert np.isfinite(images).all()

"""The integer reference against LiteRT's own kernels, operator by operator and on whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ofa.data import digits
from ofa.errors import UserError
from ofa.export.c import export_c
from ofa.export.c.build import compile_c, has_compiler, run_c
from ofa.export.runtimes.litert import LiteRT
from ofa.export.runtimes.tflm import open_micro
from ofa.integer.factors import scale_of
from ofa.integer.fixed import quantize_multiplier
from ofa.integer.net import Tensor
from ofa.integer.run import quantize_images, run
from ofa.integer.tflite import read_tflite
from ofa.spec import NetSpec
from tests.ofa.nets import RESNET, SPEC, random_net

pytest.importorskip("ai_edge_litert", reason="needs the extra: pip install ofa-nas[tflite]")
from tests.ofa.lite import LiteFile, run_lite

SEEDS = range(6)
pytestmark = pytest.mark.filterwarnings("ignore")  # of a compiled extension that protobuf loads


def conv(file: LiteFile, rng: np.random.Generator, x: int, y: int, shape: tuple[int, ...], scale: float) -> list[int]:
    """Weights and biases of a convolution, linear layer or (1, kh, kw, C) depthwise one."""
    channels = shape[3] if shape[0] == 1 else shape[0]
    scales = rng.uniform(0.001, 0.02, channels).astype(np.float32)
    weight = file.tensor(shape, scales, 0, rng.integers(-127, 128, shape).astype(np.int8))
    bias = rng.integers(-2000, 2000, channels).astype(np.int32)
    return [x, weight, file.tensor((channels,), scales * np.float32(scale), 0, bias)]


def build(name: str, rng: np.random.Generator, path: Path) -> tuple[Path, NDArray[np.int8]]:
    """A file of one kind of operator with random quantization, and 200 random inputs for it."""
    file = LiteFile()
    scale, zero = float(rng.uniform(0.01, 0.1)), int(rng.integers(-90, 40))
    out_scale, out_zero = float(rng.uniform(0.03, 0.2)), int(rng.integers(-90, 40))
    side, c, act = 7, 6, int(rng.integers(0, 2)) * 3
    x = file.tensor((1, side, side, c), scale, zero)
    windows = {"padding": int(rng.integers(0, 2)), "strideH": 2, "strideW": 2}
    small = 4 if windows["padding"] == 0 else 3

    def made(shape: tuple[int, ...]) -> int:
        return file.tensor(shape, out_scale, out_zero)

    if name == "conv":
        y = made((1, small, small, 5))
        inputs = conv(file, rng, x, y, (5, 3, 3, c), scale)
        file.op("CONV_2D", inputs, [y], "Conv2DOptions", **windows, fusedActivationFunction=act)
    elif name == "depthwise":
        y = made((1, small, small, c))
        inputs = conv(file, rng, x, y, (1, 3, 3, c), scale)
        file.op("DEPTHWISE_CONV_2D", inputs, [y], "DepthwiseConv2DOptions", **windows, depthMultiplier=1)
    elif name == "padded conv":
        padded = file.tensor((1, side + 2, side + 3, c), scale, zero)
        around = file.tensor((4, 2), data=np.array([[0, 0], [1, 1], [2, 1], [0, 0]], np.int32))
        file.op("PAD", [x, around], [padded], "PadOptions")
        y = made((1, 4, 4, 5))
        inputs = conv(file, rng, padded, y, (5, 3, 3, c), scale)
        file.op("CONV_2D", inputs, [y], "Conv2DOptions", padding=1, strideH=2, strideW=2)
    elif name == "linear":
        y = made((1, 9))
        flat = file.tensor((1, side * side * c), scale, zero)
        file.op("RESHAPE", [x, file.tensor((2,), data=np.array([1, side * side * c], np.int32))], [flat])
        file.op("FULLY_CONNECTED", conv(file, rng, flat, y, (9, side * side * c), scale), [y], "FullyConnectedOptions")
    elif name in ("add", "mul"):
        other = file.tensor((1, side, side, c), 1.5 * scale, -zero - 1)  # the same numbers in another quantization
        file.op("QUANTIZE", [x], [other], "QuantizeOptions")
        y = made((1, side, side, c))
        file.op(name.upper(), [x, other], [y], f"{name.title()}Options", fusedActivationFunction=act)
    elif name == "mean":
        y = file.tensor((1, 1, 1, c), scale * float(rng.uniform(0.2, 1)), out_zero)
        axes = file.tensor((2,), data=np.array([1, 2], np.int32))
        file.op("MEAN", [x, axes], [y], "ReducerOptions", keepDims=True)
    elif name == "sum":  # over one pixel
        y, pixel = made((1, 5)), made((1, 1, 1, 5))
        inputs = conv(file, rng, x, pixel, (5, side, side, c), scale)
        file.op("CONV_2D", inputs, [pixel], "Conv2DOptions", padding=1, strideH=1, strideW=1)
        axes = file.tensor((2,), data=np.array([1, 2], np.int32))
        file.op("SUM", [pixel, axes], [y], "ReducerOptions", keepDims=False)
    elif name in ("average_pool", "max_pool"):
        y = file.tensor((1, small, small, c), scale, zero)
        window = windows | {"filterHeight": 3, "filterWidth": 3}
        file.op(f"{name.upper()}_2D", [x], [y], "Pool2DOptions", **window, fusedActivationFunction=act)
    elif name == "constant":
        y = made((1, side, side, c))
        sixth = file.tensor((), 1 / 6 / 255, -128, np.array(127, np.int8))
        file.op("MUL", [x, sixth], [y], "MulOptions")
    elif name == "quantize":
        y = made((1, side, side, c))
        file.op("QUANTIZE", [x], [y], "QuantizeOptions")
    else:
        y = made((1, side, side, c)) if name == "hard_swish" else file.tensor((1, side, side, c), 1 / 256, -128)
        file.op(name.upper(), [x], [y])
    images = rng.integers(-128, 128, (200, side, side, c)).astype(np.int8)
    return file.write(path / f"{name}.tflite", [x], [y]), images


POOLS = ("mean", "sum", "average_pool", "max_pool")
EXACT = ("conv", "depthwise", "padded conv", "add", "mul", *POOLS, "hard_swish", "quantize")
NEAR = ("linear", "logistic", "constant")  # LiteRT's own are in floating point, or rounded once


@pytest.mark.parametrize("name", EXACT)
def test_an_operator_is_litert_reference_kernel_bit_for_bit(name: str, tmp_path: Path) -> None:
    for seed in SEEDS:
        path, images = build(name, np.random.default_rng(seed), tmp_path)
        assert np.array_equal(run(read_tflite(path), images), run_lite(path, images)), seed


@pytest.mark.parametrize("kernels", ["optimized", "xnnpack"])
@pytest.mark.parametrize("name", EXACT + NEAR)
def test_an_operator_is_within_one_unit_of_litert_fast_kernels(name: str, kernels: str, tmp_path: Path) -> None:
    seen: set[int] = set()
    for seed in SEEDS:
        path, images = build(name, np.random.default_rng(seed), tmp_path)
        mine, theirs = run(read_tflite(path), images).astype(int), run_lite(path, images, kernels)
        assert np.abs(mine - theirs).max() <= 1, seed
        seen |= set(np.unique(mine).tolist())
    assert len(seen) > 100, "the comparison says something"


def test_it_does_not_follow_another_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images = build("conv", np.random.default_rng(0), tmp_path)
    net = read_tflite(path)

    def once(acc: Any, multiplier: Any, shift: Any) -> Any:
        return np.floor(acc * (multiplier.astype(float) * 2.0 ** (shift - 31)) + 0.5).astype(np.int64)

    monkeypatch.setattr("ofa.integer.run.rescale", once)
    difference = np.abs(run(net, images).astype(int) - run_lite(path, images))
    assert difference.max() == 1 and 0 < difference.mean() < 0.02


def test_weights_behind_the_flatbuffer_are_found(tmp_path: Path) -> None:
    path, images = build("conv", np.random.default_rng(0), tmp_path)
    want = run(read_tflite(path), images)
    raw = path.read_bytes()
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(raw, 0)
    file, tail = LiteFile(), b""
    file.model, base = model, len(raw) + 4096
    for buffer in model.buffers:
        if buffer.data is not None and len(buffer.data):
            buffer.offset, buffer.size = base + len(tail), len(buffer.data)
            tail += bytes(buffer.data)
            buffer.data = None
    file.graph = model.subgraphs[0]
    file.write(path, list(file.graph.inputs), list(file.graph.outputs))
    path.write_bytes(path.read_bytes().ljust(base, b"\0") + tail)
    assert np.array_equal(run(read_tflite(path), images), want)


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    path, _ = build("conv", np.random.default_rng(0), tmp_path)
    raw = path.read_bytes()
    with pytest.raises(UserError, match="does not exist"):
        read_tflite(tmp_path / "absent.tflite")
    for bad in (b"", b"not a file", raw[: len(raw) // 2], raw[:40]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"is no usable TFLite file .*export it again"):
            read_tflite(path)


def test_damaged_bytes_are_read_or_explained_and_never_crash(tmp_path: Path) -> None:
    path, _ = build("padded conv", np.random.default_rng(0), tmp_path)
    raw, rng, explained = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        bad = bytearray(raw)
        for place in rng.integers(8, len(raw), 4):
            bad[place] = rng.integers(256)
        path.write_bytes(bytes(bad))
        try:
            read_tflite(path)
        except UserError:
            explained += 1
    assert explained > 30


def test_what_has_no_integer_form_is_named(tmp_path: Path) -> None:
    file = LiteFile()
    x, y = file.tensor((1, 4, 4, 2), 0.1), file.tensor((1, 4, 4, 2), 0.1)
    file.op("TANH", [x], [y])
    with pytest.raises(UserError, match=r"operator TANH is not supported.*CONV_2D"):
        read_tflite(file.write(tmp_path / "a.tflite", [x], [y]))
    file = LiteFile()
    x, y = file.tensor((1, 4, 4, 2)), file.tensor((1, 4, 4, 2))
    file.op("HARD_SWISH", [x], [y])
    with pytest.raises(UserError, match="quantize weights and activations"):
        read_tflite(file.write(tmp_path / "b.tflite", [x], [y]))
    file = LiteFile()
    x, padded, y = (file.tensor((1, side, side, 2), 0.1) for side in (4, 6, 6))
    file.op("PAD", [x, file.tensor((4, 2), data=np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))], [padded])
    file.op("HARD_SWISH", [padded], [y])
    with pytest.raises(UserError, match="padding is read by an operator that has no window"):
        read_tflite(file.write(tmp_path / "c.tflite", [x], [y]))
    file = LiteFile()
    x, y, axes = file.tensor((1, 4, 4, 2), 0.1), file.tensor((1, 2), 0.1), np.array([1, 2], np.int32)
    file.op("SUM", [x, file.tensor((2,), data=axes)], [y], "ReducerOptions")
    with pytest.raises(UserError, match=r"a sum makes \(1, 1, 2\) of a map \(4, 4, 2\); only sums over one pixel"):
        read_tflite(file.write(tmp_path / "d.tflite", [x], [y]))


@pytest.mark.parametrize("name", [*EXACT, "linear"])
def test_an_operator_is_tensorflow_lite_micros_bit_for_bit(name: str, tmp_path: Path) -> None:
    tflm = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
    path, images = build(name, np.random.default_rng(0), tmp_path)
    micro, found = tflm.Interpreter.from_file(str(path), arena_size=1 << 20), []
    for image in images[:50, None]:
        micro.set_input(image, 0)
        micro.invoke()
        found.append(micro.get_output(0).ravel().copy())
    assert np.array_equal(run(read_tflite(path), images[:50]), np.stack(found))


def micro_mul_factor(a: Tensor, b: Tensor, y: Tensor) -> dict[str, int]:
    """What TensorFlow Lite Micro takes for the factor of a product: in 64 bits, where LiteRT computes it in 32."""
    multiplier, shift = quantize_multiplier(scale_of(a) * scale_of(b) / scale_of(y))
    return {"multiplier": int(multiplier), "shift": int(shift)}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, RESNET], ids=["mbconv", "bottleneck"])
def test_a_network_is_litert_and_micro_and_c_on_a_thousand_real_images(
    spec: NetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("litert_torch")
    images = torch.cat([images for images, _ in digits().batches("train", 250, 16, rng=None, limit=1000)])
    path = tmp_path / "net.tflite"
    LiteRT().export(random_net(spec), path, images[:64])
    net = read_tflite(path)
    q = quantize_images(net, images.numpy())
    mine = run(net, q)
    assert np.abs(mine.astype(int) - run_lite(path, q)).max() <= 1  # its linear layer rounds once
    micro, found = open_micro(path), []
    for image in q[:, None]:
        micro.set_input(image, 0)
        micro.invoke()
        found.append(micro.get_output(0)[0].copy())
    monkeypatch.setattr("ofa.integer.lite_ops.mul_factor", micro_mul_factor)
    assert np.array_equal(run(read_tflite(path), q), np.stack(found))
    if has_compiler("gcc"):
        export_c(net, tmp_path)
        assert np.array_equal(run_c(compile_c(tmp_path), q, mine.shape[1]), mine)

"""LiteRT (TensorFlow Lite): float or full int8 .tflite, from PyTorch through litert-torch.  N images, K classes.

The input is channels last, (1, H, W, C), as cameras give it and as TFLite's kernels want it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.compress.affine import drop_grids
from ofa.compress.equalize import uncapped
from ofa.errors import UserError, said
from ofa.export import flatbuffer
from ofa.export.latency import require_threads
from ofa.export.runtime import Call, Logits, inference, precision, require_bits, require_file, shape_of
from ofa.extras import extra, quiet
from ofa.files import atomic_write

EXTRA, PACKAGES = "tflite", ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
CALIBRATIONS = ("minmax", "average")


@dataclass(frozen=True, slots=True)
class LiteRT:
    """bits: 32 for float, 8 for int8 weights, activations, input and output.

    calibration: range of an activation over the calibration images: minmax takes the extremes; average the moving
    average of each image's extremes, the default of ai-edge-quantizer, which cuts off what most images lack (17 dB
    where minmax gives 30 dB, scripts/benchmarks/litert_int8.py).
    """

    bits: int = 8
    calibration: str = "minmax"

    def __post_init__(self) -> None:
        require_bits(self.bits)
        if self.calibration not in CALIBRATIONS:
            raise UserError(f"calibration {self.calibration!r} is not known; choose from {', '.join(CALIBRATIONS)}")

    @property
    def suffix(self) -> str:
        """How its files end."""
        return f".{precision(self.bits)}.tflite"

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write one flatbuffer with all weights inside; int8 leaves out grids of activations, with a warning."""
        content = convert(uncapped(drop_grids(net, "int8 LiteRT")) if self.bits == 8 else net, images)
        if self.bits == 8:
            content = quantize(content, images, self.calibration)
        atomic_write(path, flatbuffer.inline(content))

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K), one image after the other."""
        interpreter = open_interpreter(path, threads)
        into, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

        def one(x: NDArray[Any]) -> NDArray[Any]:
            interpreter.set_tensor(into["index"], x)
            interpreter.invoke()
            return interpreter.get_tensor(out["index"])

        return caller(one, into, out)

    def describe(self, path: Path) -> dict[str, Any]:
        """How many of each operator it runs, and the tensors at its fullest moment."""
        return {"operators": dict(flatbuffer.operators(path)), "live_bytes": flatbuffer.peak(path).bytes}


def convert(net: nn.Module, images: Tensor) -> bytes:
    """A float TFLite file of a network; raises UserError for an operator that it lacks."""
    litert_torch = extra("litert_torch", EXTRA)
    shape_of(images)
    plain = litert_torch.to_channel_last_io(inference(net), args=[0])
    with quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            edge = litert_torch.convert(plain.eval(), (images[:1].permute(0, 2, 3, 1).contiguous(),))
        except Exception as error:  # those of torch.export and of the converter share no narrower class
            raise UserError(f"LiteRT cannot take this network ({said(error)}); replace the operator it names") from None
        file = Path(folder, "float.tflite")
        edge.export(str(file))
        return file.read_bytes()


def quantize(content: bytes, images: Tensor, calibration: str = "minmax") -> bytes:
    """A float TFLite file in int8, ranges from images (N, C, H, W).

    Raises RuntimeError where an operator was not quantized, UserError where numbers are too large for int8 kernels.
    """
    quantizer = extra("ai_edge_quantizer.quantizer", EXTRA)
    calibrator, recipe = extra("ai_edge_quantizer.calibrator", EXTRA), extra("ai_edge_quantizer.recipe", EXTRA)
    update = extra("ai_edge_quantizer.utils.qsv_utils", EXTRA)
    rules = {"minmax": update.min_max_update, "average": update.moving_average_update}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "float.tflite")
        file.write_bytes(content)
        mode = calibrator.CalibrationMode.CALIBRATION
        watched = calibrator.CalibrationInterpreter(str(file), mode, rules[calibration])
        runner = watched.get_signature_runner()
        (name,) = runner.get_input_details()
        for image in images:
            runner(**{name: image[None].permute(0, 2, 3, 1).contiguous().numpy()})
        ranges = {name: _widened(found) for name, found in watched.get_calibration_results().items()}
        bounds = {name: (float(found["min"].min()), float(found["max"].max())) for name, found in ranges.items()}
        file.write_bytes(flatbuffer.with_room(content, bounds))
        made = quantizer.Quantizer(str(file), recipe.static_wi8_ai8())
        quantized = bytes(made.quantize(ranges).quantized_model)
    require_int8(quantized)
    flatbuffer.require_reach(quantized)
    return quantized


def _widened(found: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A calibrated range with 0 in it, and 0..1 where 0 is all: the quantizer's scale is one that kernels refuse."""
    low, high = np.minimum(found["min"], 0), np.maximum(found["max"], 0)
    return {**found, "min": low, "max": np.where(low == high, np.float32(1), high)}


def require_int8(content: bytes) -> None:
    """Raise RuntimeError where an operator of a quantized file still computes in float."""
    model, tables = flatbuffer.parse(content), flatbuffer.schema()
    graph, float32 = model.subgraphs[0], tables.TensorType.FLOAT32
    floats = [tensor.name for tensor in graph.tensors if tensor.type == float32]
    if floats:
        raise RuntimeError(f"quantization left {len(floats)} of {len(graph.tensors)} tensors in float: {floats[:3]}")


def open_interpreter(path: Path, threads: int = 1, *, reference: bool = False) -> Any:
    """LiteRT's interpreter of a file, ready to run; raises UserError, naming it, where it cannot be loaded.

    reference: on LiteRT's reference kernels instead of its fast ones, which round differently.
    """
    interpreter = extra("ai_edge_litert.interpreter", EXTRA)
    flatbuffer.read(path)
    require_threads(threads)
    try:
        with quiet():
            kinds = interpreter.OpResolverType
            kernels = {"experimental_op_resolver_type": kinds.BUILTIN_REF if reference else kinds.AUTO}
            found = interpreter.Interpreter(str(require_file(path)), num_threads=threads, **kernels)
            found.allocate_tensors()
        return found
    except (ValueError, RuntimeError) as error:
        raise UserError(f"LiteRT cannot load {path}: {said(error)}; export it again") from None


def caller(one: Callable[[NDArray[Any]], NDArray[Any]], into: Mapping[str, Any], out: Mapping[str, Any]) -> Call:
    """From a function of one raw input to one of images (N, C, H, W), which quantizes and dequantizes where needed."""

    def call(images: NDArray[np.float32]) -> Logits:
        raw = to_raw(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), into)
        return np.concatenate([from_raw(one(raw[i : i + 1]), out) for i in range(len(raw))])

    return call


def to_raw(x: NDArray[np.float32], details: Mapping[str, Any]) -> NDArray[Any]:
    """Values in the type of a tensor, rounded and clipped where that is an integer."""
    if details["dtype"] == np.float32:
        return x
    scale, zero = scale_of(details)
    limits = np.iinfo(details["dtype"])
    return np.clip(np.rint(x / scale) + zero, limits.min, limits.max).astype(details["dtype"])


def from_raw(x: NDArray[Any], details: Mapping[str, Any]) -> Logits:
    """Values of a tensor as numbers, (N, K)."""
    if details["dtype"] == np.float32:
        return np.array(x)
    scale, zero = scale_of(details)
    return ((x.astype(np.float32) - zero) * scale).astype(np.float32)


def scale_of(details: Mapping[str, Any]) -> tuple[np.float32, int]:
    """Scale and zero point of an integer tensor."""
    given = details["quantization_parameters"]
    return np.float32(given["scales"][0]), int(given["zero_points"][0])

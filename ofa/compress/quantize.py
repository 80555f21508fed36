"""Post-training quantization of an ONNX file to 8-bit integers, as QuantizeLinear / DequantizeLinear pairs (QDQ).

Activations are unsigned (ONNX Runtime runs these 1.4 to 5.8 times faster than signed ones on x86), weights signed, with
a scale for each output channel.  C, H, W: channels and sides of an image.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from ofa.errors import UserError
from ofa.export.graph import INPUT
from ofa.export.onnx import load_onnx
from ofa.files import atomic_write
from ofa.processor import saturates

METHODS = {"minmax": "MinMax", "percentile": "Percentile"}
QUANTIZED = ("Conv", "Gemm")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the ranges of activations are found.

    images: how many to calibrate on.  method: minmax takes the extremes over them, percentile leaves out the outermost
    100 - `percentile` percent.  per_channel: a weight scale for each output channel instead of one for each layer.
    reduce_range: weights of 7 bits, for x86 processors without VNNI, whose sums of two products saturate (None: where
    this machine's processor is one of them).

    ONNX Runtime's entropy method is left out: as its `quantize_static` calls it (128 bins, 128 levels), it gives
    MinMax's ranges at five times the time.
    """

    method: str = "minmax"
    images: int = 256
    percentile: float = 99.99
    per_channel: bool = True
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"calibration method {self.method!r} is not known; choose from {', '.join(METHODS)}")
        if self.images < 1:
            raise UserError(f"images {self.images} must be at least 1; some hundreds calibrate well")
        if not 50 < self.percentile <= 100:
            raise UserError(f"percentile {self.percentile} must be above 50 and at most 100; 99.99 is usual")


def quantize(
    source: str | Path, target: str | Path, batches: Iterable[Tensor], settings: Quantization
) -> dict[str, int]:
    """Write `source` (a float ONNX file) as int8 to `target`, calibrated on batches of normalised images (N, C, H, W).

    Returns: how many QuantizeLinear and DequantizeLinear nodes were put in.  Raises UserError for a damaged source or
    no images, RuntimeError where a convolution or linear layer was left in float.
    """
    from onnxruntime import quantization as ort

    model = load_onnx(source)
    ort.quant_utils.add_pre_process_metadata(model)  # shapes are known and batch norm is folded already
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "int8.onnx"
        ort.quantize_static(
            model,
            file,
            _Reader(batches, settings.images),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=settings.per_channel,
            reduce_range=saturates() if settings.reduce_range is None else settings.reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[METHODS[settings.method]],
            extra_options={"CalibPercentile": settings.percentile} if settings.method == "percentile" else {},
        )
        counts = check_quantized(onnx.load(file))
        atomic_write(target, file.read_bytes())
    return counts


def check_quantized(model: onnx.ModelProto) -> dict[str, int]:
    """Count Q/DQ nodes; raises RuntimeError unless every convolution and linear layer reads dequantized values alone.

    Converters have been seen to insert nothing and say nothing.
    """
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in QUANTIZED]
    floats = [node.name for node in layers if any(makers.get(x) != "DequantizeLinear" for x in node.input)]
    if floats or not layers:
        raise RuntimeError(f"quantization left {len(floats)} of {len(layers)} layers in float: {floats[:3]}")
    counts = Counter(makers.values())
    return {op: counts[op] for op in ("QuantizeLinear", "DequantizeLinear")}


class _Reader:
    """Calibration images as ONNX Runtime's CalibrationDataReader wants them: a batch, a batch, None."""

    def __init__(self, batches: Iterable[Tensor], images: int) -> None:
        self._feeds = self._read(batches, images)

    @staticmethod
    def _read(batches: Iterable[Tensor], images: int) -> Iterator[dict[str, Any]]:
        left = images
        for batch in batches:
            yield {INPUT: batch[:left].contiguous().numpy()}
            left -= len(batch)
            if left <= 0:
                return
        if left == images:
            raise UserError("quantization got no calibration images; give at least one batch")

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what ONNX Runtime's quantizer prints and the advice it writes to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)

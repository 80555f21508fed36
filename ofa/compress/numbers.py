"""What a network is worth after a step of compression: the same numbers for every kind of step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ofa.compress.affine import without_grids
from ofa.compress.chain import Work
from ofa.compress.layers import count, image_of
from ofa.compress.operations import bit_operations
from ofa.compress.packed import save_packed
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.export.graph import onnx_model
from ofa.export.latency import measure_onnx
from ofa.liveness import peak_elements


@dataclass(frozen=True, slots=True)
class Numbers:
    """One network, measured.

    accuracy: top-1 on the test images, 0 to 1.  macs: multiply-adds of an image that a dense runtime does.
    sparse_macs: those whose weight is not zero, which only a runtime for sparse weights would be left with.
    bit_operations: multiply-adds times the bits of the weight and of the input.  file_bytes: of the packed file.
    peak_memory_bytes: activations that PyTorch holds at once, float32, recorded on the running network; copies that
    simulate a quantized input do not count, nor does it save what runtimes for microcontrollers do.  latency_ms: median
    in ONNX Runtime, float32, one thread; None for a network that has no ONNX graph.
    """

    step: str
    accuracy: float
    macs: int
    sparse_macs: int
    bit_operations: int
    parameters: int
    file_bytes: int
    peak_memory_bytes: int
    latency_ms: float | None


def measure(step: str, net: nn.Module, work: Work, file: Path, *, images: int | None = None) -> Numbers:
    """Pack the network into `file` and measure it; `images` test images (None: all)."""
    image = image_of(net, work)
    counts = count(net, image)
    return Numbers(
        step=step,
        accuracy=accuracy(net, work.data, "test", resolution=work.resolution, limit=images),
        macs=counts.macs,
        sparse_macs=counts.sparse_macs,
        bit_operations=bit_operations(net, image),
        parameters=counts.parameters,
        file_bytes=save_packed(file, net.state_dict(), {"step": step, "resolution": work.resolution}),
        peak_memory_bytes=peak_elements(without_grids(net), image) * image.element_size(),
        latency_ms=_latency(net, image),
    )


def onnx_bytes(net: nn.Module, image: Tensor, *, grids: bool) -> bytes:
    """The network for images of such a shape (1, C, R, R) as the content of an ONNX file; grids: as for `onnx_model`.

    Raises UserError where it has no graph.
    """
    _, channels, height, width = image.shape
    try:
        return bytes(onnx_model(net, (channels, height, width), grids=grids).SerializeToString())
    except UserError:
        raise
    except Exception as error:  # whatever a network's own code raises when it is traced
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the network cannot be traced ({said}); it needs a forward without branches") from error


def _latency(net: nn.Module, image: Tensor) -> float | None:
    try:
        model = onnx_bytes(without_grids(net), image, grids=False)
    except UserError:
        return None
    return float(measure_onnx(model)["median_ms"])

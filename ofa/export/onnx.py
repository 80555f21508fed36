"""ONNX files: written, run in ONNX Runtime, compared with PyTorch.  N images, K classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofa.errors import UserError
from ofa.export.graph import INPUT, onnx_model
from ofa.export.latency import open_session
from ofa.files import atomic_write
from ofa.modules import evaluating
from ofa.static import StaticNet

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Verification:
    """How an exported file is proven: images compared with PyTorch, and how latency is measured.

    tolerance: largest difference of a float file's logits, relative to the largest logit.  threads, repeats: of ONNX
    Runtime's latency.
    """

    images: int = 1000
    tolerance: float = 1e-4
    threads: int = 1
    repeats: int = 101

    def __post_init__(self) -> None:
        if self.images < 2 or self.tolerance <= 0 or self.threads < 1 or self.repeats < 5:
            raise UserError(f"{self}: images must be at least 2, tolerance above 0, threads 1 and repeats 5 or more")


@dataclass(frozen=True, slots=True)
class Parity:
    """How closely logits follow those of a reference.

    max_abs: largest difference; max_relative: the same over the largest reference logit; sqnr_db: signal to noise in
    decibels, each class's mean over the images removed from both, since a constant offset says nothing about an image;
    agreement: share of images with the same first class.
    """

    images: int
    max_abs: float
    max_relative: float
    sqnr_db: float
    agreement: float


def export(net: StaticNet, path: str | Path) -> None:
    """Write the network as float32 ONNX: "input" (batch, C, H, W) to "output" (batch, classes), one file."""
    shape = (net.spec.in_channels, net.spec.resolution, net.spec.resolution)
    atomic_write(path, onnx_model(net, shape).SerializeToString())


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """The model in an ONNX file; raises UserError, naming the file, where it is absent or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; export the network first")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        return model
    except Exception as error:  # those of protobuf and of the checker share no narrower class
        raise UserError(f"{path} is no usable ONNX file ({str(error).splitlines()[0]}); export it again") from None


def weight_bytes(path: str | Path) -> int:
    """Bytes of a file's constants: weights, biases, scales and zero points; what any runtime must keep in flash."""
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in load_onnx(path).graph.initializer)


def weight_bits(path: str | Path) -> int:
    """Bits that the widest int8 weights of a file take: 7 where none is beyond 64 (`Quantization.reduce_range`), or 8.

    0 where it has no such weights.
    """
    weights = [tensor for tensor in load_onnx(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    values = (onnx.numpy_helper.to_array(tensor).astype(np.int16) for tensor in weights)
    most = max((int(np.abs(value).max(initial=0)) for value in values), default=0)
    return 8 if most > 64 else 7 if most else 0


def run_onnx(path: str | Path, images: Tensor, *, threads: int = 1, batch_size: int = 256) -> Logits:
    """Logits (N, K) of normalised images (N, C, H, W) from ONNX Runtime."""
    session = open_session(path, threads)
    return np.concatenate([_run(session, batch) for batch in images.split(batch_size)])


def run_torch(net: StaticNet, images: Tensor, *, batch_size: int = 256) -> Logits:
    """Logits (N, K) of normalised images (N, C, H, W) from PyTorch, in evaluation mode."""
    device = next(net.parameters()).device
    with evaluating(net), torch.inference_mode():
        logits = torch.cat([net(batch.to(device)) for batch in images.split(batch_size)])
    return logits.float().cpu().numpy()


def accuracy_onnx(path: str | Path, batches: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1) -> float:
    """Share of right first classes over batches of normalised images (N, C, H, W) and labels (N,)."""
    session = open_session(path, threads)
    right = [_run(session, images).argmax(1) == labels.numpy() for images, labels in batches]
    return float(np.concatenate(right).mean())


def compare(logits: Logits, reference: Logits) -> Parity:
    """Compare logits (N, K) with a reference, N at least 2."""
    error, centred = logits - reference, reference - reference.mean(0)
    noise = np.square(logits - logits.mean(0) - centred, dtype=np.float64).sum()
    signal = np.square(centred, dtype=np.float64).sum()
    tiny = np.finfo(np.float64).tiny
    return Parity(
        images=len(logits),
        max_abs=float(np.abs(error).max()),
        max_relative=float(np.abs(error).max() / max(np.abs(reference).max(), tiny)),
        sqnr_db=float(10 * (np.log10(max(signal, tiny)) - np.log10(max(noise, tiny)))),
        agreement=float((logits.argmax(1) == reference.argmax(1)).mean()),
    )


def require_parity(path: str | Path, parity: Parity, verification: Verification) -> None:
    """Raise RuntimeError where a float file does not compute what the network does."""
    if not parity.max_relative <= verification.tolerance:
        limit = f"export.tolerance {verification.tolerance:g}"
        raise RuntimeError(f"{path} differs from the network by {parity.max_relative:.2g}, more than {limit}")


def verify(path: str | Path, net: StaticNet, images: Tensor, *, threads: int = 1) -> Parity:
    """Compare the file's logits in ONNX Runtime with the network's in PyTorch on real, normalised images."""
    return compare(run_onnx(path, images, threads=threads), run_torch(net, images))


def _run(session: InferenceSession, images: Tensor) -> Logits:
    return np.asarray(session.run(None, {INPUT: np.ascontiguousarray(images.numpy())})[0])

"""What every runtime can do: write a network as its own file, load that file, run it.  N images, K classes.

A runtime is a frozen dataclass of its options, one YAML file under conf/runtime/.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.export.latency import interleaved, summary

Logits = NDArray[np.float32]
Call = Callable[[NDArray[np.float32]], Logits]
BITS = (8, 32)


class Runtime(Protocol):
    """One way to run a network."""

    @property
    def suffix(self) -> str:
        """How its files end, such as ".int8.tflite"."""

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write the network.  images: normalised, (N, C, H, W); they give the input's shape and calibrate int8.

        Raises UserError for an operator that the runtime lacks, and where the extra is not installed.
        """

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W), N at least 1, to logits (N, K).

        Raises UserError, naming it, for a file that is absent or damaged.
        """

    def describe(self, path: Path) -> dict[str, Any]:
        """What the file needs or is, beyond its size: such as arena_bytes or opset."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one file gave: median, 10th and 90th percentile of n times."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    threads: int


def run(runtime: Runtime, path: Path, images: Tensor, *, threads: int = 1, batch: int = 1) -> Logits:
    """Logits (N, K) of normalised images (N, C, H, W)."""
    call = runtime.load(path, threads)
    return np.concatenate([call(np.ascontiguousarray(part.numpy())) for part in images.split(batch)])


def latencies(
    calls: Mapping[str, Call], image: NDArray[np.float32], *, threads: int, repeats: int = 51, seconds: float = 60.0
) -> dict[str, Measured]:
    """Latency of one image (1, C, H, W) in every call, measured in turns, after a warm-up.

    threads: with which the calls were loaded.  seconds: stop after so long, but not before 5 times of each.
    """
    thunks = [_on(call, image) for call in calls.values()]
    times = interleaved(thunks, repeats=repeats, warmup=5, seconds=seconds)
    return {name: Measured(**summary(row), threads=threads) for name, row in zip(calls, times, strict=True)}


def require_file(path: Path) -> Path:
    """The path; raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; export the network first")
    return path


def require_bits(bits: int) -> None:
    """Raise UserError for a width that no runtime has."""
    if bits not in BITS:
        raise UserError(f"bits {bits} is not known; choose 8 (int8) or 32 (float)")


def precision(bits: int) -> str:
    """The middle of a file's name."""
    return "int8" if bits == 8 else "float"


def inference(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the CPU, whose tensors are laid out as exporters expect."""
    plain = copy.deepcopy(net).cpu().eval()
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.data = laid_out(tensor.data)
    return plain


def laid_out(x: Tensor) -> Tensor:
    """A copy whose strides are those of its shape, also where a side of 1 leaves them open; exporters keep them."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def shape_of(images: Tensor) -> tuple[int, int, int]:
    """Channels, height, width; raises UserError where there is no image."""
    if images.ndim != 4 or not len(images):
        raise UserError(f"images have shape {tuple(images.shape)}; give at least one, as (N, C, H, W)")
    return images.shape[1], images.shape[2], images.shape[3]


def _on(call: Call, image: NDArray[np.float32]) -> Callable[[], object]:
    return lambda: call(image)

"""ExecuTorch with its XNNPACK backend: float or int8 .pte, run through its Python runtime.  N images, K classes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.compress.affine import drop_grids
from ofa.errors import UserError, said
from ofa.export.latency import require_threads
from ofa.export.runtime import Call, Logits, inference, laid_out, precision, require_bits, require_file, shape_of
from ofa.extras import extra, quiet
from ofa.files import atomic_write

EXTRA, PACKAGES = "executorch", ("executorch",)
IDENTIFIER = b"ET"  # bytes 4 and 5 of a file
XNNPACK = "executorch.backends.xnnpack"
_pool: list[int] = []  # threads of this process' pool, once they are set


@dataclass(frozen=True, slots=True)
class ExecuTorch:
    """bits: 32 for float, 8 for int8 weights by channel and int8 activations, through PT2E."""

    bits: int = 8

    def __post_init__(self) -> None:
        require_bits(self.bits)

    @property
    def suffix(self) -> str:
        """How its files end."""
        return f".{precision(self.bits)}.pte"

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write a program for one image (1, C, H, W), in which XNNPACK runs all it can.

        int8 leaves out grids of activations, with a warning.
        """
        program = extra("executorch.exir", EXTRA)
        partitioner = extra(f"{XNNPACK}.partition.xnnpack_partitioner", EXTRA).XnnpackPartitioner
        shape_of(images)
        plain = inference(drop_grids(net, "int8 ExecuTorch") if self.bits == 8 else net)
        with quiet():
            if self.bits == 8:
                plain = _quantized(plain, images)
            try:
                exported = torch.export.export(plain, (laid_out(images[:1]),))
                edge = program.to_edge_transform_and_lower(exported, partitioner=[partitioner()])
                content = bytes(edge.to_executorch().buffer)
            except Exception as error:  # those of torch.export and of the backends share no narrower class
                raise UserError(
                    f"ExecuTorch cannot take this network ({said(error)}); replace the operator it names"
                ) from None
        atomic_write(path, content)

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K), one after the other.

        Its Python runtime has no call for the number of threads and takes all cores the process may run on when it
        first runs, so `threads` narrows those.
        """
        restrict(threads)  # first, as a loaded method holds the pool
        program, method = _method(path)

        def call(images: NDArray[np.float32]) -> Logits:
            assert program is not None, "kept alive: a method does not keep the program that it reads"
            parts = []
            for i in range(len(images)):
                given = laid_out(torch.from_numpy(images[i : i + 1]).clone())
                parts.append(method.execute([given])[0].clone().numpy())  # the next call writes over its output
            return np.concatenate(parts)

        return call

    def describe(self, path: Path) -> dict[str, Any]:
        """Planned bytes: of tensors outside the delegate only, so not the peak of what runs."""
        _method(path)
        tools = extra("executorch.exir._serialize._program", EXTRA)
        plan = tools.deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
        delegated = [delegate.id for delegate in plan.delegates]
        return {
            "planned_bytes": sum(plan.non_const_buffer_sizes),
            "planned_note": "tensors outside the delegate only; XNNPACK allocates its own, so this is not the peak",
            "delegates": delegated,
        }


def restrict(threads: int) -> None:
    """Let ExecuTorch's pool have so many threads, where its runtime offers it.

    The pool is one for the process, and loaded methods hold it, so it is set once.  Raises UserError below 1 and where
    the process has run with another number.
    """
    require_threads(threads)
    if _pool:
        if _pool[0] != threads:
            raise UserError(f"ExecuTorch has {_pool[0]} threads in this process; start another one for {threads}")
        return
    library = extra("executorch.extension.pybindings.portable_lib", EXTRA)
    setter = getattr(library, "_unsafe_reset_threadpool", None) or getattr(
        getattr(library, "_C", None), "_unsafe_reset_threadpool", None
    )
    if setter is not None:
        setter(threads)
    _pool.append(threads)


def _quantized(net: nn.Module, images: Tensor) -> nn.Module:
    """Through PT2E under XNNPACK's rules, which asserts that every layer reads integers."""
    from ofa.compress.pt2e import quantize

    rules = extra(f"{XNNPACK}.quantizer.xnnpack_quantizer", EXTRA)
    config = rules.get_symmetric_quantization_config(is_per_channel=True)
    return quantize(net, images.split(64), rules.XNNPACKQuantizer().set_global(config), dynamic=False)


def _method(path: Path) -> tuple[Any, Any]:
    """The program of a file and its forward method."""
    runtime = extra("executorch.runtime", EXTRA)
    content = require_file(path).read_bytes()
    try:
        if content[4:6] != IDENTIFIER:
            raise RuntimeError("it does not begin as one")
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = runtime.Runtime.get().load_program(path, verification=runtime.Verification.InternalConsistency)
            return program, program.load_method("forward")
    except Exception as error:  # RuntimeError, and what the bindings make of a bad flatbuffer
        raise UserError(f"{path} is no usable ExecuTorch program ({said(error)}); export it again") from None

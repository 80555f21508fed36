"""Small C kernels, compiled by the system's compiler at first use and kept in the user's cache folder.

Where there is no compiler, or OFA_KERNELS=0, everything runs on PyTorch's own operations instead.

Kept because a training step of a random ofa_mbv3_w1.0 subnet gains more than the 1.10x that was asked of them: on an
AMD EPYC with AVX2, one thread, batch 64, depthwise.c alone 1.9x at 32 px and 1.8x at 96 px (CPU time, medians of 5).
oneDNN's gradient of depthwise weights is the reason: 90 times slower than depthwise.c on (64, 480, 2, 2) with 3x3 taps,
5 times on (64, 144, 24, 24) with 5x5.  Under bfloat16 autocast images are bfloat16, and sums float32.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ofa.files import cache_folder
from ofa.processor import flags

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
WIDEST = 16  # channels that a kernel works on at a time, on processors with AVX-512
log = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of `name`.c, None where they cannot be had."""
    if os.environ.get("OFA_KERNELS") == "0":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    path = cache_folder() / f"{name}-{_key(source)}.so"
    try:
        if not path.exists():
            _compile(source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.info("%s runs on PyTorch's own operations: no compiled kernel (%s)", name, error)
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), str(error))
        log.warning(
            "%s.c does not compile, so that training is slower (%s); set CC to another compiler, or OFA_KERNELS=0 "
            "to leave it so",
            name,
            said,
        )
    return None


@cache
def keep_memory() -> bool:
    """Let the C library keep what is freed, for this whole process; whether it does (glibc alone can).

    Images and activations of one step are then written into the pages of the last, instead of new ones that the system
    has to clear first (`scripts/benchmarks/kept_memory.py`).  Memory once taken is given back at exit, and more of it
    is taken; OFA_KEEP_MEMORY=0 leaves it to the C library.
    """
    if os.environ.get("OFA_KEEP_MEMORY") == "0":
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 64 << 20))


def threads() -> int:
    """Threads of one call of a kernel: OFA_KERNEL_THREADS, by default 1.

    A kernel starts its threads anew in every call, while those of PyTorch's last operation still spin on their cores;
    where these are also busy with other work, a step takes ten times as long.
    """
    given = os.environ.get("OFA_KERNEL_THREADS", "1")
    return min(int(given), torch.get_num_threads()) if given.isdecimal() and int(given) > 0 else 1


def plain(x: Tensor, *weights: Tensor) -> bool:
    """Whether a kernel can work on images (N, C, H, W) and weights of a layer.

    That is: all are ordinary, images channels last, of float32 or, under autocast, of bfloat16; weights are contiguous
    or to be copied by the caller.
    """
    return (
        type(x) is Tensor
        and x.numel() > 0
        and x.shape[1] >= WIDEST
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        and x.dtype in (torch.float32, torch.bfloat16)
        and ordinary(*weights)
    )


def is_half(x: Tensor) -> bool:
    """Whether images that a kernel can work on are of bfloat16."""
    return x.dtype == torch.bfloat16


def ordinary(*tensors: Tensor) -> bool:
    """Whether all are float32 in CPU memory, and nobody traces, compiles or transforms."""
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _compile(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        line = [os.environ.get("CC", "cc"), *FLAGS, "-o", str(made), str(source)]
        subprocess.run(line, check=True, capture_output=True, text=True)
        os.replace(made, path)  # at once: other processes may be compiling too


def _key(source: Path) -> str:
    """Of the source, what it includes, the flags and the processor, since machines may share a home folder."""
    shared = "".join(header.read_text() for header in sorted(source.parent.glob("*.h")))
    text = source.read_text() + shared + " ".join(FLAGS) + platform.machine() + os.environ.get("CC", "cc") + flags()
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Plain C: an int8 network as C99 sources for a board, and the same sources as a library that runs here.

Beside `net.int8.so`, which is for this machine, lies the folder `net` of the sources.  N images, K classes.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.export.c import export_c
from ofa.export.c.build import CORE, has_compiler, library, measure
from ofa.export.latency import require_threads
from ofa.export.runtime import Call, Runtime, require_file, shape_of
from ofa.export.runtimes.litert import caller
from ofa.integer.convert import from_net

SUFFIX = ".int8.so"
COMPILERS = ("gcc",)
SECTIONS = slice(40, 48), slice(58, 60), slice(60, 62)  # of an ELF head: where its table lies, size and number of rows


@dataclass(frozen=True, slots=True)
class PlainC:
    """No options: int8, weights by channel, ranges of activations the extremes of the images."""

    @property
    def suffix(self) -> str:
        """How its files end."""
        return SUFFIX

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write the sources and compile them with gcc."""
        shape_of(images)
        export_c(from_net(net, images.split(64)), sources(path))
        library(sources(path), path)

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K), one after the other, on one thread."""
        require_threads(threads)
        code, values = _open(path), _defined(path)
        code.net_input.restype = code.net_run.restype = ctypes.POINTER(ctypes.c_int8)
        into, out = _details(values, "INPUT"), _details(values, "OUTPUT")

        def one(x: NDArray[Any]) -> NDArray[Any]:
            ctypes.memmove(code.net_input(), x.ctypes.data, x.nbytes)
            return np.ctypeslib.as_array(code.net_run(), shape=(1, int(values["OUTPUT_SIZE"]))).copy()

        return caller(one, into, out)

    def describe(self, path: Path) -> dict[str, Any]:
        """Bytes of the arena; of flash on a Cortex-M7, where its compiler is installed."""
        found: dict[str, Any] = {"arena_bytes": int(_defined(path)["ARENA_SIZE"])}
        if has_compiler():
            found[f"flash_bytes_{CORE}"] = measure(sources(path)).flash_bytes
        return found


def threads_of(runtime: Runtime, threads: int) -> int:
    """How many of the threads that are asked for a runtime has: plain C has one."""
    return 1 if isinstance(runtime, PlainC) else threads


def sources(path: Path) -> Path:
    """The folder of a library's sources."""
    return path.with_name(path.name.removesuffix(SUFFIX))


def _open(path: Path) -> ctypes.CDLL:
    """The library, from a copy: a file that is written anew while it is in use would end the process.

    One that was cut off is refused here, since the system's loader would crash on it.
    """
    content = require_file(path).read_bytes()
    table, size, rows = (int.from_bytes(content[part], "little") for part in SECTIONS)
    try:
        if content[:4] != b"\x7fELF" or table + size * rows > len(content):
            raise OSError("it is cut off or no library")
        with NamedTemporaryFile(suffix=".so") as copy:
            copy.write(content)
            copy.flush()
            return ctypes.CDLL(copy.name)
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}); export it again") from None


def _defined(path: Path) -> dict[str, float]:
    """The numbers in the sources' header, by their name without NET_."""
    header = require_file(sources(path) / "net.h").read_text()
    return {name: float(value) for name, value in re.findall(r"#define NET_(\w+) \(?(-?[\d.e+-]+)f?\)?", header)}


def _details(values: dict[str, float], end: str) -> dict[str, Any]:
    """As LiteRT describes a tensor."""
    scale, zero = values[f"{end}_SCALE"], int(values[f"{end}_ZERO"])
    return {"dtype": np.int8, "quantization_parameters": {"scales": [scale], "zero_points": [zero]}}

"""TensorFlow Lite Micro: an int8 .tflite in the interpreter that microcontrollers run, with the arena it takes.

The interpreter is TFLM's own, compiled for this machine: planned tensors are what a microcontroller plans, its own
tables have pointers of 64 bits where a Cortex-M's have 32.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.export import flatbuffer
from ofa.export.runtime import Call, require_file
from ofa.export.runtimes import litert
from ofa.export.runtimes.litert import EXTRA, LiteRT, caller, open_interpreter, to_raw
from ofa.extras import extra, quiet

PACKAGES = (*litert.PACKAGES, "tflite_micro")
ROOM = 64_000_000  # bytes of arena that the recording interpreter gets
ALIGNED = 16  # bytes, to which the interpreter moves the start of its arena
TRIAL = """
import sys
from pathlib import Path
from tflite_micro.python.tflite_micro.runtime import Interpreter

interpreter = Interpreter.from_bytes(Path(sys.argv[1]).read_bytes(), arena_size=int(sys.argv[2]))
interpreter.invoke()
"""
UNITS = 3  # by which TFLM may round apart from LiteRT's reference kernels


@dataclass(frozen=True, slots=True)
class Arena:
    """Bytes of SRAM that the interpreter needs: tensors it plans, its own tables, and more while it plans."""

    tensors: int
    tables: int
    planning: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.tensors + self.tables + self.planning


@dataclass(frozen=True, slots=True)
class Tflm:
    """calibration: as in LiteRT, which writes the file."""

    calibration: str = "minmax"

    @property
    def suffix(self) -> str:
        """How its files end."""
        return ".int8.tflite"

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Write an int8 file whose weights lie in the flatbuffer, which goes into flash as it is."""
        LiteRT(8, self.calibration).export(net, path, images)
        flatbuffer.require_inline(path.read_bytes())

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K), one after the other, on one thread."""
        interpreter = open_micro(path)
        into, out = interpreter.get_input_details(0), interpreter.get_output_details(0)

        def one(x: NDArray[Any]) -> NDArray[Any]:
            interpreter.set_input(x, 0)
            interpreter.invoke()
            return interpreter.get_output(0)

        return caller(one, details(into), details(out))

    def describe(self, path: Path) -> dict[str, Any]:
        """Bytes of arena, and the operators."""
        found = arena(path)
        return {
            "arena_bytes": found.total,
            "arena_tensors_bytes": found.tensors,
            "arena_tables_bytes": found.tables,
            "arena_planning_bytes": found.planning,
            "operators": dict(flatbuffer.operators(path)),
        }


def open_micro(path: Path) -> Any:
    """TFLM's interpreter; raises UserError, naming the file, where it is damaged or has an operator TFLM lacks."""
    runtime = extra("tflite_micro.python.tflite_micro.runtime", EXTRA)
    open_interpreter(path)  # checks every offset of the file, which TFLM follows unchecked
    content, said = require_file(path).read_bytes(), [""]
    try:
        flatbuffer.require_inline(content)
        with quiet() as said:
            return runtime.Interpreter.from_bytes(content, arena_size=ROOM)
    except RuntimeError as error:
        reason = " ".join(f"{said[0]} {error}".split())[:200]
        raise UserError(f"TensorFlow Lite Micro cannot run {path}: {reason}; export it again") from None


def arena(path: Path) -> Arena:
    """The least arena that the interpreter starts and runs one inference in."""
    interpreter = open_micro(path)
    into = interpreter.get_input_details(0)
    interpreter.set_input(np.zeros(into["shape"], into["dtype"]), 0)
    interpreter.invoke()
    with quiet() as said:
        interpreter.print_allocations()
    found = dict(re.findall(r"Arena allocation (total|head|tail) (\d+)", said[0]))
    if set(found) != {"total", "head", "tail"}:
        raise RuntimeError(f"TFLM's report has no arena: {said[0][:200]}")
    taken = int(found["head"]) + int(found["tail"])
    return Arena(int(found["head"]), int(found["tail"]), _least(path, taken) - taken)


def _least(path: Path, taken: int) -> int:
    """The least arena, which is what one inference took in a large one unless planning needs more: within 1 %."""
    low, high = taken, taken + ALIGNED
    while not _runs(path, high):
        if high == ROOM:
            raise RuntimeError(f"TFLM's interpreter runs {path} here, but not in a process of its own")
        low, high = high, min(2 * high, ROOM)
    if low == taken:
        return taken
    while high - low > 0.01 * low:
        middle = (low + high) // 2
        low, high = (low, middle) if _runs(path, middle) else (middle, high)
    return high


def _runs(path: Path, size: int) -> bool:
    """Whether an arena of `size` bytes is enough, in a process of its own, which one too small may end."""
    return subprocess.run([sys.executable, "-c", TRIAL, str(path), str(size)], capture_output=True).returncode == 0


def units_apart(path: Path, images: Tensor) -> int:
    """Largest difference between TFLM's and LiteRT's raw int8 outputs on images (N, C, H, W), reference kernels."""
    micro, lite = open_micro(path), open_interpreter(path, reference=True)
    into, out = lite.get_input_details()[0], lite.get_output_details()[0]
    apart = 0
    for image in images:
        raw = to_raw(np.ascontiguousarray(image[None].permute(0, 2, 3, 1).numpy()), into)
        lite.set_tensor(into["index"], raw)
        lite.invoke()
        micro.set_input(raw, 0)
        micro.invoke()
        a, b = micro.get_output(0).astype(int), lite.get_tensor(out["index"]).astype(int)
        apart = max(apart, int(np.abs(a - b).max()))
    return apart


def details(given: dict[str, Any]) -> dict[str, Any]:
    """TFLM's description of a tensor with LiteRT's names."""
    found = given["quantization_parameters"]
    return given | {"quantization_parameters": {"scales": found["scales"], "zero_points": found["zero_points"]}}

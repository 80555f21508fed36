"""Exported C compiled, run on this machine, and measured: flash, SRAM and stack of its objects."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ofa.errors import UserError
from ofa.integer.net import Int8

SOURCES = ("net.c", "kernels.c")  # what goes onto a board; main.c is an example
CHECKS = ("-std=c99", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SMALL = ("-Os", "-mthumb")  # for a microcontroller's flash
CORE = "cortex-m7"
ARM = "arm-none-eabi-gcc"
PACKAGES = "gcc-arm-none-eabi and libnewlib-arm-none-eabi"  # as Debian names them


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of compiled objects, in Unix's terms.

    text: code and constants; data: initialised variables, in flash and SRAM; bss: the arena.  stack: the deepest chain
    of calls, from the compiler's own figures, without interrupts and the caller.
    """

    text: int
    data: int
    bss: int
    stack: int
    compiler: str

    @property
    def flash_bytes(self) -> int:
        """What lies in flash."""
        return self.text + self.data

    @property
    def sram_bytes(self) -> int:
        """What the network takes of SRAM while it runs."""
        return self.data + self.bss + self.stack


def compile_c(folder: str | Path, *, flags: Sequence[str] = ("-O2",), compiler: str = "gcc") -> Path:
    """Build the example of an exported folder beside its sources; returns the program.

    Raises UserError where the compiler is absent, RuntimeError where it complains.
    """
    folder = Path(folder)
    program = folder / "main"
    names = [str(folder / name) for name in ("main.c", *SOURCES)]
    _compile([find(compiler), *CHECKS, *flags, "-o", str(program), *names])
    return program


def library(folder: str | Path, target: Path, *, flags: Sequence[str] = ("-O2",), compiler: str = "gcc") -> None:
    """Build an exported folder as a shared library for this machine; raises as `compile_c` does."""
    names = [str(Path(folder, name)) for name in SOURCES]
    made = target.with_name(f".{target.name}.new")  # a library that is open keeps its own file
    _compile([find(compiler), *CHECKS, *flags, "-shared", "-fPIC", "-o", str(made), *names])
    made.replace(target)


def run_c(program: str | Path, images: Int8, outputs: int) -> Int8:
    """Logits (N, outputs) of quantized images (N, H, W, C) from a compiled example; raises RuntimeError if it fails."""
    given = np.ascontiguousarray(images).tobytes()
    answer = subprocess.run([str(program)], input=given, capture_output=True, check=False)
    if answer.returncode or len(answer.stdout) != len(images) * outputs:
        raise RuntimeError(f"{program} failed ({answer.returncode}): {answer.stderr.decode(errors='replace')[-2000:]}")
    return np.frombuffer(answer.stdout, np.int8).reshape(len(images), outputs)


def measure(folder: str | Path, *, core: str = CORE, compiler: str = ARM) -> Sizes:
    """Compile what goes onto a board and read its sizes.  core: the processor, as the compiler's -mcpu names it.

    Raises UserError where the compiler is absent or does not know the core.
    """
    program, flags = find(compiler), (*SMALL, f"-mcpu={core}")
    if not _preprocesses([program, *flags], ""):
        raise UserError(f"core {core!r} is not one that {compiler} builds for; give its name, such as {CORE}")
    with tempfile.TemporaryDirectory() as place:
        for name in SOURCES:
            target = Path(place, name).with_suffix(".o")
            line = [program, *CHECKS, *flags, "-fstack-usage", "-c", "-o", str(target), str(Path(folder) / name)]
            _compile(line)
        objects = [str(Path(place, name).with_suffix(".o")) for name in SOURCES]
        size = program.removesuffix("gcc") + "size"
        table = subprocess.run([size, *objects], capture_output=True, text=True, check=True).stdout
        rows = [list(map(int, line.split()[:3])) for line in table.splitlines()[1:]]
        stack = _stack([Path(place, name).with_suffix(".su") for name in SOURCES])
    text, data, bss = (sum(column) for column in zip(*rows, strict=True))
    return Sizes(text, data, bss, stack, version(compiler))


def has_compiler(compiler: str = ARM) -> bool:
    """Whether a compiler is installed, with the C library's headers."""
    path = shutil.which(compiler)
    return path is not None and _preprocesses([path], "#include <string.h>\n")


def version(compiler: str) -> str:
    """The first line of what a compiler says of itself."""
    return subprocess.run(
        [find(compiler), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


def find(compiler: str) -> str:
    """The path of a compiler."""
    path = shutil.which(compiler)
    if path is None:
        package = PACKAGES.replace(" and", "") if compiler == ARM else "gcc"
        raise UserError(f"there is no {compiler} on this machine; install it (Debian: apt install {package})")
    return path


def _preprocesses(line: Sequence[str], text: str) -> bool:
    whole = [*line, "-E", "-x", "c", "-"]
    return subprocess.run(whole, input=text, text=True, capture_output=True, check=False).returncode == 0


def _compile(line: list[str]) -> None:
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(line)} failed: {answer.stderr[-2000:]}")


def _stack(files: Sequence[Path]) -> int:
    """net_run and, under it, the deepest kernel with the deepest function that is not inlined into it."""
    frames: dict[str, int] = {}
    for file in files:
        for line in file.read_text().splitlines():
            found = re.match(r".*:(\S+)\t(\d+)\t", line)
            assert found is not None, line
            frames[found[1]] = int(found[2])
    kernels = [size for name, size in frames.items() if name.startswith("ofa_")]
    inner = [size for name, size in frames.items() if not name.startswith(("ofa_", "net_"))]
    return frames["net_run"] + max(kernels) + sum(inner)

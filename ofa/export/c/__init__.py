"""Plain C of integer-only networks: C99 without malloc, one static arena, constants for flash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ofa.errors import UserError
from ofa.export.c.text import MAIN, MAKEFILE, Pixels, header, source
from ofa.files import atomic_write
from ofa.integer.net import IntegerNet
from ofa.integer.plan import Plan, plan

__all__ = ["CReport", "Pixels", "export_c"]
KERNELS = ("kernels.c", "kernels.h")


@dataclass(frozen=True, slots=True)
class CReport:
    """What was written.

    arena_bytes: RAM of the network, image and result among them; bound_bytes: what lives at its fullest operator, which
    no plan can go below; fullest: the tensor that this one writes.  weight_bytes: constants.
    """

    folder: Path
    files: tuple[str, ...]
    arena_bytes: int
    bound_bytes: int
    fullest: str
    weight_bytes: int


def export_c(net: IntegerNet, folder: str | Path, *, name: str = "network", pixels: Pixels | None = None) -> CReport:
    """Write a network as net.c, net.h, kernels.c, kernels.h, an example main.c and a Makefile into a folder.

    Compiled, `net_run` gives the same numbers as `ofa.integer.run.run`, bit for bit.  pixels: by what images are
    normalised, which net.h then says.  Raises UserError for a name that would end a comment.
    """
    if "*/" in name or "\n" in name:
        raise UserError(f"name {name!r} would end the comment it stands in; use letters")
    folder, planned = Path(folder), plan(net)
    files = {"net.h": header(net, planned, name, pixels), "net.c": source(net, planned, name)}
    files |= {"main.c": MAIN, "Makefile": MAKEFILE}
    files |= {kernel: Path(__file__).with_name(kernel).read_text() for kernel in KERNELS}
    for file, text in files.items():
        atomic_write(folder / file, text)
    return _report(net, planned, folder, tuple(files))


def _report(net: IntegerNet, planned: Plan, folder: Path, files: tuple[str, ...]) -> CReport:
    writer = net.ops[min(max(planned.fullest - 1, 0), len(net.ops) - 1)]  # the image lives before the first
    fullest = net.tensors[writer.y].name
    return CReport(folder, files, planned.arena, planned.bound, fullest, net.weight_bytes)

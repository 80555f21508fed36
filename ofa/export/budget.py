"""Proof that a file fits a device: each limit beside what was measured on what goes onto the device.

A microcontroller runs one of `MICRO`: TensorFlow Lite Micro, whose arena and file are measured, or plain C, whose
arena, constants and (with arm-none-eabi-gcc) sections are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ofa.errors import UserError
from ofa.export import flatbuffer
from ofa.export.c import Pixels, export_c
from ofa.export.c.build import CORE, PACKAGES, has_compiler, measure
from ofa.extras import installed
from ofa.limits import beyond, keeps, show

CLOSE = 0.1  # share by which a measured arena may differ from the predicted peak without a word
Limits = Mapping[str, float]
ELSEWHERE = {  # where costs come from that are not of a runtime's own files
    "macs": "exact",
    "params": "exact",
    "energy_uj": "an estimate from MACs and memory traffic",
    "latency_ms": "of the ONNX file in ONNX Runtime on this machine, not of this runtime",
}
SRAM, FLASH = "peak_memory_bytes", "weight_bytes"


class OverBudgetError(UserError):
    """A network that exceeds its device's limits."""


@dataclass(frozen=True, slots=True)
class Row:
    """One limit, the value beside it, and where that value comes from."""

    limit: str
    value: float
    max: float
    source: str

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return keeps(self.limit, self.value, self.max)


@dataclass(frozen=True, slots=True)
class Proof:
    """How one runtime fits one device; notes explain."""

    runtime: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether every limit is kept."""
        return all(row.met for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"met": self.met, "rows": [asdict(row) | {"met": row.met} for row in self.rows], "notes": self.notes}

    def lines(self) -> list[str]:
        """As a person reads it."""
        table = [
            f"{self.runtime}: {row.limit} {show(row.value)} of {show(row.max)}, {'met' if row.met else 'EXCEEDED'} "
            f"({row.source})"
            for row in self.rows
        ]
        return table + [f"{self.runtime}: {note}" for note in self.notes]


@dataclass(frozen=True, slots=True)
class Board:
    """What C files are for.  core: the processor, as arm-none-eabi-gcc names it.  pixels: how images are normalised."""

    core: str = CORE
    pixels: Pixels | None = None


CORTEX_M7 = Board()


def prove_tflm(net: nn.Module, images: Tensor, limits: Limits, exact: Limits, folder: Path, board: Board) -> Proof:
    """Export to TensorFlow Lite Micro and measure.  exact: costs that are known, such as macs; the predicted peak."""
    from ofa.export.runtimes.tflm import Tflm, arena

    file = folder / f"tflm{Tflm().suffix}"
    Tflm().export(net, file, images)
    found, fullest = arena(file), flatbuffer.peak(file)
    measured = {
        SRAM: (found.total, f"arena of {file.name} in TFLM's interpreter"),
        FLASH: (file.stat().st_size, f"{file.name}, which goes into flash whole; the interpreter's code is not in it"),
    }
    notes = explain(exact[SRAM], found.tensors, found.tables, fullest, found.planning)
    return Proof("tflm", _rows(limits, measured, exact), tuple(notes))


def prove_c(net: nn.Module, images: Tensor, limits: Limits, exact: Limits, folder: Path, board: Board) -> Proof:
    """Export as plain C; flash and SRAM of the compiled sections where there is a compiler, else of the plan."""
    from ofa.integer.convert import from_net

    report = export_c(from_net(net, images.split(64)), folder / "c", pixels=board.pixels)
    measured = {
        SRAM: (report.arena_bytes, "planned arena of the C sources, without stack"),
        FLASH: (report.weight_bytes, f"constants of the C sources; for the code too, install {PACKAGES}"),
    }
    if has_compiler():
        sizes = measure(folder / "c", core=board.core)
        compiled = f"compiled for {board.core}, {sizes.compiler}"
        measured = {
            SRAM: (sizes.sram_bytes, f".data, .bss and stack, {compiled}"),
            FLASH: (sizes.flash_bytes, f".text with constants and .data, without libraries, {compiled}"),
        }
    note, far = beside(report.arena_bytes, exact[SRAM])
    if far:
        note += (
            ", which is input, output and held shortcut of the fullest convolution or pool; the plan writes depthwise"
        )
        note += f" ones in place and counts scratch: {report.bound_bytes:,} live where {report.fullest} is written"
    return Proof("c", _rows(limits, measured, exact), (note,))


Prove = Callable[[nn.Module, Tensor, Limits, Limits, Path, Board], Proof]
MICRO: dict[str, tuple[Prove, str | None, str]] = {  # what measures, the module it needs, how to get that
    "tflm": (prove_tflm, "tflite_micro", 'pip install "ofa-nas[tflite]" for the arena of TensorFlow Lite Micro'),
    "c": (prove_c, None, ""),
}


def prove(
    names: list[str],
    net: nn.Module,
    images: Tensor,
    limits: Limits,
    exact: Limits,
    folder: Path,
    board: Board = CORTEX_M7,
) -> tuple[list[Proof], list[str]]:
    """A proof for each named runtime that is installed, and for the others a line on how to have it.

    Raises UserError for an unknown name, and what a runtime says that refuses the network, unless another proves it.
    """
    proofs: list[Proof] = []
    missing, refused = [], None
    for name in names:
        if name not in MICRO:
            raise UserError(f"device runtime {name!r} is not known; choose from {', '.join(MICRO)}")
        measure, module, remedy = MICRO[name]
        if module and not installed(module):
            missing.append(f"{name}: not measured; {remedy}")
            continue
        try:
            proofs.append(measure(net, images, limits, exact, folder, board))
        except UserError as error:
            refused = error
            missing.append(f"{name}: not measured; {error}")
    if refused and not proofs:
        raise refused
    return proofs, missing


def require_provable(device: str, names: list[str]) -> None:
    """Raise UserError where a device names runtimes to be proven in and none of them is installed."""
    needed = [MICRO[name][1] for name in names]
    if names and not any(module is None or installed(module) for module in needed):
        remedies = " or ".join(MICRO[name][2] for name in names)
        raise UserError(f"nothing here can prove device {device} in {', '.join(names)}; {remedies}, or name c, too")


def explain(predicted: float, tensors: int, tables: int, fullest: flatbuffer.Peak, planning: int = 0) -> list[str]:
    """The arena beside the predicted peak, and, where they are not within `CLOSE`, why, in numbers."""
    note, far = beside(tensors + tables + planning, predicted)
    early = [f"of it {planning:,} are needed before the first inference alone, for plans"] if planning else []
    if not far:
        return [note, *early]
    alive = ", ".join(f"{size:,}" for size in fullest.alive[:4])
    return [
        f"{note}, which counts the input, output and held shortcut of convolutions alone",
        f"of it {tables:,} are the interpreter's own tables, with pointers of 64 bits on this machine",
        (
            f"{fullest.bytes:,} are tensors alive at once at operator {fullest.index} ({fullest.operator}): {alive}; "
            f"{tensors - fullest.bytes:,} more lie idle between tensors, where the planner found no better place"
        ),
        *early,
    ]


def beside(arena: float, predicted: float) -> tuple[str, bool]:
    """An arena beside the predicted peak, and whether they are too far apart to leave it at that."""
    share = arena / predicted - 1
    return f"arena {arena:,.0f} bytes, {share:+.0%} of the predicted {predicted:,.0f}", abs(share) > CLOSE


def require(device: str, proofs: list[Proof], rows: list[dict[str, Any]], *, force: bool) -> str:
    """Raise OverBudgetError unless one proof, or without proofs every row, keeps the limits.

    force: tell what exceeds them instead.  Returns: that, or nothing.
    """
    if is_met(proofs, rows):
        return ""
    proven = [(proof.runtime, row.limit, row.value, row.max) for proof in proofs for row in proof.rows if not row.met]
    known = [("int8", row["limit"], row["value"], row["max"]) for row in rows if not row["met"]]
    where = {row["limit"]: f" (ONNX Runtime on {row['machine']})" for row in rows if "machine" in row}
    over = ", ".join(
        f"{name} {beyond(limit, value, most)}{where.get(limit, '')}" for name, limit, value, most in (proven or known)
    )
    if force:
        return f"{device}: accepted by force=true, {over}"
    raise OverBudgetError(
        f"{device}: not deployable, {over}; search with lower limits, or give force=true to accept it"
    )


def is_met(proofs: list[Proof], rows: list[dict[str, Any]]) -> bool:
    """Whether a device can run what ships: in one of its proven runtimes, or, without any, by exact costs."""
    return any(proof.met for proof in proofs) if proofs else all(row["met"] for row in rows)


def _rows(limits: Limits, measured: Mapping[str, tuple[float, str]], exact: Limits) -> tuple[Row, ...]:
    rows = []
    for name, most in limits.items():
        value, source = measured[name] if name in measured else (exact[name], ELSEWHERE.get(name, "of the ONNX file"))
        rows.append(Row(name, float(value), float(most), source))
    return tuple(rows)

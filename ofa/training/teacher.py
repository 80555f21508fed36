"""Frozen teachers: the largest net as some phase found it, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ofa.distill.elastic import stage_units
from ofa.distill.taps import Outputs, Tap
from ofa.inference import fast
from ofa.schedule import Phase, Schedule
from ofa.space import Space
from ofa.static import build
from ofa.weights import load_tensors, load_weights


def taken(schedule: Schedule, index: int, folder: Path) -> list[Path]:
    """Files to write when a phase begins: of its own teacher, and, mostly at the second, of all that follow."""
    phases = schedule.phases
    full = [i for i, phase in enumerate(phases) if phase.teacher == "full"]
    found = [_file(folder, phases[index])] if phases[index].teacher == "previous" else []
    return found + ([_file(folder, phases[full[0]])] if full and index == min(1, full[0]) else [])


def _file(folder: Path, phase: Phase) -> Path:
    own = f"-{phase.name}" if phase.teacher == "previous" else ""  # the full one is no phase's
    return folder / f"teacher{own}.safetensors"


Teacher = Callable[[Tensor], Outputs]


def load_teacher(
    folder: Path, phase: Phase, space: Space, device: torch.device, *, features: bool = False
) -> Teacher | None:
    """The frozen teacher of a phase, in evaluation mode; None where it has none.

    features: whether its outputs hold the maps of its stages and the classifier's input besides logits.
    """
    if phase.teacher not in ("previous", "full"):
        return None
    path = _file(folder, phase)
    net = build(space, space.decode(space.largest())[0])
    load_weights(net, load_tensors(path)[0], path)
    net = net.to(device).eval()
    if features:
        return Tap(net, stage_units(net.spec.units), embedding=True)
    quick = fast(net)
    return lambda x: Outputs(quick(x))

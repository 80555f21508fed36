"""A stage that several processes share, as torchrun starts them: the first one locks, writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig

from scripts.progress import Progress
from scripts.stage import Stage, open_stage

if TYPE_CHECKING:
    from ofa.parallel import World

Made = TypeVar("Made")


@contextmanager
def shared_stage(
    cfg: DictConfig, name: str, reads: Sequence[str], world: World, *, needs: Sequence[str] = ()
) -> Iterator[Stage]:
    """`open_stage` by the first process; the others get what it found."""
    if world.first:
        with open_stage(cfg, name, reads, needs=needs, launch=_launch()) as stage:
            world.told(stage)
            yield stage
    else:
        yield world.told(Stage.__new__(Stage))


@contextmanager
def shared_progress(title: str, world: World) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """The first process's `Progress`; what the others call instead shows nothing."""
    if world.first:
        with Progress(title) as progress:
            yield progress
    else:
        yield lambda values: None


def _launch() -> str | None:
    """The torchrun that started this process, and starts another one in its place after a kill; None without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    return f"{parent} {Path(f'/proc/{parent}/stat').read_text().rpartition(')')[2].split()[19]}"  # and when it started


def in_turn(world: World, make: Callable[[], Made]) -> Made:
    """What `make` returns, in each process; in the first one before the others, which find what it cached."""
    made = make() if world.first else None
    world.wait()
    return make() if made is None else made

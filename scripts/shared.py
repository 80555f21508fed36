"""A stage that several processes share, as torchrun starts them: the first one locks, writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """`open_stage` by the first process; the others get what it found.

    A worker that torchrun started again goes on, whatever `restart` says: that was obeyed when the run began.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        cfg.restart = False
    if world.first:
        with open_stage(cfg, name, reads, needs=needs) as stage:
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


def in_turn(world: World, make: Callable[[], Made]) -> Made:
    """What `make` returns, in each process; in the first one before the others, which find what it cached."""
    made = make() if world.first else None
    world.wait()
    return make() if made is None else made

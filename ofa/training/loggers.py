"""TensorBoard and Weights & Biases: what a run reports, as curves.  log.jsonl is always written beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ofa.errors import UserError
from ofa.extras import extra, require
from ofa.files import read_json, write_json

Report = Callable[[Mapping[str, Any]], None]


@contextmanager
def open_loggers(names: str | Sequence[str], folder: Path, about: Mapping[str, Any]) -> Iterator[list[Report]]:
    """Loggers of a run in `folder`, each a function of what the Trainer reports; leaving the block closes them.

    names: "tensorboard", "wandb", or a list of these.  about: the run's configuration.  Raises UserError for an unknown
    name or a missing package.  Weights & Biases follows its own environment: WANDB_MODE=offline needs no account.
    """
    wanted: list[Any] = list(names) if isinstance(names, list | tuple) else [names]
    if unknown := [name for name in wanted if name not in LOGGERS]:
        raise UserError(f"logger {unknown[0]} is not known; choose from {', '.join(LOGGERS)}, or [] for none")
    opened = []
    try:
        for name in wanted:
            opened.append(LOGGERS[name](folder, about))
        yield [log for log, _ in opened]
    finally:
        for _, close in opened:
            close()


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what a Trainer reports, as "epoch/val/largest" or "step/loss"."""
    part = "epoch" if "val" in values else "step"
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{part}/{name}/{key}": each for key, each in value.items() if _number(each)}
        elif _number(value) and name not in ("step", "steps", "epochs"):
            found[f"{part}/{name}"] = value
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensorboard(folder: Path, about: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    require("tensorboard", "log")
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def log(values: Mapping[str, Any]) -> None:
        if not writers or "rollback" in values:  # what a killed run drew from here on is hidden, and what is undone
            close()
            done = int("rollback" in values)
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=values["step"] + done))
        for name, value in scalars(values).items():
            writers[-1].add_scalar(name, value, values["step"])

    def close() -> None:
        for writer in writers:
            writer.close()

    return log, close


def _wandb(folder: Path, about: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    wandb = extra("wandb", "log")
    path = folder / "wandb.json"  # the same curve goes on when a killed run does
    known = read_json(path)["id"] if path.exists() else None
    run = wandb.init(project="ofa-nas", dir=folder, id=known, resume="allow", config=dict(about))
    write_json(path, {"id": run.id})

    def log(values: Mapping[str, Any]) -> None:
        run.log(
            scalars(values) | {"training_step": values["step"]}
        )  # wandb's own count cannot go back, a rollback does

    return log, run.finish


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}

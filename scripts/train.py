"""ofa-train: train the supernet."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.files import write_json
from scripts.cli import make, stage_command
from scripts.parts import TRAIN, load_parts, require_images
from scripts.progress import Progress
from scripts.shared import in_turn, shared_stage
from scripts.stage import holds, note, plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from ofa.data import ImageData
    from ofa.finetune import Finetuning
    from ofa.space import Space
    from ofa.supernet import Supernet
    from predictors import Accuracy

    Report = Callable[[dict[str, Any]], None]


@stage_command("space", "data", "augment", "schedule", "train")
def main(cfg: DictConfig) -> None:
    """Train one supernet that holds every network of the space.  Writes <run>/train."""
    from ofa.parallel import Parallel, processes

    options = plain(cfg.train)
    with processes(options["device"]) as (world, device), shared_stage(cfg, "train", TRAIN, world) as stage:
        if stage.done:
            return
        from ofa.train import Trainer
        from ofa.training.gradients import Scale
        from ofa.training.loggers import open_loggers
        from ofa.training.profiling import profiled
        from ofa.training.rollback import Safety
        from ofa.training.watch import Watch

        tuning = _tuning(options["rank"])
        data, space = in_turn(world, lambda: load_parts(cfg))
        if world.first:
            require_images(cfg, data, fresh=not holds(stage.folder))
        note(cfg.run, data=data.describe())
        names = ("precision", "accumulate", "compile")
        scale = Scale(world, Parallel(**options["parallel"]), **{name: options[name] for name in names})
        with ExitStack() as stack:
            progress = stack.enter_context(Progress("train"))
            remedy = "lower lr" if cfg.schedule.get("clip_norm") else "lower lr or set schedule.clip_norm"
            reports: list[Report] = [lambda values: _show(progress, values, remedy)]
            loggers = options["loggers"] if world.first else []
            reports += stack.enter_context(open_loggers(loggers, stage.folder, plain(cfg)))
            if options["profile"] and world.first:
                reports.append(stack.enter_context(profiled(stage.folder)))
            supernet = Trainer(
                space,
                data,
                make(cfg.schedule),
                stage.folder,
                seed=cfg.seed,
                watch=Watch(**options["watch"]),
                save_seconds=options["save_seconds"],
                device=device,
                initial=options["initial"],
                scale=scale,
                safety=Safety(**options["rollback"]),
                average=options["average"],
                learn=lambda genes, top1: _predictor(space, cfg.seed).fit(genes, top1),
                report=lambda values: _tell(reports * world.first, values),
            ).run()
        if tuning is not None and world.first:
            _rank(supernet, data, tuning, options, stage.folder, cfg.seed)


def _tell(reports: list[Report], values: dict[str, Any]) -> None:
    for report in reports:
        report(values)


def _predictor(space: Space, seed: int) -> Accuracy:
    """What a phase that prefers some nets learns to rank them with."""
    from predictors import Accuracy

    return Accuracy(space, seed=seed)


def _tuning(rank: dict[str, Any]) -> Finetuning | None:
    """How nets are fine-tuned to be ranked after training (None: none is); UserError, before it, for a mistake."""
    from ofa.finetune import Finetuning
    from ofa.training.ranking import require_nets

    if not rank["nets"]:
        return None
    require_nets(rank["nets"])
    return Finetuning(epochs=rank["epochs"], lr=rank["lr"])


def _rank(
    supernet: Supernet, data: ImageData, settings: Finetuning, options: dict[str, Any], folder: Path, seed: int
) -> None:
    """Fine-tune some nets and write how far inherited accuracy ranks them."""
    from ofa.training.ranking import rank_correlation

    nets, images = options["rank"]["nets"], options["watch"]["images"]
    with Progress("rank") as progress:
        found = rank_correlation(
            supernet, data, settings, folder / "ranks.jsonl", nets=nets, images=images, seed=seed, report=progress
        )
        tau = found["kendall_tau"]
        shown = "none, as accuracies are all equal" if tau is None else f"{tau:.3f}"
        progress.print(f"Kendall tau of inherited and fine-tuned accuracy: {shown} ({nets} nets)")
    write_json(folder / "ranks.json", found)


def _show(progress: Progress, values: dict[str, Any], remedy: str) -> None:
    if back := values.get("rollback"):
        text = f"{back['reason']}; back to step {back['back_to_step']} with {back['lr_factor']:g} of the learning rate"
        progress.print(f"rollback: {text}")
        return
    if "val" not in values:
        progress.values.pop("measured", None)
        progress(values)
        return
    progress.values["accuracy"] = values["val"]["largest"]
    scores = "  ".join(f"{name} {100 * top1:.1f}" for name, top1 in values["val"].items())
    progress.print(f"epoch {values['epoch']}/{values['epochs']} {values['phase']}: validation top-1 (%) {scores}")
    if values["diverged"]:
        loss = f"the loss of {values['loss']:.4g} is over twice that of guessing"
        progress.print(f"warning: no net is above chance, and {loss}; {remedy}")
    if names := ", ".join(values["collapsed"]):
        progress.print(f"warning: nets that collapsed: {names}; {remedy}")


if __name__ == "__main__":
    main()

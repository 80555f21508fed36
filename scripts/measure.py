"""ofa-measure: accuracy of sampled subnets, latency of layers and of whole networks."""

from __future__ import annotations

import json
import sys
from functools import partial

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import load_space
from scripts.cli import stage_command
from scripts.parts import MEASURE, load_parts, load_trained, require_images, require_learner, require_whole
from scripts.progress import Progress
from scripts.stage import note, open_stage, plain


@stage_command("measure")
def main(cfg: DictConfig) -> None:
    """Measure subnets of the trained supernet, and latencies on this machine.  Writes <run>/measure."""
    require_enough(cfg)
    with open_stage(cfg, "measure", MEASURE, needs=("train",)) as stage:
        if stage.done:
            return
        from ofa.export.latency import measure_networks
        from ofa.files import atomic_write
        from predictors.choose import choose_spread, choose_subnets, measure_subnets
        from predictors.latency_table import measure_table
        from predictors.measure import SubnetAccuracy
        from predictors.shapes import space_shapes

        data, space = load_parts(cfg)
        require_images(cfg, data)
        note(cfg.run, data=data.describe())  # ofa-import reads none
        options, log, load = cfg.measure, stage.folder / "subnets.jsonl", partial(load_trained, plain(cfg))
        total = min(options.subnets, space.size)
        rule = {"rule": options.choose, "n": options.subnets, "batch": options.batch, "seed": cfg.seed}
        with (
            Progress("measure accuracy") as progress,
            SubnetAccuracy(
                space, load, log, images=options.images, workers=cfg.workers, total=total, report=progress
            ) as measure,
        ):
            genes, top1 = measure_subnets(space, measure, **rule)
            measure.settle(genes)
        if options.int8_subnets:
            log = stage.folder / "subnets_int8.jsonl"
            with (
                Progress("measure int8 accuracy") as progress,
                SubnetAccuracy(
                    space, load, log, images=options.images, int8=True, workers=cfg.workers, report=progress
                ) as measure,
            ):
                some = choose_spread(genes, top1, options.int8_subnets)
                measure(some)
                measure.settle(some)
        with Progress("measure layers") as progress:
            table = stage.folder / "latency.parquet"
            measure_table(space_shapes(space), table, threads=options.threads, progress=progress.update)
        whole = choose_subnets(space, options.latency_nets, cfg.seed + 1)
        rows = measure_networks(space, whole, threads=options.threads)
        atomic_write(stage.folder / "latency_nets.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def require_enough(cfg: DictConfig) -> None:
    """Raise UserError where fewer networks are to be measured, or to be had, than ofa-fit learns from and tests on."""
    from predictors.fitting import LEAST, require_scored

    require_scored(**plain(cfg.fit))
    require_whole(cfg, "measure.batch", "measure.threads")
    require_whole(cfg, "measure.images", null=True)
    if "accuracy" not in cfg.predictor:
        raise UserError(f"predictor=[{','.join(cfg.predictor)}] leaves out accuracy, which ofa-fit learns; add it")
    space = load_space(plain(cfg.space))
    require_learner(cfg, space)
    if space.size < LEAST["subnets"]:
        raise UserError(
            f"space {space.name} holds {space.size} networks, too few for ofa-fit to learn from; "
            f"give choices that make at least {LEAST['subnets']}"
        )
    for name, least in LEAST.items():
        given, none = cfg.measure[name], name == "int8_subnets"
        if given < least and not (none and given == 0):
            raise UserError(
                f"measure.{name}={given} is too few for ofa-fit to learn from; give at least {least}"
                + ", or 0 for none" * none
            )
    if "accuracy_int8" in cfg.predictor and not cfg.measure.int8_subnets:
        raise UserError(
            "predictor=int8 learns from quantized subnets, measure.int8_subnets=0; "
            f"give at least {LEAST['int8_subnets']}, or leave out predictor=int8"
        )


def command() -> None:
    """The command: `ofa-measure latency model=... runtime=... threads=...` is `ofa-latency` with the same options."""
    if sys.argv[1:2] != ["latency"]:
        main()
        return
    from scripts.latency import main as latency

    del sys.argv[1]
    latency()


if __name__ == "__main__":
    command()

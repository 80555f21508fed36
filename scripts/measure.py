"""ofa-measure: accuracy of sampled subnets, latency of layers and of whole networks."""

from __future__ import annotations

import json

from omegaconf import DictConfig

from scripts.cli import stage_command
from scripts.parts import MEASURE, load_parts, trained
from scripts.progress import Progress
from scripts.stage import open_stage


@stage_command("measure")
def main(cfg: DictConfig) -> None:
    """Measure subnets of the trained supernet, and latencies on this machine.  Writes <run>/measure."""
    with open_stage(cfg, "measure", MEASURE, needs=("train",)) as stage:
        if stage.done:
            return
        from ofa.export.latency import measure_subnets
        from ofa.files import atomic_write
        from predictors.latency_table import measure_table
        from predictors.measure import choose_subnets, measure_accuracy
        from predictors.shapes import space_shapes

        data, space = load_parts(cfg)
        options = cfg.measure
        subnets = choose_subnets(space, options.subnets, cfg.seed)
        with Progress("measure accuracy") as progress:
            supernet, log = trained(cfg, space), stage.folder / "subnets.jsonl"
            measure_accuracy(supernet, subnets, data, log, images=options.images, report=progress)
        with Progress("measure layers") as progress:
            table = stage.folder / "latency.parquet"
            measure_table(space_shapes(space), table, threads=options.threads, progress=progress.update)
        whole = choose_subnets(space, options.latency_nets, cfg.seed + 1)
        rows = measure_subnets(space, whole, threads=options.threads)
        atomic_write(stage.folder / "latency_nets.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

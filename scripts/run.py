"""ofa-run: every stage, one after the other."""

from __future__ import annotations

from omegaconf import DictConfig

from scripts import export, fit, measure, report, search, specialize, train
from scripts.cli import stage_command

SECTIONS = (
    *("space", "data", "schedule", "train", "measure", "predictor", "fit"),
    *("search", "agent", "device", "compress", "export", "runtime"),
)


@stage_command(*SECTIONS)
def main(cfg: DictConfig) -> None:
    """Train, measure, fit, search, specialize, export, report: the whole job.  Finished stages are not run again."""
    for stage in (train, measure, fit, search, specialize):
        stage.main(cfg)
    from ofa.export.budget import OverBudgetError

    try:
        export.main(cfg)
    except OverBudgetError:
        report.main(cfg)
        raise
    report.main(cfg)


if __name__ == "__main__":
    main()

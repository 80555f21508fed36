"""ofa-run: every stage, one after the other."""

from __future__ import annotations

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts import export, fit, measure, report, search, specialize, train
from scripts.cli import stage_command
from scripts.deploy import require_runtimes
from scripts.onnx_files import limits_of
from scripts.stage import plain

SECTIONS = (
    *("space", "data", "schedule", "train", "measure", "predictor", "fit"),
    *("search", "agent", "device", "compress", "export", "runtime"),
)


@stage_command(*SECTIONS)
def main(cfg: DictConfig) -> None:
    """Train, measure, fit, search, specialize, export, report: the whole job.  Finished stages are not run again.

    Where no network fits one of the devices, or one exceeds its limits, the others are finished all the same.
    """
    from ofa.export.budget import OverBudgetError

    measure.require_enough(cfg)
    search.check(cfg)
    specialize.check(cfg)
    require_runtimes(cfg)
    for name, device in plain(cfg.device).items():
        limits_of(name, device["limits"], learned=True)
    for stage in (train, measure, fit):
        stage.main(cfg)
    failed: list[UserError] = []
    for stage in (search, specialize, export):
        try:
            stage.main(cfg)
        except (search.OutOfReachError, OverBudgetError) as error:
            failed.append(error)
    report.main(cfg)
    if failed:
        raise failed[0] if len(failed) == 1 else UserError("; ".join(map(str, failed)))


if __name__ == "__main__":
    main()

"""ofa-fit: predictors of accuracy and latency, with their honest scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from scripts.cli import stage_command
from scripts.parts import FIT, learner, load_parts
from scripts.stage import open_stage, plain


@stage_command("predictor", "fit")
def main(cfg: DictConfig) -> None:
    """Fit predictors of accuracy and latency, scored on networks that no fit saw.  Writes <run>/fit."""
    with open_stage(cfg, "fit", FIT, needs=("measure",)) as stage:
        if stage.done:
            return
        from ofa.files import write_json, write_parquet
        from predictors import Latency, LatencyTable
        from predictors.fitting import fit_accuracy, fit_latency, join
        from predictors.measure import read_measured
        from predictors.transfer import TransferredAccuracy

        _, space = load_parts(cfg)
        measured = Path(cfg.run, "measure")
        genes, top1 = read_measured(measured / "subnets.jsonl", space, "accuracy")
        accuracy, report, predictions = fit_accuracy(learner(cfg, space), genes, top1, seed=cfg.seed, **plain(cfg.fit))
        lookup = Latency(space, LatencyTable.load(measured / "latency.parquet"))
        genes, times = read_measured(measured / "latency_nets.jsonl", space, "median_ms")
        _, latency, more = fit_latency(lookup, genes, times)
        accuracy.save(stage.folder / "accuracy.json")
        write_json(stage.folder / "space.json", space.to_dict())
        write_parquet(stage.folder / "predictions.parquet", join([predictions, more]))
        found = {"accuracy": report, "latency": latency}
        quantized = measured / "subnets_int8.jsonl"
        if quantized.exists():
            transferred = TransferredAccuracy(space, accuracy).fit(*read_measured(quantized, space, "accuracy"))
            transferred.save(stage.folder / "accuracy_int8.json")
            found["accuracy_int8"] = transferred.scores
        write_json(stage.folder / "fit.json", found)
        for line in (*_scores(report, latency), *_transferred(found.get("accuracy_int8"))):
            print(line)


def _scores(accuracy: dict[str, Any], latency: dict[str, Any]) -> Iterator[str]:
    tau, rmse, regret = accuracy["tau"], accuracy["rmse"], accuracy["regret"]
    yield (
        f"accuracy ({accuracy['model']}, {accuracy['n_fit']} subnets): Kendall tau "
        f"{tau['mean']:.3f} ± {tau['std']:.3f}, RMSE {100 * rmse['mean']:.2f} points "
        f"on {accuracy['n_heldout']} held-out subnets, {accuracy['repeats']} splits"
    )
    yield (
        f"  the best of its top {regret['top']} is {100 * regret['mean']:.2f} points behind the best of them; "
        f"{accuracy['coverage_50']:.0%} and {accuracy['coverage_90']:.0%} fall into its 50 % and 90 % intervals"
    )
    curve = (f"{row['tau']:.3f} ± {row['tau_std']:.3f} from {row['n']}" for row in accuracy["curve"])
    yield f"  Kendall tau by subnets measured: {', '.join(curve)}"
    ranked = f"Kendall tau {latency['tau']:.3f}, " if latency["n_heldout"] > 2 else ""
    yield (
        f"latency ({latency['shapes']} layer shapes): {ranked}error {latency['mape']:.1%}, "
        f"{latency['within_10_percent']:.0%} within 10 % on {latency['n_heldout']} held-out networks"
    )


def _transferred(scores: dict[str, Any] | None) -> Iterator[str]:
    if scores is not None:
        yield (
            f"accuracy after int8, from {scores['n']} quantized subnets, each left out in turn: RMSE "
            f"{100 * scores['rmse']:.2f} points, Kendall tau {scores['kendall_tau']:.3f} (the float network's "
            f"prediction unchanged: {100 * scores['float_rmse']:.2f} points, {scores['float_kendall_tau']:.3f})"
        )


if __name__ == "__main__":
    main()

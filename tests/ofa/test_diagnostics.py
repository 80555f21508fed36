"""What training says about itself, and what it does when it goes wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from ofa.blocks import elastic
from ofa.data import ImageData, digits
from ofa.drop import Drop
from ofa.errors import UserError
from ofa.files import append_jsonl, read_jsonl
from ofa.finetune import Finetuning
from ofa.modules import activation
from ofa.schedule import Phase, Schedule
from ofa.space import Space, load_space
from ofa.spec import Unit
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.average import Average
from ofa.training.gradients import Gradients, Scale
from ofa.training.loggers import open_loggers, scalars
from ofa.training.optimizer import make_optimizer
from ofa.training.profiling import profiled
from ofa.training.ranking import rank_correlation
from ofa.training.rollback import Safety
from ofa.training.step import Step
from ofa.training.trained import load_supernet
from ofa.training.watch import Watch, diverged

WATCH = Watch(random_nets=0, images=100, calibration=100)
ONE = {"resolution": [12], "width": [0.5], "depth": 1, "expand": 1, "kernel": 1}


def spoiled(folder: Path, data: ImageData, space: Space, attempts: int) -> tuple[Trainer, list[dict[str, Any]]]:
    """A run of one small net whose classifier is lost once, in the third of four epochs; and what it reported."""
    schedule = Schedule((Phase("all", 4, 0.1, rule="largest"),), batch_size=32)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    run = Trainer(small, data, schedule, folder, watch=WATCH, safety=Safety(attempts))
    seen: list[dict[str, Any]] = []

    def report(values: dict[str, Any]) -> None:
        seen.append(dict(values))
        if values["step"] == 3 * run.steps_per_epoch - 1 and not any("rollback" in each for each in seen):
            with torch.no_grad():
                linear = run.supernet.units[-1].linear
                linear.weight.zero_()
                linear.bias.zero_()[0] = 1e4  # one class for every image, whatever one more step does

    run.report = report
    run.run()
    return run, seen


def test_a_collapse_goes_back_to_the_last_good_epoch_with_half_the_rate(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    run, seen = spoiled(tmp_path, data, space, attempts=3)
    (back,) = [values["rollback"] for values in seen if "rollback" in values]
    assert back == read_jsonl(tmp_path / "rollbacks.jsonl")[0]
    assert back["back_to_step"] == 2 * run.steps_per_epoch and back["lr_factor"] == 0.5
    collapsed = [values for values in seen if values.get("collapsed")]
    assert len(collapsed) == 1 and collapsed[0]["epoch"] == 3
    log = read_jsonl(tmp_path / "log.jsonl")
    assert [line["epoch"] for line in log] == [1, 2, 3, 4] and not any(line["collapsed"] for line in log)
    rates = {values["step"]: values["lr"] for values in seen if "loss" in values and "val" not in values}
    phase, end = run.schedule.phases[0], int(run.ends[-1])
    assert rates[end] == pytest.approx(0.5 * run.schedule.rate(phase, (end - 1) / end))
    again = Trainer(run.space, data, run.schedule, tmp_path, watch=WATCH)
    again._resume()
    assert again.rollbacks.factor("all") == 0.5, "a run that is started again keeps the lower rate"


def test_without_attempts_a_collapse_is_a_warning_in_the_log_beside_speed_and_memory(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    run, seen = spoiled(tmp_path, data, space, attempts=0)
    assert not any("rollback" in values for values in seen) and not (tmp_path / "good").exists()
    log = read_jsonl(tmp_path / "log.jsonl")
    assert log[2]["collapsed"] == ["largest", "smallest"]
    rates = [values["lr"] for values in seen if "loss" in values and "val" not in values]
    assert rates[-1] == pytest.approx(run.schedule.rate(run.schedule.phases[0], 1 - 1 / int(run.ends[-1])))
    assert log[0]["images_per_s"] == pytest.approx(run.steps_per_epoch * 32 / log[0]["seconds"])
    assert 50e6 < log[0]["peak_rss_bytes"] < 1e12


def test_a_loss_that_stays_infinite_ends_the_run_after_as_many_rollbacks_as_allowed(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    wild = Schedule((Phase("wild", 1, 1e20, rule="largest"),), batch_size=32, warmup=0.0)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="lower the phase's lr"):
        Trainer(small, data, wild, tmp_path, watch=WATCH, safety=Safety(2)).run()
    assert [line["lr_factor"] for line in read_jsonl(tmp_path / "rollbacks.jsonl")] == [0.5, 0.25]
    assert (tmp_path / "good/checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="attempts -1"):
        Safety(-1)


def test_a_rate_under_which_nothing_is_learned_is_a_warning(tmp_path: Path, data: ImageData, space: Space) -> None:
    """Batch norm keeps every number finite."""
    wild = Schedule((Phase("wild", 1, 1e3, rule="largest"),), batch_size=32, warmup=0.0, clip_norm=5.0)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    Trainer(small, data, wild, tmp_path, watch=WATCH).run()
    (line,) = read_jsonl(tmp_path / "log.jsonl")
    assert line["diverged"] and not line["collapsed"] and line["loss"] > 2 * math.log(10)
    assert diverged({"a": 0.1, "b": 0.05}, 5.0, 10, 0.1) and not diverged({"a": 0.2}, 5.0, 10, 0.1)
    assert not diverged({"a": 0.1}, 2.4, 10, 0.1), "as before any training"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("units.10.linear.bias", "the loss is nan at step 5 of phase all"),
        ("units.0.conv.weight", "weights are not fin"),
    ],
)
def test_a_step_that_is_not_finite_is_undone_and_training_goes_on(
    spoil: str, reason: str, tmp_path: Path, data: ImageData, space: Space
) -> None:
    schedule = Schedule((Phase("all", 0.5, 0.1, rule="largest"),), batch_size=32)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    run = Trainer(small, data, schedule, tmp_path, watch=WATCH)
    seen: list[dict[str, Any]] = []

    def report(values: dict[str, Any]) -> None:
        seen.append(dict(values))
        if values["step"] == 5 and not any("rollback" in each for each in seen):
            with torch.no_grad():
                run.supernet.get_parameter(spoil).fill_(torch.nan)

    run.report = report
    supernet = run.run()
    (line,) = read_jsonl(tmp_path / "rollbacks.jsonl")
    assert reason in line["reason"] and line["back_to_step"] == 0
    assert all(tensor.isfinite().all() for tensor in supernet.state_dict().values())


def test_gradients_that_float16_cannot_hold_are_undone_like_a_loss_that_is_not_finite(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    schedule = Schedule((Phase("all", 1, 0.1, rule="largest"),), batch_size=32)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    run = Trainer(small, data, schedule, tmp_path, watch=WATCH, safety=Safety(1), scale=Scale(precision="float16"))
    run.supernet.units[-1].linear.bias.register_hook(lambda gradient: gradient * torch.inf)
    words = "gradients overflow float16 at step 16 of phase all"
    with pytest.raises(UserError, match=rf"{words} .*; give train\.precision=bfloat16; .* or lower the phase's lr"):
        run.run()
    (line,) = read_jsonl(tmp_path / "rollbacks.jsonl")
    assert line["reason"].startswith(words) and line["lr_factor"] == 0.5


def test_the_average_is_the_weighted_mean_of_the_weights() -> None:
    space = load_space("digits_mbv3").restrict(**ONE)  # type: ignore[arg-type]
    torch.manual_seed(0)
    supernet = Supernet(space)
    average, weight = Average(supernet, 0.9), supernet.units[0].conv.weight
    expected = weight.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            weight.normal_()
        average.update(supernet)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.supernet.units[0].conv.weight, expected)
    with pytest.raises(UserError, match="average 1"):
        Average(supernet, 1.0)


def test_averaged_weights_have_a_file_of_their_own_and_an_accuracy_in_the_log(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    schedule = Schedule((Phase("all", 0.3, 0.1, rule="largest"),), batch_size=32)
    run = Trainer(small, data, schedule, tmp_path, watch=WATCH, average=0.5)
    run.run()
    assert set(read_jsonl(tmp_path / "log.jsonl")[0]["val_average"]) == {"largest", "smallest"}
    last, mean = (load_supernet(tmp_path, small, weights=which) for which in ("last", "average"))
    assert torch.equal(last.units[0].conv.weight, run.supernet.units[0].conv.weight)
    assert run.average and torch.equal(mean.units[0].conv.weight, run.average.supernet.units[0].conv.weight)
    assert not torch.equal(last.units[0].conv.weight, mean.units[0].conv.weight)
    (tmp_path / "average.safetensors").unlink()
    with pytest.raises(UserError, match=r"train with train\.average"):
        load_supernet(tmp_path, small, weights="average")
    with pytest.raises(UserError, match="with an average"):
        Trainer(small, data, schedule, tmp_path, watch=WATCH)._resume()


def drop(path: float, features: float = 0.0) -> Drop:
    return Drop(path, features, np.random.default_rng(0))


@pytest.mark.parametrize("act", ["relu", "h_swish"])
@pytest.mark.parametrize("kind", ["conv", "mbconv", "bottleneck"])
@torch.no_grad()
def test_drop_path_skips_the_branch_for_a_share_of_the_images_and_scales_it_for_the_rest(kind: str, act: str) -> None:
    unit = Unit(kind=kind, cin=8, cout=8, mid=8, kernel=3, act=act, shortcut=True)
    block, x = elastic(unit, (3,)).eval(), torch.randn(2000, 8, 2, 2)
    kept = drop(0.4).branch(x, unit, 0.5)
    assert kept is not None
    out, after = block(x, unit, kept), activation(act if kind == "bottleneck" else "none")
    if kind == "bottleneck":
        block.act = nn.Identity()
    branch, skipped = block(x, unit) - x, kept.flatten() == 0
    assert skipped.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(out[skipped], after(x[skipped]))
    torch.testing.assert_close(out[~skipped], after(x + branch / 0.8)[~skipped])
    assert drop(0.4).branch(x, replace(unit, shortcut=False), 1.0) is None


def test_dropout_keeps_the_mean() -> None:
    out = drop(0.0, 0.25).before_classifier(torch.ones(100, 64, 1, 1))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert out.max().item() == pytest.approx(1 / 0.75)


def test_the_last_block_that_an_architecture_keeps_drops_most(space: Space) -> None:
    supernet = Supernet(space)
    x, seen = torch.rand(2, 1, 16, 16), {}

    class Spy(Drop):
        def branch(self, x: Tensor, unit: Unit, place: float) -> Tensor | None:
            places.extend([place] if unit.shortcut else [])
            return None

    for name, genes in {"largest": space.largest(), "smallest": space.smallest()}.items():
        places: list[float] = []
        supernet(x, space.decode(genes)[0], Spy(0.2, 0.0, np.random.default_rng(0)))
        seen[name] = places
    assert seen["largest"] == [pytest.approx((i + 1) / len(seen["largest"])) for i in range(len(seen["largest"]))]
    assert len(seen["smallest"]) < len(seen["largest"]) and seen["smallest"][-1:] in ([1.0], [])


def test_parts_of_a_batch_and_processes_drop_differently(space: Space) -> None:
    def masks(accumulate: int, rank: int) -> list[Tensor]:
        schedule, seen = Schedule((Phase("all", 1, 0.1, rule="largest"),), batch_size=32, dropout=0.5), []
        torch.manual_seed(0)
        supernet, data = Supernet(space), digits()
        gradients = Gradients(supernet, 32, Scale(accumulate=accumulate))
        gradients.scale = replace(gradients.scale, world=replace(gradients.scale.world, rank=rank))
        step = Step(supernet, make_optimizer(supernet, schedule), gradients, schedule, data.augment, seed=0)
        supernet.units[-1].register_forward_pre_hook(lambda unit, inputs: seen.append(inputs[0].detach() == 0))
        x, y = next(data.batches("train", 32, 16, rng=None))
        step(schedule.phases[0], space, 0, 0.1, torch.cat([x[:16], x[:16]]), y, None, None)
        return seen

    whole, parts, other = masks(1, 0), masks(2, 0), masks(1, 1)
    assert len(whole) == len(other) == 1 and len(parts) == 2
    assert (parts[0] != parts[1]).float().mean() > 0.1, "the same images, other features"
    assert (whole[0] != other[0]).float().mean() > 0.1


def test_only_the_largest_net_is_regularized_where_the_schedule_says_so(
    tmp_path: Path, data: ImageData, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase, dropped = Phase("all", 0.05, 0.01, random_nets=1), []
    forward, largest = Supernet.forward, space.decode(space.largest())[0]

    def spy(self: Supernet, x: Tensor, arch: Any, drop: Drop | None = None) -> Tensor:
        dropped.append((arch == replace(largest, resolution=arch.resolution), drop is not None))
        return forward(self, x, arch, drop)

    monkeypatch.setattr(Supernet, "forward", spy)
    for which in ("largest", "all"):
        dropped.clear()
        schedule = Schedule((phase,), batch_size=32, dropout=0.2, drop_path=0.2, regularize=which)
        Trainer(space, data, schedule, tmp_path / which, watch=WATCH).run()
        assert {is_largest for is_largest, _ in dropped} == {True, False}
        assert all(drops == (is_largest or which == "all") for is_largest, drops in dropped)


def test_rank_correlation_is_that_of_its_lines_and_each_net_is_trained_once(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    supernet, path = Supernet(space), tmp_path / "ranks.jsonl"
    settings = Finetuning(epochs=0.1, batch_size=32)
    found = rank_correlation(supernet, data, settings, path, nets=3, images=50)
    lines = read_jsonl(path)
    expected = kendalltau([line["inherited"] for line in lines], [line["finetuned"] for line in lines]).statistic
    assert len(lines) == 3 and found["kendall_tau"] == pytest.approx(expected)
    calls: list[Any] = []
    rank_correlation(supernet, data, settings, path, nets=3, images=50, report=calls.append)
    assert not calls
    with pytest.raises(UserError, match="at least 3"):
        rank_correlation(supernet, data, settings, path, nets=1)


def test_nets_of_equal_accuracy_have_no_rank_correlation(tmp_path: Path, data: ImageData, space: Space) -> None:
    path = tmp_path / "ranks.jsonl"
    for top1 in (0.5, 0.6, 0.7):
        append_jsonl(path, {"inherited": 0.1, "finetuned": top1})
    found = rank_correlation(Supernet(space), data, Finetuning(), path, nets=3)
    assert found["kendall_tau"] is None and found["p"] is None


def test_a_profile_is_a_trace_of_steps(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with profiled(tmp_path) as step:
        for i in range(8):
            net(torch.rand(1, 2)).sum().backward()
            step({"step": i})
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


EPOCH = {"step": 7, "steps": 9, "epoch": 1, "epochs": 2, "loss": 0.5, "val": {"largest": 0.9}, "collapsed": []}


def test_loggers_get_numbers_under_names() -> None:
    assert scalars(EPOCH) == {"epoch/epoch": 1, "epoch/loss": 0.5, "epoch/val/largest": 0.9}
    assert scalars({"step": 1, "steps": 9, "phase": "full", "loss": 2.0}) == {"step/loss": 2.0}


def test_a_logger_that_is_unknown_or_not_installed_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="choose from tensorboard, wandb"), open_loggers(["mlflow"], tmp_path, {}):
        pass
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        words = rf'{name} is not installed; install it with: pip install "ofa-nas\[log\]"'
        with pytest.raises(UserError, match=words), open_loggers([name], tmp_path, {}):
            pass


def test_tensorboard_holds_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_loggers("tensorboard", tmp_path, {}) as (log,):
        log(EPOCH)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("epoch/val/largest")
    assert point.step == 7 and point.value == pytest.approx(0.9)


def test_tensorboard_hides_what_a_killed_run_drew_beyond_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, loss in ((range(1, 6), 9.0), (range(4, 7), 1.0)):
        with open_loggers("tensorboard", tmp_path, {}) as (log,):
            for step in steps:
                log({"step": step, "loss": loss})
        time.sleep(1.1)  # the files' names have seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [
        *((s, 9) for s in (1, 2, 3)),
        (4, 1),
        (5, 1),
        (6, 1),
    ]


def test_tensorboard_hides_what_a_rollback_undid(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_loggers("tensorboard", tmp_path, {}) as (log,):
        for step in range(1, 6):
            log({"step": step, "loss": 9.0})
        log({"step": 3, "rollback": {"factor": 0.5}})
        for step in (4, 5):
            log({"step": step, "loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 9), (2, 9), (3, 9), (4, 1), (5, 1)]


def test_wandb_keeps_one_curve_for_a_run_that_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    ids = []
    for _ in range(2):
        with open_loggers(["wandb"], tmp_path, {"seed": 0}) as (log,):
            log(EPOCH)
        ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert ids[0] == ids[1] and list((tmp_path / "wandb").glob("offline-run-*"))


def test_memory_is_this_process_and_not_its_parent_s() -> None:
    line = "from ofa.training.watch import peak_rss as p; a = p(); x = bytearray(300_000_000); print(a, p())"
    filled = b"x" * 1_500_000_000
    before, after = map(int, subprocess.check_output([sys.executable, "-c", line], text=True).split())
    assert before < len(filled) < before + len(filled), "the parent holds more than the child ever did"
    assert after >= before + 250_000_000


def test_the_epochs_nets_are_measured_in_the_precision_of_training(
    tmp_path: Path, data: ImageData, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, seen = Schedule((Phase("all", 1, 0.1, rule="largest"),), batch_size=512), []

    def validate(self: Watch, *others: Any) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return {"largest": 1.0}

    monkeypatch.setattr(Watch, "validate", validate)
    small = space.restrict(**ONE)  # type: ignore[arg-type]
    for precision in ("float32", "bfloat16"):
        Trainer(small, data, schedule, tmp_path / precision, watch=WATCH, scale=Scale(precision=precision)).run()
    assert seen == [False, torch.bfloat16]

"""Training: phases follow one another, a killed run ends as an uninterrupted one, mistakes lose nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ofa.data import Augment, ImageData
from ofa.distill import label_loss, soft_label_loss
from ofa.errors import UserError
from ofa.files import read_jsonl
from ofa.sampling import draw
from ofa.schedule import Phase, Schedule
from ofa.space import Space, load_space
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.optimizer import make_optimizer, set_rate
from ofa.training.rollback import Safety
from ofa.training.trained import load_supernet, start_from
from ofa.training.watch import Watch, collapsed
from ofa.weights import load_tensors, save_tensors
from predictors import Macs

WATCH = Watch(random_nets=1, images=60, calibration=60)
FULL = Phase("full", 0.1, 0.05, rule="largest", keep={"kernel": 1, "depth": 1, "expand": 1, "width": 1})
REST = Phase("rest", 0.15, 0.05, sort_channels=True)
FIXED = Phase("fixed", 0.1, 0.05, rule="random", random_nets=2, teacher="previous")


def schedule(**changes: object) -> Schedule:
    return replace(Schedule((FULL, REST, FIXED), batch_size=16), **changes)  # type: ignore[arg-type]


def trainer(folder: Path, data: ImageData, space: Space, **changes: object) -> Trainer:
    return Trainer(space, data, schedule(**changes), folder, watch=WATCH, save_seconds=0.0)


def test_training_starts_from_a_supernet_file_whose_ends_may_differ(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    supernet, file = Supernet(space), tmp_path / "supernet.safetensors"
    save_tensors(file, supernet.state_dict())
    same = Trainer(space, data, schedule(), tmp_path / "same", initial=file).supernet.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in supernet.state_dict().items())
    other = space.adapt(in_channels=3, classes=7)
    started = Trainer(other, data, schedule(), tmp_path / "other", initial=file).supernet.state_dict()
    last = f"units.{len(supernet.units) - 1}.linear.weight"
    assert started[last].shape[0] == 7
    fresh = {name for name, tensor in supernet.state_dict().items() if not torch.equal(started[name], tensor)}
    assert fresh == {"units.0.conv.weight", last, last.replace("weight", "bias")}
    with pytest.raises(UserError, match="does not fit this network"):
        Trainer(load_space("cifar_mbv3"), data, schedule(), tmp_path / "wrong", initial=file)


class Killed(BaseException):
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "supernet.safetensors")[0]


EVERYTHING: dict[str, object] = {"muon": 0.1, "dropout": 0.2, "drop_path": 0.2, "clip_value": 1.0, "gradient": "sum"}
ATTENTIVE = Phase("attentive", 0.15, 0.05, prefer="worst", candidates=3, measured=10, sort_channels=True)


def test_a_folder_of_another_training_is_refused(tmp_path: Path, data: ImageData, space: Space) -> None:
    trainer(tmp_path, data, space).run()
    trainer(tmp_path, data, space).run()
    with pytest.raises(UserError, match="holds a training with another schedule; give the same one, or another folder"):
        trainer(tmp_path, data, space, weight_decay=0.1).run()
    with pytest.raises(UserError, match="another seed"):
        Trainer(space, data, schedule(), tmp_path, seed=1, watch=WATCH).run()


@pytest.mark.parametrize("everything", [False, True])
def test_a_run_killed_at_any_step_ends_as_an_uninterrupted_one(
    everything: bool, tmp_path: Path, data: ImageData, space: Space
) -> None:
    augment = Augment(operations=1, erase=0.5, mixup=0.5, cutmix=0.5)

    def make(name: str) -> Trainer:
        if not everything:
            return trainer(tmp_path / name, data, space)
        augmented, phases = replace(data, augment=augment), (FULL, ATTENTIVE, replace(FIXED, teacher="full"))
        return Trainer(
            space,
            augmented,
            schedule(phases=phases, **EVERYTHING),
            tmp_path / name,
            watch=WATCH,
            save_seconds=0.0,
            average=0.9,
            learn=lambda genes, top1: Macs(space),
        )

    whole = make("whole")
    whole.run()
    assert whole.ends.tolist() == [7, 18, 25]
    for stop in (8, 19) if everything else (1, 7, 8, 18, 19, 24):
        killed = make("killed")

        def kill(values: dict[str, object], at: int = stop) -> None:
            if values["step"] == at:
                raise Killed

        killed.report = kill
        with pytest.raises(Killed):
            killed.run()
    make("killed").run()
    for file in ("supernet", "average") if everything else ("supernet",):
        expected, found = (load_tensors(tmp_path / name / f"{file}.safetensors")[0] for name in ("whole", "killed"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [read_jsonl(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [(line["epoch"], line["loss"], line["val"]) for line in logs[0]] == [
        (line["epoch"], line["loss"], line["val"]) for line in logs[1]
    ]


def test_another_seed_gives_other_weights(tmp_path: Path, data: ImageData, space: Space) -> None:
    one = Schedule((FULL,), batch_size=16)
    for seed in (0, 1):
        Trainer(space, data, one, tmp_path / str(seed), seed=seed, watch=WATCH).run()
    assert not torch.equal(*(weights(tmp_path / seed)["units.0.conv.weight"] for seed in ("0", "1")))


def test_the_loss_falls(tmp_path: Path, data: ImageData, space: Space) -> None:
    losses: list[float] = []
    phase = Phase("all", 2, 0.05, random_nets=0)
    run = Trainer(space, data, Schedule((phase,), batch_size=32), tmp_path, watch=WATCH)
    run.report = lambda values: losses.append(values["loss"]) if "val" not in values else None
    run.run()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_biases_move_at_their_own_rate(tmp_path: Path, data: ImageData, space: Space) -> None:
    def first_step(times: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        phases = (Phase("one", 1 / (data.size("train") // 32), 0.05),)
        schedule = Schedule(phases, batch_size=32, warmup=0.0, bias_lr=times)
        run = Trainer(space, data, schedule, tmp_path / str(times), watch=WATCH)
        before = {name: p.detach().clone() for name, p in run.supernet.named_parameters()}
        run.run()
        return before, {name: p.detach() - before[name] for name, p in run.supernet.named_parameters()}

    before, plain = first_step(1.0)
    _, faster = first_step(8.0)
    for name, moved in plain.items():
        times = 8.0 if name.endswith("bias") else 1.0
        torch.testing.assert_close(
            faster[name], times * moved, atol=1e-6 * (1 + float(before[name].abs().max())), rtol=1e-3
        )
    assert any(name.endswith("bias") and moved.abs().max() > 1e-4 for name, moved in plain.items())


@pytest.mark.parametrize("muon", [0.0, 0.1])
def test_without_momentum_the_steps_are_those_of_plain_descent(space: Space, muon: float) -> None:
    supernet = Supernet(space)
    optimizer = make_optimizer(supernet, Schedule((FULL,), momentum=0.0, muon=muon, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    for _ in range(2):
        for p in supernet.parameters():
            p.grad = torch.ones_like(p)
        set_rate(optimizer, 0.1)
        optimizer.step()
    for name, p in supernet.named_parameters():
        if not muon or p.ndim < 4:
            torch.testing.assert_close(p.detach(), before[name] - 0.2)


def test_the_first_phase_leaves_what_it_does_not_use(tmp_path: Path, data: ImageData, space: Space) -> None:
    supernet = Trainer(space, data, Schedule((FULL,), batch_size=16), tmp_path, watch=WATCH).run()
    transform = supernet.units[2].depthwise.transforms["3"]
    assert torch.equal(transform, torch.eye(9))


def test_a_diverging_rate_is_an_error_and_keeps_the_checkpoint(tmp_path: Path, data: ImageData, space: Space) -> None:
    wild = Schedule((replace(FULL, lr=1e12, epochs=1),), batch_size=16, warmup=0.0)
    with pytest.raises(UserError, match="lower the phase's lr"):
        Trainer(space, data, wild, tmp_path, watch=WATCH, save_seconds=0.0).run()
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] >= 1


def test_what_the_phases_before_a_divergence_learned_is_kept(tmp_path: Path, data: ImageData, space: Space) -> None:
    phases = (replace(FULL, epochs=1), replace(FULL, name="wild", lr=1e12, epochs=1))
    wild = Schedule(phases, batch_size=16, warmup=0.0, clip_norm=None)
    with pytest.raises(UserError, match=r"attempts=2 goes on from .* train.initial=.*good keeps what the phases"):
        Trainer(space, data, wild, tmp_path, watch=WATCH, safety=Safety(1)).run()
    for given in (tmp_path / "good", tmp_path / "good/checkpoint.safetensors"):
        start_from(supernet := Supernet(space), given)
        learned = load_tensors(tmp_path / "good/checkpoint.safetensors")[0]
        assert all(torch.equal(value, learned[f"weights.{name}"]) for name, value in supernet.state_dict().items())
    Trainer(space, data, wild, tmp_path, watch=WATCH, safety=Safety(2, 1e-12)).run()
    with pytest.raises(UserError, match="holds no checkpoint"):
        start_from(Supernet(space), tmp_path.parent)


@pytest.mark.parametrize("teacher", ["full", "previous"])
def test_a_first_phase_has_no_teacher_that_learned(teacher: str, tmp_path: Path, data: ImageData, space: Space) -> None:
    schedule = Schedule((Phase("kernel", 1, 0.1, rule="random", teacher=teacher),), batch_size=32)
    with pytest.raises(
        UserError, match=rf"kernel is the first, its teacher={teacher} would have learned nothing; give a"
    ):
        Trainer(space, data, schedule, tmp_path)


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, data: ImageData, space: Space) -> None:
    trainer(tmp_path, data, space, phases=(FULL,)).run()
    for name in ("checkpoint.safetensors", "supernet.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is corrupt"):
        trainer(tmp_path, data, space).run()
    with pytest.raises(UserError, match=r"supernet\.safetensors is corrupt"):
        load_supernet(tmp_path, space)
    shutil.rmtree(tmp_path)


def test_too_large_a_batch_is_explained(tmp_path: Path, data: ImageData, space: Space) -> None:
    with pytest.raises(UserError, match="batch_size 5000 is more than"):
        trainer(tmp_path, data, space, batch_size=5000)


def test_a_sandwich_holds_the_ends_and_random_nets_of_one_resolution(space: Space) -> None:
    drawn = draw(Phase("p", 1, 0.1, random_nets=2), space, np.random.default_rng(0), resolution=16)
    ends = [space.decode(genes)[0] for genes in (space.largest(), space.smallest())]
    assert drawn[:2] == [replace(arch, resolution=16) for arch in ends]
    assert len(drawn) == 4
    assert len(draw(FULL, space.restrict(**FULL.keep), np.random.default_rng(0), resolution=16)) == 1


def test_rates_follow_their_formulas() -> None:
    cosine = schedule(warmup=0.0)
    assert [cosine.rate(FULL, t) for t in (0.0, 0.5)] == pytest.approx([0.05, 0.025])
    triangular = schedule(curve="triangular", warmup=0.2)
    assert [triangular.rate(FULL, t) for t in (0.2, 0.6, 1.0)] == pytest.approx([0.05, 0.025, 0.0])


def test_one_number_scales_every_phase() -> None:
    assert schedule(epochs=0.7).steps(100) == (20, 30, 20)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "epochs": 1, "lr": 0.1, "keep": {"colour": 1}}, "colour"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "keep": None}, "phase a: keep is None; give choices, as {kernel: 1}"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "keep": ["kernel"]}, "keep is .'kernel'.; give choices"),
        ({"name": "a/b", "epochs": 1, "lr": 0.1}, "phase name 'a/b' is to name files; give a text of letters"),
        ({"name": "", "epochs": 1, "lr": 0.1}, "phase name '' is to name files"),
        ({"name": 3, "epochs": 1, "lr": 0.1}, "phase name 3 is to name files; give a text"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "rule": "all"}, "choose from largest"),
        ({"name": "a", "epochs": 0, "lr": 0.1}, "above 0"),
        ({"name": "a", "epochs": 1, "lr": -0.1}, "lr is -0.1; give a finite number above 0"),
        ({"name": "a", "epochs": 1, "lr": float("nan")}, "lr is nan"),
        ({"name": "a", "epochs": float("inf"), "lr": 0.1}, "epochs is inf"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "couple": ["depth"]}, "couples unknown .'depth'.; choose from kernel"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "prefer": "fast"}, "choose from none, best, worst"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "warmup": 1}, "warmup is 1; give"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "rule": "fixed"}, "needs an arch"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "rule": "random", "random_nets": 0}, "trains no net; give at least 1"),
        ({"name": "a", "epochs": 1}, "a phase record lacks lr"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "couple": 3}, "a phase record has a value of another type"),
        ({"name": "a", "epochs": 1, "lr": 0.1, "rate": 1}, "rate"),
    ],
)
def test_a_wrong_phase_is_explained(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Schedule((values,))  # type: ignore[arg-type]


def test_a_fixed_net_that_its_phase_does_not_keep_is_refused_before_the_first_phase(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    smallest = space.decode(space.smallest())[0]
    phase = Phase("one", 1, 0.1, rule="fixed", arch=smallest, keep={"depth": 1})
    with pytest.raises(UserError, match=r"depth 1 \(depth\.0\) is not in space digits_mbv3; choose from \(2,\)"):
        Trainer(space, data, Schedule((FULL, phase), batch_size=16), tmp_path)


def test_a_space_without_classifier_is_refused(tmp_path: Path, data: ImageData, space: Space) -> None:
    with pytest.raises(UserError, match=r"space digits_mbv3 has no classifier; end its head with {kind: pool}, {kind"):
        trainer(tmp_path, data, replace(space, head=space.head[:-1]))


def test_one_coupled_dimension_needs_no_list() -> None:
    assert Phase("a", 1, 0.1, couple="expand").couple == ("expand",)


def test_options_of_a_schedule_are_of_their_kinds() -> None:
    with pytest.raises(UserError, match=r"Schedule has batch_size=2\.5; give a whole number"):
        Schedule((FULL,), batch_size=2.5)  # type: ignore[arg-type]


def test_phases_that_are_no_list_are_named() -> None:
    with pytest.raises(UserError, match="phases=None must be a list of records"):
        Schedule(None)  # type: ignore[arg-type]


def test_losses_equal_their_formulas() -> None:
    logits, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    log = torch.log(torch.softmax(logits, 1))[0]
    assert label_loss(logits, torch.tensor([0]), 0.2).item() == pytest.approx((-0.9 * log[0] - 0.1 * log[1]).item())
    soft, cold = torch.softmax(teacher / 2, 1)[0], torch.log(torch.softmax(logits / 2, 1))[0]
    assert soft_label_loss(logits, teacher, 2.0).item() == pytest.approx(-4 * float(soft @ cold))


def test_a_net_that_lost_most_of_what_it_had_learned_is_called_collapsed() -> None:
    log = [{"epoch": 1, "val": {"largest": 0.9, "smallest": 0.2}}]
    assert collapsed({"largest": 0.3, "smallest": 0.2}, log, 0.1, 300) == ["largest"]
    assert not collapsed({"largest": 0.8, "smallest": 0.1}, log, 0.1, 300), "what never learned has nothing to lose"
    assert not collapsed({"largest": 0.1}, [], 0.1, 300)


def test_a_net_that_one_or_two_images_fewer_are_right_of_has_not_collapsed() -> None:
    log = [{"epoch": 1, "val": {"largest": 5 / 6}}]
    assert not collapsed({"largest": 4 / 6}, log, 0.5, 6) and not collapsed({"largest": 3 / 6}, log, 0.5, 6)
    assert collapsed({"largest": 0.6}, log, 0.5, 600) == ["largest"]


def test_a_net_that_names_the_most_frequent_class_has_learned_nothing(data: ImageData) -> None:
    log = [{"epoch": 1, "val": {"largest": 0.94}}]
    assert not collapsed({"largest": 0.7}, log, 0.94, 300) and collapsed({"largest": 0.7}, log, 0.5, 300)
    often = data.val.labels.bincount().max() / len(data.val.labels)
    assert data.guessing("val") == pytest.approx(float(often)) and 0.1 <= data.guessing("val") < 0.2

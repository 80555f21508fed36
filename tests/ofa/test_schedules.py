"""Schedules of the papers: every file trains, and each does what its paper says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from ofa.data import ImageData
from ofa.distill import Distillation
from ofa.errors import UserError
from ofa.files import read_jsonl
from ofa.sampling import alike, couple, draw
from ofa.schedule import Phase, Schedule
from ofa.space import Space, load_space
from ofa.table import layer_macs, layer_table
from ofa.train import Trainer
from ofa.training.gradients import Scale
from ofa.training.watch import Watch
from ofa.weights import load_tensors
from predictors import Macs
from scripts.cli import make

FOLDER = Path(__file__).parents[2] / "conf/schedule"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WATCH = Watch(random_nets=0, images=30, calibration=30)
LABELS = Distillation({}, labels=1.0)


def load(name: str, *overrides: str) -> Schedule:
    with initialize_config_module("conf", version_base="1.3"):
        schedule: Schedule = make(compose("config", [f"schedule={name}", *overrides]).schedule)
    return schedule


@pytest.mark.parametrize("name", FILES)
def test_schedule_trains_two_steps_or_one_a_phase_and_moves_the_weights(
    name: str, tmp_path: Path, data: ImageData, space: Space
) -> None:
    written = load(name)
    phases = tuple(replace(phase, measured=10, candidates=5) for phase in written.phases)
    epoch = data.size("train") // 32
    run = Trainer(
        space,
        data,
        replace(written, phases=phases, batch_size=32, epochs=2 / epoch),
        tmp_path,
        watch=WATCH,
        learn=lambda genes, top1: Macs(space),
    )
    before = {name: tensor.clone() for name, tensor in run.supernet.state_dict().items()}
    run.run()
    assert run.step >= max(2, len(phases))
    assert any(not torch.equal(before[name], tensor) for name, tensor in run.supernet.state_dict().items())
    assert np.isfinite(read_jsonl(tmp_path / "log.jsonl")[-1]["loss"])


DISTIL = sorted(path.stem for path in (FOLDER.parent / "distill").glob("*.yaml") if path.stem != "mutual")


@pytest.mark.parametrize("teacher", ["inplace", "full"])
@pytest.mark.parametrize("name", DISTIL)
def test_a_supernet_learns_by_every_way_to_distil(
    name: str, teacher: str, tmp_path: Path, data: ImageData, space: Space
) -> None:
    rule = "sandwich" if teacher == "inplace" else "random"
    phases = (Phase("first", 1, 0.05, rule="largest"), Phase("then", 1, 0.05, rule=rule, teacher=teacher))
    epoch = data.size("train") // 32
    choice = load("shrinking", f"distill@schedule.distill={name}").distill
    assert choice is not None

    def trained(distill: Distillation) -> dict[str, torch.Tensor]:
        schedule = Schedule(phases, batch_size=32, epochs=2 / epoch, distill=distill)
        folder = tmp_path / ("taught" if distill.losses else "labels")
        return Trainer(space, data, schedule, folder, watch=WATCH).run().state_dict()

    weights, labels = trained(choice), trained(LABELS)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(not torch.equal(weights[key], labels[key]) for key in weights), "the teacher must count"


def test_what_a_supernet_cannot_learn_from_is_named(tmp_path: Path, data: ImageData, space: Space) -> None:
    phases = (Phase("only", 0.1, 0.05),)
    for distill in (Distillation({"kl": 1.0}, mutual=True), Distillation({"hints": 1.0}, layers=[("a", "b")])):
        with pytest.raises(UserError, match="leave mutual and layers out"):
            Trainer(space, data, Schedule(phases, distill=distill), tmp_path, watch=WATCH)
    with pytest.raises(UserError, match=r"schedule.distill is kl, no way .* as in distill@schedule.distill=kl"):
        Trainer(space, data, load("shrinking", "schedule.distill=kl"), tmp_path, watch=WATCH)
    with pytest.raises(UserError, match="attention reads what compiled blocks hide; use a loss on logits"):
        schedule = Schedule(phases, distill=Distillation({"attention": 1.0}))
        Trainer(space, data, schedule, tmp_path, watch=WATCH, scale=Scale(compile=True))


@pytest.mark.parametrize("name", FILES)
def test_one_number_of_epochs_scales_a_schedule(name: str) -> None:
    whole, short = load(name), replace(load(name), epochs=60)
    assert sum(short.steps(1000)) == pytest.approx(60_000, abs=len(whole.phases))
    first, second = (np.array(s.steps(1000)) / sum(s.steps(1000)) for s in (whole, short))
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_another_batch_size_scales_the_published_rates() -> None:
    half = load("bignas", "schedule.batch_size=1024")
    assert half.rate(half.phases[0], 0.5) == pytest.approx(load("bignas").rate(half.phases[0], 0.5) / 2)
    with pytest.raises(UserError, match="lr_batch_size is 0; give a finite number above 0"):
        replace(half, lr_batch_size=0)


@pytest.mark.parametrize("name", ["decay", "decay_epochs", "floor", "bias_lr"])
def test_what_has_no_off_is_not_null(name: str) -> None:
    with pytest.raises(UserError, match=f"Schedule has {name}=None; give a number"):
        replace(load("bignas"), **{name: None})


@pytest.mark.parametrize("name", ["decay", "floor"])
def test_a_rate_does_not_rise(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 1.5, and the rate would rise; give a number up to 1"):
        replace(load("bignas"), **{name: 1.5})
    replace(load("bignas"), **{name: 1.0})


def test_once_for_alls_phases_are_the_papers() -> None:
    phases = load("once_for_all").phases
    assert [(p.epochs, p.lr, p.random_nets) for p in phases[1:]] == [
        (125, 0.96, 1), (25, 0.08, 2), (125, 0.24, 2), (25, 0.08, 4), (125, 0.24, 4),
    ]  # fmt: skip
    assert (phases[0].epochs, phases[0].lr, phases[0].rule) == (180, 2.6, "largest")
    space = load_space("ofa_mbv3_w1.0")
    kept = [phase.space(space).stages[0] for phase in phases]
    assert [(s.kernel, s.depth, s.expand) for s in kept] == [
        ((7,), (4,), (6,)),
        ((3, 5, 7), (4,), (6,)),
        ((3, 5, 7), (3, 4), (6,)),
        ((3, 5, 7), (2, 3, 4), (6,)),
        ((3, 5, 7), (2, 3, 4), (4, 6)),
        ((3, 5, 7), (2, 3, 4), (3, 4, 6)),
    ]


def test_bignas_rate_decays_and_ends_constant() -> None:
    schedule = replace(load("bignas"), warmup=0.0)
    phase = schedule.phases[0]
    assert schedule.rate(phase, 2.4 / 360) == pytest.approx(0.8 * 0.97)
    assert schedule.rate(phase, 1.0) == schedule.rate(phase, 0.9) == pytest.approx(0.8 * 0.05)
    last = 2.4 * np.log(0.05) / np.log(0.97) / 360  # where 0.97 ** (epochs / 2.4) reaches 5 %
    assert schedule.rate(phase, last - 0.01) > 0.8 * 0.05


def test_coupled_nets_are_compofas_pairs(space: Space) -> None:
    published = load_space("ofa_mbv3_w1.0")
    genes = couple(published, published.sample(200, np.random.default_rng(0)), ("expand",))
    pairs = set()
    for arch in published.decode(genes):
        expand = list(arch.expand)
        for depth in arch.depth:
            own, expand = expand[:depth], expand[depth:]
            assert len(set(own)) == 1
            pairs.add((depth, own[0]))
    assert pairs == {(2, 3), (3, 4), (4, 6)}
    free = couple(published, published.sample(50, np.random.default_rng(0)), ())
    assert len(published.decode(free)[0].expand) and any(len(set(arch.expand)) > 1 for arch in published.decode(free))


def test_compofas_phases_train_its_pairs_from_the_first_on() -> None:
    published = load_space("ofa_mbv3_w1.0")
    schedule = load("compofa")
    for phase in schedule.phases[1:]:
        own, pairs = phase.space(published), set()
        for step in range(30):
            for arch in draw(phase, own, np.random.default_rng(step), resolution=224):
                expand = iter(arch.expand)
                pairs |= {(depth, next(expand)) for depth in arch.depth for _ in range(depth)}
        assert pairs == {(2, 3), (3, 4), (4, 6)}, phase.name


def test_alike_nets_have_the_nearest_macs_of_the_pool(space: Space) -> None:
    pool = space.sample(300, np.random.default_rng(0))
    macs = layer_macs(layer_table(space, pool)).sum(1)
    found = alike(space, pool, 20)
    distance = np.abs(layer_macs(layer_table(space, found)).sum(1) - macs[0])
    assert np.array_equal(found[0], pool[0])
    assert sorted(distance) == sorted(np.abs(macs - macs[0]))[:20]


def test_attentive_nets_are_the_best_or_worst_of_their_macs_and_their_macs_follow_the_space(space: Space) -> None:
    kernels = slice(*(space.columns("kernel").start, space.columns("kernel").stop))

    def score(genes: np.ndarray) -> np.ndarray:
        return genes[:, kernels].sum(axis=1).astype(float)

    found = {}
    for prefer in ("best", "worst", "none"):
        phase = Phase("p", 1, 0.1, random_nets=1, rule="random", prefer=prefer, candidates=20)
        rng = np.random.default_rng(0)
        archs = [draw(phase, space, rng, resolution=16, score=score)[0] for _ in range(60)]
        genes = space.encode(archs)
        found[prefer] = (score(genes).mean(), layer_macs(layer_table(space, genes)).sum(1))
    assert found["worst"][0] < found["none"][0] < found["best"][0]
    uniform = space.sample(2000, np.random.default_rng(1))
    uniform[:, 0] = space.resolution.index(16)
    middle = np.median(layer_macs(layer_table(space, uniform)).sum(1))
    for prefer in ("best", "worst"):
        assert 0.25 < (found[prefer][1] < middle).mean() < 0.75


def test_a_preferring_phase_learns_from_measured_nets_once_and_needs_a_predictor(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    phase = Phase("prefer", 0.05, 0.05, prefer="worst", candidates=3, measured=10)
    seen: list[np.ndarray] = []

    def learn(genes: np.ndarray, top1: np.ndarray) -> Macs:
        seen.append(top1)
        return Macs(space)

    def trainer(folder: str, **options: object) -> Trainer:
        schedule = Schedule((phase,), batch_size=32)
        return Trainer(space, data, schedule, tmp_path / folder, watch=WATCH, save_seconds=0.0, **options)  # type: ignore[arg-type]

    told: list[dict[str, object]] = []
    run = trainer("run", learn=learn, report=told.append)
    run.run()
    assert [values.get("measured") for values in told[:11]] == [*(f"{n}/10 nets" for n in range(1, 11)), None]
    lines = read_jsonl(tmp_path / "run/measured-prefer.jsonl")
    assert len(lines) == 10 and seen[0].tolist() == [line["accuracy"] for line in lines]
    with pytest.raises(UserError, match="prefers worst nets, which takes a predictor"):
        trainer("without").run()


def test_every_later_phase_learns_from_the_full_net_as_the_first_left_it(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    small = {"kernel": 1, "depth": 1, "expand": 1, "width": 1}
    phases = (
        Phase("first", 0.05, 0.05, rule="largest", keep=small),
        Phase("one", 0.05, 0.05, rule="random", teacher="full", keep=small),
        Phase("full", 0.05, 0.05, rule="random", teacher="previous", keep=small),
        Phase("two", 0.05, 0.05, rule="random", teacher="full", sort_channels=True),
    )
    run = Trainer(space, data, Schedule(phases, batch_size=32), tmp_path, watch=WATCH, save_seconds=0.0)
    states: list[dict[str, torch.Tensor]] = []

    def note(values: dict[str, object]) -> None:
        if "val" not in values and (tmp_path / "teacher.safetensors").exists():
            states.append(load_tensors(tmp_path / "teacher.safetensors")[0])

    run.report = note
    run.run()
    assert len(states) == run.step - run.ends[0]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])

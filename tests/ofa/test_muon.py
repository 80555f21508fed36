"""Muon's steps against singular value decompositions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ofa.data import digits
from ofa.errors import UserError
from ofa.finetune import Finetuning, finetune
from ofa.modules import ConvBN
from ofa.schedule import Phase, Schedule
from ofa.space import Space
from ofa.supernet import Supernet
from ofa.training.muon import Muon, dealt, orthogonal
from ofa.training.optimizer import make_optimizer, set_rate
from tests.ofa.nets import random_net

SCHEDULE = Schedule((Phase("one", 1, 0.5),), momentum=0.8, weight_decay=0.1, muon=0.1)


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 8, 8), (2, 1, 9)])
def test_singular_vectors_stay_and_values_become_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float() * 1e-3
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonal(matrices) @ v.mT
    mixed = found - torch.diag_embed(found.diagonal(dim1=1, dim2=2))
    lifted = found.diagonal(dim1=1, dim2=2)[values > 0.02 * values[:, :1] * shape[1] ** 0.5]
    assert mixed.abs().max() < 0.05 and lifted.min() > 0.6 and lifted.max() < 1.3


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonal(torch.zeros(2, 3, 4)).any()


def test_a_step_turns_a_weight_by_a_share_of_its_norm(space: Space) -> None:
    supernet = Supernet(space)
    optimizer = make_optimizer(supernet, SCHEDULE)
    set_rate(optimizer, 0.5)
    (group,) = (group for group in optimizer.param_groups if group.get("turn"))
    weight, before = group["params"][0], group["params"][0].detach().clone()
    past = torch.zeros_like(weight)
    for _ in range(2):
        start, gradient = weight.detach().clone(), torch.randn_like(weight)
        past = 0.8 * past + gradient
        weight.grad = gradient.clone()
        optimizer.step()
        u, _, v = torch.linalg.svd((gradient + 0.8 * past).flatten(1), full_matrices=False)
        moved = -(weight.detach() - start).flatten(1) / start.norm() * min(u.shape[0], v.shape[1]) ** 0.5
        assert float(weight.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-5)
        assert 0.03 < (moved * (u @ v)).sum() / (u @ v).norm() ** 2 < 0.06, "0.5 x 0.1, by singular values of .7 to 1.2"
    assert not torch.equal(weight, before)


def test_dense_convolutions_before_a_batch_norm_are_turned_the_others_trained_as_before(space: Space) -> None:
    supernet, plain = Supernet(space), Supernet(space)
    plain.load_state_dict(supernet.state_dict())
    optimizers = (
        make_optimizer(supernet, SCHEDULE),
        make_optimizer(plain, Schedule(SCHEDULE.phases, momentum=0.8, weight_decay=0.1)),
    )
    gradients = {name: torch.randn_like(weight) for name, weight in supernet.named_parameters()}
    for net, optimizer in zip((supernet, plain), optimizers, strict=True):
        set_rate(optimizer, 0.5)
        for name, weight in net.named_parameters():
            weight.grad = gradients[name].clone()
        optimizer.step()
    theirs = dict(plain.named_parameters())
    turned = {name for name, weight in supernet.named_parameters() if not torch.equal(weight, theirs[name])}
    modules = [(name, module) for name, module in supernet.named_modules() if isinstance(module, nn.Conv2d)]
    dense = {f"{name}.weight" for name, module in modules if ".se." not in name and "depthwise" not in name}
    assert turned and turned == dense - {"units.0.conv.weight"}


def test_weights_without_a_gradient_and_steps_that_overflow_change_nothing(space: Space) -> None:
    supernet = Supernet(space)
    before = {name: weight.detach().clone() for name, weight in supernet.named_parameters()}
    optimizer = make_optimizer(supernet, SCHEDULE)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    for weight in supernet.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert isinstance(optimizer, Muon)
    assert all(torch.equal(weight, before[name]) for name, weight in supernet.named_parameters())


def test_processes_have_about_as_much_to_turn() -> None:
    weights = [torch.empty(n, m, 3, 3) for n, m in ((48, 48), (384, 384), (96, 48), (384, 192), (384, 384), (384, 192))]
    assert dealt(weights, 1) == [0] * 6
    owners = dealt(weights, 2)
    assert owners[1] != owners[4] and owners[3] != owners[5] and owners[0] != owners[2]


@pytest.mark.parametrize("made", [lambda: Schedule(SCHEDULE.phases, muon=1), lambda: Finetuning(muon=1)])
def test_a_step_is_a_share(made: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="muon is 1; give a number of at least 0 and below 1"):
        made()


def test_fine_tuning_turns_the_same_convolutions_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)
    start, data, settings = random_net(), digits(), Finetuning(epochs=0.2, lr=0.5, weight_decay=0.1, muon=0.1)

    file = tmp_path / "part.safetensors"
    whole = finetune(start, data, settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(start, data, settings, checkpoint=file, report=_killed)
    again = finetune(start, data, settings, checkpoint=file)
    kept = set()
    for (name, weight), other, before in zip(
        whole.named_parameters(), again.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(weight, other) and not torch.equal(weight, before)
        if float(weight.detach().norm()) == pytest.approx(float(before.detach().norm()), rel=1e-4):
            kept.add(name)
    parts = [(name, part) for name, part in start.named_modules() if isinstance(part, ConvBN)]
    followed = {f"{name}.conv.weight" for name, part in parts if isinstance(part.bn, nn.BatchNorm2d)}
    assert kept == {name for name in followed if ".depthwise." not in name} - {"units.0.conv.weight"}


def _killed(values: dict[str, float]) -> None:
    if values["step"] == 2:
        raise KeyboardInterrupt

"""Taps, pairing, regressors, several teachers, mutual learning and exact resume, on networks of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from ofa import distill
from ofa.data import Augment, ImageData
from ofa.distill import Distillation, Distiller, Outputs, observe, stage_ends
from ofa.distill.elastic import widened
from ofa.distill.settings import LOSSES, ON_LOGITS
from ofa.distill.taps import Tap, match
from ofa.errors import UserError
from ofa.finetune import Finetuning, finetune
from ofa.space import load_space
from ofa.static import build
from ofa.supernet import Supernet
from tests.ofa.nets import RESNET, SPEC, random_net

SHORT = Finetuning(epochs=0.1, batch_size=16, lr=0.01)  # 7 steps


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 16, 16, generator=generator), torch.arange(6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_of_half_precision_are_those_of_the_same_numbers_in_float32(name: str) -> None:
    """Equal images, channels that are zero and large maps: norms would vanish and squares overflow in float16."""
    generator = torch.Generator().manual_seed(0)

    def outputs() -> Outputs:
        x, maps = torch.randn(4, 6, generator=generator), 100 * torch.randn(4, 3, 4, 4, generator=generator)
        x[1], maps[:, 0] = x[0], 0
        return Outputs(x.half(), (maps.half(), (maps / 2).half()), x.half(), (maps.half(), (maps / 2).half()))

    student, teacher = outputs(), outputs()
    student.logits.requires_grad_()
    settings = Distillation(losses={name: 1.0})
    found = settings(student, teacher)
    assert found.dtype == torch.float32 and found.isfinite()
    torch.testing.assert_close(found, settings(student.in_float32(), teacher.in_float32()))


# -- where stages end --------------------------------------------------------------------------------------------------


def test_stages_of_block_lists_end_where_the_next_block_halves_the_map() -> None:
    assert stage_ends(random_net(), torch.randn(2, 1, 16, 16)) == {
        "units.1": (8, 8),
        "units.3": (4, 4),
        "units.5": (2, 2),
    }
    found = stage_ends(random_net(RESNET), torch.randn(2, 1, 16, 16))
    assert found == {"units.1": (16, 16), "units.4": (8, 8), "units.5": (4, 4)}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("resnet18", {"relu": 32, "layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}),
        ("mobilenet_v3_small", {f"features.{i}": s for i, s in ((0, 32), (1, 16), (3, 8), (8, 4), (12, 2))}),
        ("convnext_tiny", {f"features.{i}": s for i, s in ((1, 16), (3, 8), (5, 4), (7, 2))}),
    ],
)
def test_stages_of_torchvisions_networks_are_the_ones_of_their_papers(name: str, ends: dict[str, int]) -> None:
    net = get_model(name, num_classes=10).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert stage_ends(net, torch.randn(2, 3, 64, 64)) == {key: (side, side) for key, side in ends.items()}
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_maps_with_channels_last_are_refused() -> None:
    net = get_model("swin_t", num_classes=10)
    with pytest.raises(UserError, match=r"maps of SwinTransformer are \(N, H, W, C\), not .*; choose a loss on logits"):
        stage_ends(net, torch.zeros(1, 3, 64, 64))


def test_layers_pair_by_the_size_of_their_maps_and_nets_without_a_common_size_are_told_apart() -> None:
    student, teacher = {"a": (8, 8), "b": (4, 4)}, {"p": (16, 16), "q": (8, 8), "r": (4, 4), "s": (2, 2)}
    assert match(student, teacher) == (("a", "q"), ("b", "r"))
    with pytest.raises(UserError, match=r"a 7x7 against q 8x8; name pairs with layers"):
        match({"a": (7, 7)}, {"q": (8, 8)})


def test_a_tap_gives_what_the_layers_compute_and_lets_go() -> None:
    net, x = random_net(), torch.randn(2, 1, 16, 16)
    with Tap(net, ["units.3"], embedding=True) as tap:
        found = tap(x)
    up_to = nn.Sequential(*net.units[:4])(x)
    assert torch.equal(found.maps[0], up_to) and torch.equal(found.logits, net(x))
    assert torch.equal(net.units[-1](found.embedding), net(x))
    assert not any(module._forward_hooks for module in net.modules())


# -- the settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"losses": {"hint": 1}}, "loss 'hint' is not known; choose from soft_labels, kl, .*angles"),
        ({"losses": {"kl": -1}}, "kl.*-1.*at least 0"),
        ({"losses": {"kl": float("nan")}}, "kl.*nan.*a weight is a finite number"),
        ({"losses": {"kl": None}}, "kl.*None.*a weight is a finite number"),
        ({"losses": None}, "losses is None; give weights by name, as {kl: 0.5}"),
        ({"labels": float("inf")}, "labels inf: a weight is a finite number"),
        ({"clip": None}, "Distillation has clip=None; give a number"),
        ({"temperature": float("nan")}, "temperature nan must be finite"),
        ({"losses": {"kl": 0}, "labels": 0}, "nothing is learned; give a weight above 0"),
        ({"temperature": 0}, "temperature 0 must be finite and above 0"),
        ({"kernel": "cubic"}, "kernel 'cubic' is not known"),
        ({"layers": ["units.1"]}, r"layers has 'units.1'.*\[student's layer, teacher's layer\]"),
        ({"losses": {"hints": 1}, "mutual": True}, "mutual learning is on logits, not hints; use soft_labels"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        Distillation(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"lr": float("nan")}, "lr nan, batch_size 64: give .* an lr above 0"),
        ({"epochs": float("inf")}, "epochs inf"),
        ({"soft_labels": 1.5}, "soft_labels is 1.5; give a number from 0 to 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; give"),
        ({"momentum": -1.0}, "momentum is -1.0; give a number of at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; give"),
        ({"clip_norm": float("nan")}, "clip_norm is nan; give a finite number above 0"),
        ({"distill": "kl"}, "finetune.distill is kl, no way to distil; choose one as in distill=kl"),
        ({"batch_size": 2.5}, "Finetuning has batch_size=2.5; give a whole number"),
    ],
)
def test_wrong_fine_tuning_is_refused(wrong: dict[str, object], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        Finetuning(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_a_student_of_another_family(name: str, batch: tuple[Tensor, Tensor]) -> None:
    student, teacher = random_net().train(), random_net(RESNET)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    with Distiller(Distillation({name: 1.0}, labels=0.0), student, [teacher], batch[0][:2]) as distiller:
        loss = distiller(*batch)
        loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.units[0].conv.weight.grad.abs().sum() > 0
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_loss_is_the_weighted_sum_of_labels_and_losses(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), student, teacher = batch, random_net().eval(), random_net(seed=1)
    settings = Distillation({"kl": 2.0, "attention": 30.0}, labels=0.7, temperature=3.0)
    own: list[Tensor] = []
    other: list[Tensor] = []
    for net, kept in ((student, own), (teacher, other)):
        maps = x
        for i, unit in enumerate(net.units[:6]):
            maps = unit(maps)
            if i in (1, 3, 5):
                kept.append(maps)
    attention = torch.stack([distill.attention_loss(s, t) for s, t in zip(own, other, strict=True)]).mean()
    logits, soft = student(x), teacher(x)
    wanted = 0.7 * F.cross_entropy(logits, y) + 2 * distill.kl_loss(logits, soft, 3.0) + 30 * attention
    with Distiller(settings, student, [teacher], x) as distiller:
        assert distiller(x, y).item() == pytest.approx(wanted.item(), rel=1e-5)
        lighter = Distillation({"kl": 2.0, "attention": 29.0}, labels=0.7, temperature=3.0)
    with Distiller(lighter, student, [teacher], x) as distiller:
        assert distiller(x, y).item() != pytest.approx(wanted.item(), rel=1e-5)


def test_regressors_fit_channels_learn_and_are_no_part_of_the_student(batch: tuple[Tensor, Tensor]) -> None:
    student, teacher = random_net(), random_net(RESNET)
    count = sum(parameter.numel() for parameter in student.parameters())
    with Distiller(Distillation({"hints": 1.0}), student, [teacher], batch[0]) as distiller:
        shapes = [tuple(parameter.shape) for parameter in distiller.parameters()]
        assert shapes == [(64, 16, 1, 1), (64,), (96, 24, 1, 1), (96,)]  # 16 to 64 at 8 x 8, 24 to 96 at 4 x 4
        distiller(*batch).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in distiller.parameters())
    assert sum(parameter.numel() for parameter in student.parameters()) == count
    with Distiller(Distillation({"attention": 1.0}), student, [teacher], batch[0]) as distiller:
        assert not list(distiller.parameters()), "attention needs none"


def test_layers_may_be_named_and_of_different_sizes(batch: tuple[Tensor, Tensor]) -> None:
    settings = Distillation({"attention": 1.0}, labels=0, layers=[["units.2", "units.1"]])  # type: ignore[list-item]
    student, teacher, x = random_net(), random_net(RESNET), batch[0]
    own, other = nn.Sequential(*student.units[:3])(x), nn.Sequential(*teacher.units[:2])(x)
    wanted = distill.attention_loss(own, F.avg_pool2d(other, 4))  # 4 x 4 and 16 x 16
    with Distiller(settings, student, [teacher], x) as distiller:
        assert distiller(*batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_an_unknown_layer_is_answered_with_the_names_that_there_are(batch: tuple[Tensor, Tensor]) -> None:
    settings = Distillation({"hints": 1.0}, layers=[("units.1", "layer1")])
    with pytest.raises(UserError, match=r"the teacher has no layer 'layer1' with a map; choose from units.0, units.1"):
        Distiller(settings, random_net(), [random_net(RESNET)], batch[0])


def test_a_teacher_of_other_classes_is_refused_on_logits_and_welcome_on_features(batch: tuple[Tensor, Tensor]) -> None:
    units = (*RESNET.units[:-1], replace(RESNET.units[-1], cout=7))
    student, teacher = random_net(), random_net(replace(RESNET, units=units, classes=7))
    with pytest.raises(UserError, match=r"the teacher has 7, the student 10; give a teacher of the same classes, or a"):
        Distiller(Distillation(), student, [teacher], batch[0])
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())
    with Distiller(Distillation({"hints": 1.0}), student, [teacher], batch[0]) as distiller:
        assert distiller(*batch).isfinite()


def test_several_teachers_are_an_ensemble(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    student, teachers = random_net().eval(), [random_net(seed=1), random_net(RESNET)]
    target = sum((net(x) / 2).softmax(1) for net in teachers) / 2
    wanted = -(target * (student(x) / 2).log_softmax(1)).sum(1).mean() * 4
    with Distiller(Distillation({"soft_labels": 1.0}, 0.0, temperature=2.0), student, teachers, x) as distiller:
        assert distiller(x, y).item() == pytest.approx(wanted.item(), rel=1e-5)
    both = Distillation({"alpha": 1.0, "kl": 1.0}, 0.0, temperature=2.0)
    mean = sum(net(x).softmax(1) for net in teachers) / 2  # alpha compares probabilities as they are
    alone = distill.alpha_divergence(student(x), mean.log()) + distill.kl_loss(student(x), target.log() * 2, 2.0)
    with Distiller(both, student, teachers, x) as distiller:
        assert distiller(x, y).item() == pytest.approx(alone.item(), rel=1e-5)
    with Distiller(Distillation({"hints": 1.0}, 0.0), student, teachers, x) as distiller:
        assert [len(found) for found in distiller.regressors] == [3, 2], "its own layers and regressors for each"
        assert distiller(x, y).isfinite()


@pytest.mark.parametrize("mutual", [False, True])
def test_teachers_are_left_in_their_mode(batch: tuple[Tensor, Tensor], mutual: bool) -> None:
    teacher = random_net().train()
    teacher.units[0].eval()
    modes = [module.training for module in teacher.modules()]
    with Distiller(Distillation({"kl": 1.0}, 1.0, mutual=mutual), random_net(), [teacher], batch[0]):
        assert all(module.training == mutual for module in teacher.modules())
    assert [module.training for module in teacher.modules()] == modes


# -- mutual learning ---------------------------------------------------------------------------------------------------


def test_mutual_learning_has_a_loss_for_each_network(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    nets = [random_net(seed=i).train() for i in range(3)]
    with Distiller(Distillation({"kl": 1.0}, 1.0, mutual=True), nets[0], nets[1:], x) as distiller:
        loss = distiller(x, y)
        loss.backward()
    p = [net(x).softmax(1) for net in nets]  # batch statistics, as in the loss
    wanted = sum(F.nll_loss(q.log(), y) for q in p)
    for i in range(3):  # eq. 4 of Zhang et al.: the mean over the peers
        wanted += sum((p[j] * (p[j] / p[i]).log()).sum(1).mean() for j in range(3) if j != i) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert all(net.units[0].conv.weight.grad.abs().sum() > 0 for net in nets)


def test_mutual_learning_changes_copies_of_the_teachers(data: ImageData) -> None:
    teacher = random_net(RESNET)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    mutual = replace(SHORT, distill=Distillation({"kl": 1.0}, 1.0, mutual=True))
    fixed = replace(SHORT, distill=Distillation({"kl": 1.0}, 1.0))
    nets = [finetune(random_net(), data, settings, teacher=teacher) for settings in (mutual, fixed)]
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not torch.equal(nets[0].units[0].conv.weight, nets[1].units[0].conv.weight)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_a_loss_on_features_brings_them_closer_to_the_teachers(data: ImageData) -> None:
    teacher = random_net(RESNET)
    settings = Finetuning(epochs=1, lr=0.02, distill=Distillation({"attention": 1.0}, labels=0.0))
    x = next(data.batches("val", 64, 16, rng=None))[0]

    def distance(net: nn.Module) -> float:
        with (
            Tap(net, ["units.1", "units.3"], embedding=False) as s,
            Tap(teacher, ["units.4", "units.5"], embedding=False) as t,
        ):
            return settings.lesson(1)(s(x), t(x)).item()

    student = random_net()
    assert distance(finetune(student, data, settings, teacher=teacher)) < 0.7 * distance(student)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("mutual", [False, True])
def test_a_killed_finetuning_goes_on_and_ends_with_the_same_weights(
    mutual: bool, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)
    losses = {"kl": 1.0} if mutual else {"hints": 1.0}
    settings = replace(SHORT, distill=Distillation(losses, 0.5, mutual=mutual))
    data = replace(data, augment=Augment(mixup=0.5, cutmix=0.5))
    teacher, file = random_net(RESNET), tmp_path / "state.safetensors"
    whole = finetune(random_net(), data, settings, teacher=teacher)
    steps = []

    def kill(values: dict[str, float]) -> None:
        steps.append(values["step"])
        if len(steps) == 3:
            raise Killed

    with pytest.raises(Killed):
        finetune(random_net(), data, settings, teacher=teacher, checkpoint=file, report=kill)
    again = finetune(random_net(), data, settings, teacher=teacher, checkpoint=file, report=kill)
    assert steps[:4] == [1, 2, 3, 4], "it goes on after the third step"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    other = finetune(random_net(), data, settings, teacher=teacher, seed=1)
    assert not torch.equal(other.units[0].conv.weight, whole.units[0].conv.weight)


def test_fine_tuning_mixes_images_as_training_does(data: ImageData) -> None:
    losses: list[float] = []
    for augment in (Augment(), Augment(mixup=0.5), Augment(cutmix=0.5)):
        steps: list[dict[str, Any]] = []
        finetune(random_net(), replace(data, augment=augment), SHORT, report=steps.append)
        losses.append(steps[0]["loss"])
    assert len(set(losses)) == 3


def test_fine_tuning_may_change_images_in_another_way_than_training(data: ImageData) -> None:
    erasing = Augment(erase=1.0)
    own = finetune(random_net(), data, replace(SHORT, augment=erasing))
    datas = finetune(random_net(), replace(data, augment=erasing), SHORT)
    assert all(torch.equal(value, datas.state_dict()[key]) for key, value in own.state_dict().items())
    plain = finetune(random_net(), replace(data, augment=erasing), replace(SHORT, augment=Augment()))
    assert not torch.equal(own.units[0].conv.weight, plain.units[0].conv.weight)
    with pytest.raises(UserError, match=r"augment is strong, which is no ofa\.data\.Augment"):
        replace(SHORT, augment="strong")


def test_a_killed_finetuning_draws_the_dropout_of_an_uninterrupted_one(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)
    blocks = [nn.Conv2d(1, 4, 3), StochasticDepth(0.5, "row"), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5)]
    net, file = nn.Sequential(*blocks, nn.Linear(4 * 6 * 6, 10)), tmp_path / "state.safetensors"
    whole = finetune(net, data, SHORT)

    def kill(values: dict[str, float]) -> None:
        if values["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        finetune(net, data, SHORT, checkpoint=file, report=kill)
    state = torch.get_rng_state()
    again = finetune(net, data, SHORT, checkpoint=file)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state), "the caller's draws are left alone"


def test_a_torchvision_network_learns_from_another(data: ImageData) -> None:
    colour = replace(
        data, **{name: _coloured(data.split(name)) for name in ("train", "val")}, mean=(0.3,) * 3, std=(0.4,) * 3
    )
    torch.manual_seed(0)
    student, teacher = (get_model(name, num_classes=10) for name in ("mobilenet_v3_small", "resnet18"))
    settings = replace(SHORT, epochs=0.03, distill=Distillation({"hints": 1.0, "distances": 1.0, "soft_labels": 0.5}))
    tuned = finetune(student, colour, settings, teacher=teacher, resolution=32)
    assert not tuned.training
    changed = sum(not torch.equal(a, b) for a, b in zip(student.parameters(), tuned.parameters(), strict=True))
    assert changed == len(list(student.parameters()))


def _coloured(split: object) -> object:
    return replace(split, images=split.images.expand(-1, 3, -1, -1))  # type: ignore[type-var, attr-defined]


# -- supernets ---------------------------------------------------------------------------------------------------------


def test_a_supernets_subnet_shows_what_the_extracted_net_computes() -> None:
    from ofa.extraction import extract

    space = load_space("digits_mbv3")
    torch.manual_seed(0)
    supernet, x = Supernet(space).eval(), torch.randn(4, 1, 8, 8)
    archs = space.decode(np.concatenate([space.largest(), space.smallest(), space.sample(4, np.random.default_rng(0))]))
    for arch in archs:
        x = torch.randn(2, 1, arch.resolution, arch.resolution)
        seen, net = observe(supernet, x, arch), extract(supernet, arch)
        ends = stage_ends(net, x)
        with Tap(net, list(ends), embedding=True) as tap:
            wanted = tap(x)
        maps = [maps for maps in seen.maps if maps.shape[2:] != (1, 1)]
        for a, b in zip(maps or seen.maps, wanted.maps, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(seen.embedding, wanted.embedding, atol=1e-5)
    assert not any(module._forward_hooks for module in supernet.modules())


def test_losses_without_regressors_train_a_supernets_subnet() -> None:
    space = load_space("digits_mbv3")
    supernet = Supernet(space)
    large, small = (space.decode(genes)[0] for genes in (space.largest(), space.smallest()))
    side = large.resolution
    x = torch.randn(4, 1, side, side)
    with torch.no_grad():
        teacher = observe(supernet, x, large)
    settings = Distillation({"attention": 1.0, "neurons": 1.0, "distances": 1.0, "soft_labels": 0.5})
    settings(observe(supernet, x, replace(small, resolution=side)), teacher).backward()
    assert supernet.units[0].conv.weight.grad.abs().sum() > 0
    narrow = Outputs(torch.zeros(2, 10), (torch.zeros(2, 3, 4, 4),))
    wide = Outputs(torch.zeros(2, 10), (torch.ones(2, 5, 4, 4),))
    assert Distillation({"hints": 1.0})(widened(narrow, wide), wide) == pytest.approx(0.5 * 3 / 5), (
        "2 channels cost nothing"
    )
    with pytest.raises(UserError, match="the student has 3, the teacher 5; use attention"):
        Distillation({"hints": 1.0})(narrow, narrow._replace(maps=(torch.zeros(2, 5, 4, 4),)))


def test_every_loss_on_logits_takes_logits_alone() -> None:
    student, teacher = Outputs(torch.randn(3, 5)), Outputs(torch.randn(3, 5))
    for name in ON_LOGITS:
        assert Distillation({name: 1.0})(student, teacher).isfinite()
    net = build(load_space("digits_mbv3"), load_space("digits_mbv3").decode(load_space("digits_mbv3").smallest())[0])
    assert net.spec.classes == SPEC.classes

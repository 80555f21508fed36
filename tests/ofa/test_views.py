"""Fine-tuning whose epochs come again: teachers run once on every batch, and their answers outlive a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ofa.data import Augment, ImageData
from ofa.distill import Distillation
from ofa.distill.answers import Answers
from ofa.errors import UserError
from ofa.finetune import Finetuning, finetune
from tests.ofa.nets import RESNET, random_net

SETTINGS = Finetuning(epochs=3, batch_size=256, lr=0.01, views=1)
ASKED: list[Tensor] = []


class Teacher(nn.Module):
    """Notes the images that it is asked about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = random_net(RESNET, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        ASKED.append(x.clone())
        return self.net(x)


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    ASKED.clear()


def asked(batch_size: int = 256) -> int:
    """Training batches that teachers saw; other images are few."""
    return sum(len(x) == batch_size for x in ASKED)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_a_teacher_runs_on_each_batch_once(data: ImageData) -> None:
    batches = data.size("train") // 256
    finetune(random_net(), data, SETTINGS, teacher=Teacher())
    assert asked() == batches
    ASKED.clear()
    finetune(random_net(), data, replace(SETTINGS, views=2), teacher=[Teacher(), Teacher(1)])
    assert asked() == 2 * 2 * batches, "two teachers, two views"
    ASKED.clear()
    finetune(random_net(), data, replace(SETTINGS, views=None), teacher=Teacher())
    assert asked() == 3 * batches


@pytest.mark.parametrize("augment", [Augment(erase=0.5), Augment(mixup=0.5, cutmix=0.5)])
def test_what_is_kept_is_what_the_teacher_would_say(
    augment: Augment, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(data, augment=augment)
    settings = replace(SETTINGS, distill=Distillation({"kl": 0.7, "logits": 0.1}, 0.3, temperature=2.0))
    kept = finetune(random_net(), data, settings, teacher=[Teacher(), Teacher(1)])
    ASKED.clear()
    monkeypatch.setattr(Answers, "__call__", lambda self, batch, ask: ask())
    assert same(kept, finetune(random_net(), data, settings, teacher=[Teacher(), Teacher(1)]))
    batches = data.size("train") // 256
    seen = [x for x in ASKED if len(x) == 256][::2]  # the second teacher sees the same
    assert all(torch.equal(x, seen[i % batches]) for i, x in enumerate(seen)), "the epochs are one another's"
    assert not torch.equal(seen[0], seen[1])


def test_as_many_views_as_epochs_change_nothing(data: ImageData) -> None:
    each = finetune(random_net(), data, replace(SETTINGS, views=None), teacher=Teacher())
    assert same(each, finetune(random_net(), data, replace(SETTINGS, views=3), teacher=Teacher()))
    assert not same(each, finetune(random_net(), data, replace(SETTINGS, views=2), teacher=Teacher()))


@pytest.mark.parametrize("stop", [2, 6])
@pytest.mark.parametrize("harm", ["none", "deleted", "cut"])
def test_answers_outlive_a_kill_and_their_loss_costs_time_alone(
    stop: int, harm: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ofa.finetune.SAVE_SECONDS", 0.0)
    whole = finetune(random_net(), data, SETTINGS, teacher=Teacher())
    file, answers = tmp_path / "state.safetensors", tmp_path / "state.answers"

    def kill(values: dict[str, Any]) -> None:
        if values["step"] == stop:
            raise Killed

    with pytest.raises(Killed):
        finetune(random_net(), data, SETTINGS, teacher=Teacher(), checkpoint=file, report=kill)
    assert answers.exists()
    if harm == "deleted":
        answers.unlink()
    elif harm == "cut":
        answers.write_bytes(answers.read_bytes()[: 4 * 256 * 10 + 5])
    ASKED.clear()
    assert same(whole, finetune(random_net(), data, SETTINGS, teacher=Teacher(), checkpoint=file))
    batches = data.size("train") // 256
    known = {"none": min(stop, batches), "deleted": 0, "cut": 1}[harm]
    assert batches - known <= asked() <= batches - known + 1, "one batch more tells the shape"
    assert not answers.exists()


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({"views": 0}, "views is 0; give a finite number above 0"),
        ({"views": 1.5}, "views=1.5; give a whole number"),
        ({"distill": Distillation({"hints": 1.0})}, "views=1 keeps logits of teachers.*or views=null"),
        ({"distill": Distillation({"angles": 1.0})}, "views=1 keeps logits"),
        ({"distill": Distillation({"kl": 1.0}, mutual=True)}, "views=1 keeps logits"),
    ],
)
def test_views_that_cannot_be_kept_are_refused(wrong: dict[str, Any], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        replace(SETTINGS, **wrong)

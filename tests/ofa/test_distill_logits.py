"""Losses on logits against values worked out with logarithms alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ofa import distill
from ofa.errors import UserError

TEACHER, STUDENT = (0.8, 0.2), (0.5, 0.5)  # probabilities of two classes


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log() + 3.7  # a constant changes no probability


def wanted(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def test_soft_labels_are_the_cross_entropy_with_the_teachers_probabilities() -> None:
    loss = distill.soft_label_loss(logits(*STUDENT), logits(*TEACHER))
    assert loss.item() == wanted(math.log(2))
    assert distill.soft_label_loss(logits(0.6, 0.4), logits(*TEACHER)).item() == wanted(
        -0.8 * math.log(0.6) - 0.2 * math.log(0.4)
    )


def test_the_divergence_at_temperature_two_is_that_of_the_square_roots() -> None:
    # softmax(log p / 2) is sqrt(p) made to sum to 1: (0.8, 0.2) gives (2/3, 1/3); T^2 = 4
    loss = distill.kl_loss(logits(*STUDENT), logits(*TEACHER), temperature=2.0)
    assert loss.item() == wanted(4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)))
    assert distill.kl_loss(logits(*TEACHER), logits(*TEACHER), 2.0).item() == pytest.approx(0, abs=1e-6)
    assert distill.kl_loss(logits(*STUDENT), logits(*TEACHER), 1.0).item() != wanted(loss.item())


def test_soft_labels_and_divergence_have_one_gradient() -> None:
    teacher, grads = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), []
    for loss in (distill.kl_loss, distill.soft_label_loss):
        student = torch.tensor([[0.3, 0.1, -1.0], [2.0, 0.0, 0.0]], requires_grad=True)
        loss(student, teacher, 3.0).backward()
        grads.append(student.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_logit_regression_is_half_the_squared_distance() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert distill.logit_loss(student, teacher).item() == wanted((5 / 2 + 1 / 2) / 2)
    assert distill.logit_loss(student, student + 1).item() == wanted(1.0), "unlike probabilities, a shift counts"


def test_an_ensemble_has_the_mean_of_its_teachers_probabilities() -> None:
    both = distill.ensemble([logits(0.8, 0.2), logits(0.4, 0.6)])
    assert both.softmax(1).tolist()[0] == wanted([0.6, 0.4])  # type: ignore[arg-type]
    softened = distill.ensemble([logits(0.8, 0.2), logits(0.5, 0.5)], temperature=2.0)
    assert (softened / 2).softmax(1).tolist()[0] == wanted([(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2])  # type: ignore[arg-type]


def test_the_larger_alpha_divergence_counts_image_by_image() -> None:
    # a = -1: 1/2 (sum q^2 / p - 1); a = 1: sum p log(p / q)
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    chi = ((0.25 / 0.8 + 0.25 / 0.2) - 1) / 2
    assert (kl, chi) == wanted((0.192745, 0.28125))  # type: ignore[arg-type]
    assert distill.alpha_divergence(logits(*STUDENT), logits(*TEACHER)).item() == wanted(chi)
    # the student misses what the teacher sees: KL 0.511, and 1/2 (0.02 + 1.62 - 1) = 0.32
    missing = distill.alpha_divergence(logits(0.1, 0.9), logits(0.5, 0.5)).item()
    assert missing == wanted(0.5 * math.log(5) + 0.5 * math.log(5 / 9))
    pair = [torch.cat(rows) for rows in ((logits(*STUDENT), logits(0.1, 0.9)), (logits(*TEACHER), logits(0.5, 0.5)))]
    assert distill.alpha_divergence(*pair).item() == wanted((chi + missing) / 2)


def test_importance_weights_are_clipped_in_value_and_gradient() -> None:
    # p = (0.99, 0.01), q = (0.5, 0.5), a = -1: weights q / p = 0.505 and 50, the second clipped to 5
    student = logits(*STUDENT).requires_grad_()
    loss = distill.alpha_divergence(student, logits(0.99, 0.01))
    assert loss.item() == wanted(0.5 * (0.5 * (0.5 / 0.99 - 1) + 0.5 * (5 - 1)))
    loss.backward()
    # grad of -1/a sum q w grad log q: sum_k q_k w_k (1[k = j] - q_j) for logit j
    w = (0.5 / 0.99, 5.0)
    slope = 0.5 * w[0] * 0.5 - 0.5 * w[1] * 0.5
    assert student.grad.tolist()[0] == wanted([slope, -slope])  # type: ignore[arg-type]
    unclipped = distill.alpha_divergence(logits(*STUDENT), logits(0.99, 0.01), clip=1000.0).item()
    assert unclipped == wanted(((0.25 / 0.99 + 0.25 / 0.01) - 1) / 2)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0])
def test_without_clipping_the_gradient_is_that_of_the_formula(alpha: float) -> None:
    teacher = torch.tensor([[1.0, -0.5, 0.2], [0.0, 1.0, 0.7]], dtype=torch.float64)
    start = torch.tensor([[0.3, 0.1, -1.0], [0.5, 0.0, 0.0]], dtype=torch.float64)

    def formula(student: Tensor) -> Tensor:
        p, q = teacher.softmax(1), student.softmax(1)
        if alpha == 1:
            return (p * (p / q).log()).sum(1).mean()
        if alpha == 0:
            return (q * (q / p).log()).sum(1).mean()
        return ((q * (p / q) ** alpha).sum(1) - 1).mean() / (alpha * (alpha - 1))

    student = start.clone().requires_grad_()
    # a second alpha beside the first, so that it is the first's divergence whichever is larger
    loss = distill.alpha_divergence(student, teacher, alpha - 1e-9, alpha, clip=1e9)
    loss.backward()
    truth = start.clone().requires_grad_()
    formula(truth).backward()
    if alpha not in (0.0, 1.0):
        assert loss.item() == pytest.approx(formula(start).item(), rel=1e-4)
    assert torch.allclose(student.grad, truth.grad, atol=1e-5)


def test_alphas_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match="alpha_min 1, alpha_max -1, clip 5"):
        distill.alpha_divergence(logits(*STUDENT), logits(*TEACHER), 1, -1, 5)


@pytest.mark.parametrize("name", ["soft_label_loss", "kl_loss", "logit_loss", "alpha_divergence"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = logits(*STUDENT).requires_grad_(), logits(*TEACHER).requires_grad_()
    getattr(distill, name)(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None

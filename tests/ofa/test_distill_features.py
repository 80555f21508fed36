"""Losses between features against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa import distill
from ofa.errors import UserError


def maps(*channels: list[list[float]]) -> Tensor:
    """One image, (1, C, H, W)."""
    return torch.tensor([channels], dtype=torch.float64)


def wanted(value: float) -> object:
    return pytest.approx(value, rel=1e-6)


A = maps([[1.0, 2.0], [0.0, -1.0]])
B = maps([[3.0, 0.0], [0.0, 4.0]])


def test_hints_are_half_the_mean_squared_difference() -> None:
    assert distill.hint_loss(A, B).item() == wanted((4 + 4 + 0 + 25) / 4 / 2)
    assert distill.hint_loss(A, A).item() == 0


def test_attention_compares_normalised_energy_whatever_the_channels() -> None:
    student = maps([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]])  # energy (2, 0, 0, 4), normalised by sqrt(20)
    q_s, q_t = np.array([2, 0, 0, 4]) / math.sqrt(20), np.array([9, 0, 0, 16]) / math.sqrt(81 + 256)
    assert distill.attention_loss(student, B).item() == wanted(((q_s - q_t) ** 2).sum() / 2)
    assert distill.attention_loss(-3 * B, B).item() == pytest.approx(0, abs=1e-12), "sign and scale do not count"
    assert distill.attention_loss(B.flip(3), B).item() > 0.1, "places do"


@pytest.mark.parametrize("kernel", ["linear", "poly", "gaussian"])
def test_neuron_selectivity_is_the_squared_mean_discrepancy(kernel: str) -> None:
    # two channels of the teacher, (1, 0) and (0, 1); one of the student, (3, 4) / 5
    teacher, student = maps([[2.0, 0.0]], [[0.0, 5.0]]), maps([[3.0, 4.0]])
    variance = ((2 - 2 * 0.6) + (2 - 2 * 0.8)) / 2  # mean |t - s|^2 = 0.6
    k: Callable[[float], float] = {
        "linear": lambda dot: dot,
        "poly": lambda dot: dot**2,
        "gaussian": lambda dot: math.exp(-(2 - 2 * dot) / (2 * variance)),
    }[kernel]
    value = (2 * k(1) + 2 * k(0)) / 4 + k(1) - 2 * (k(0.6) + k(0.8)) / 2
    assert distill.neuron_loss(student, teacher, kernel).item() == wanted(value)
    shuffled = teacher.flip(1)
    assert distill.neuron_loss(shuffled, teacher, kernel).item() == pytest.approx(0, abs=1e-9), "order does not count"
    assert distill.neuron_loss(student, teacher, kernel).item() > 0.01


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="kernel 'cubic' is not known; choose from linear, poly, gaussian"):
        distill.neuron_loss(A, B, "cubic")


def test_flow_pools_each_side_to_the_smaller_one() -> None:
    torch.manual_seed(0)
    wide, tall = torch.rand(2, 3, 4, 8), torch.rand(2, 5, 8, 2)
    pooled = F.adaptive_max_pool2d(wide, (4, 2)), F.adaptive_max_pool2d(tall, (4, 2))
    other = torch.rand(2, 3, 4, 2), torch.rand(2, 5, 4, 2)
    assert torch.equal(distill.flow_loss((wide, tall), other), distill.flow_loss(pooled, other))


def test_flow_compares_mean_products_of_channels() -> None:
    first_s, last_s = maps([[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]), maps([[2.0, 0.0], [0.0, 2.0]])
    # G_s = (1*2 + 4*2, 1*2 + 1*2) / 4 = (2.5, 1)
    first_t, last_t = maps([[0.0, 1.0], [1.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]), maps([[1.0, 1.0], [1.0, 1.0]])
    # G_t = (2, 8) / 4 = (0.5, 2)
    loss = distill.flow_loss((first_s, last_s), (first_t, last_t))
    assert loss.item() == wanted(((2.5 - 0.5) ** 2 + (1 - 2) ** 2) / 2)
    pooled = distill.flow_loss(
        (first_s, maps([[3.0]])), (first_t, maps([[1.0]]))
    )  # first by its maxima: (4, 1), (1, 2)
    assert pooled.item() == wanted(((12 - 1) ** 2 + (3 - 2) ** 2) / 2)


def test_boundaries_count_only_neurons_on_the_wrong_side_or_within_the_margin() -> None:
    student, teacher = maps([[2.0, 0.5], [0.5, -3.0]]), maps([[0.1, 7.0], [-1.0, 0.0]])
    # active: relu(1 - 2)^2 = 0, relu(1 - 0.5)^2 = 0.25; inactive: relu(1 + 0.5)^2 = 2.25, relu(1 - 3)^2 = 0
    assert distill.boundary_loss(student, teacher).item() == wanted(2.5 / 4)
    assert distill.boundary_loss(student, teacher * 100).item() == wanted(2.5 / 4), "magnitudes do not count"
    assert distill.boundary_loss(student, -teacher).item() != wanted(2.5 / 4)


def test_channels_compare_their_averages() -> None:
    student, teacher = torch.cat([A, B], 1), torch.cat([B, B], 1)  # averages (0.5, 1.75) and (1.75, 1.75)
    assert distill.channel_loss(student, teacher).item() == wanted(1.25**2 / 2)
    assert distill.channel_loss(student.flip(3), teacher).item() == wanted(1.25**2 / 2), "places do not count"


def test_channel_maps_are_distributions_over_the_pixels() -> None:
    student, teacher = maps([[math.log(1.0), math.log(3.0)]]), maps([[math.log(1.0), math.log(1.0)]])
    # p_s = (1/4, 3/4), p_t = (1/2, 1/2)
    assert distill.channel_map_loss(student, teacher).item() == wanted(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    # T = 2: p_s = (1, sqrt 3) / (1 + sqrt 3)
    p = np.array([1, math.sqrt(3)]) / (1 + math.sqrt(3))
    softened = distill.channel_map_loss(student, teacher, 2.0).item()
    assert softened == wanted(4 * (0.5 * np.log(0.5 / p)).sum())
    assert distill.channel_map_loss(student + 5, student).item() == pytest.approx(0, abs=1e-12)


def test_normalised_features_are_whitened_over_the_channels() -> None:
    # one pixel of channels (1, 3, 8): mean 4, variance 26/3; eps 1e-5 as layer norm has it
    teacher, student = maps([[1.0]], [[3.0]], [[8.0]]), maps([[0.0]], [[0.0]], [[9.0]])
    white = (np.array([1, 3, 8]) - 4) / math.sqrt(26 / 3 + 1e-5)
    d = np.abs(np.array([0, 0, 9]) - white)
    assert d[2] > 2 > d[0] > d[1]
    value = (d[0] ** 2 / 4 + d[1] ** 2 / 4 + d[2] - 1) / 3
    assert distill.normalized_feature_loss(student, teacher).item() == wanted(value)
    assert distill.normalized_feature_loss(student, 10 * teacher + 3).item() == pytest.approx(value, rel=1e-4)
    assert distill.normalized_feature_loss(student, teacher.flip(1)).item() != pytest.approx(value, rel=1e-4)


POINTS = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # distances 3, 4, 5
LINE = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)  # distances 1, 3, 2


def test_distances_are_compared_relative_to_their_mean() -> None:
    # psi: (3, 4, 5) / 4 and (1, 3, 2) / 2 for pairs 01, 02, 12; Huber: d^2 / 2 below 1
    d = np.array([0.75 - 0.5, 1 - 1.5, 1.25 - 1])
    assert distill.relation_distance_loss(LINE, POINTS).item() == wanted((d**2 / 2).mean())
    assert distill.relation_distance_loss(7 * POINTS + 1, POINTS).item() == pytest.approx(0, abs=1e-9)
    assert distill.relation_distance_loss(POINTS.flip(0), POINTS).item() > 1e-3


def test_angles_are_compared_by_their_cosines() -> None:
    # the triangle's cosines at 0, 1, 2: 0, 3/5, 4/5; the line's: 1, -1, 1; each angle counts twice among the triples
    d = np.array([1 - 0, -1 - 0.6, 1 - 0.8])
    huber = np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)
    assert distill.relation_angle_loss(LINE, POINTS).item() == wanted(huber.mean())
    turned = POINTS @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    assert distill.relation_angle_loss(2 * turned, POINTS).item() == pytest.approx(0, abs=1e-9)
    assert distill.relation_angle_loss(POINTS * torch.tensor([1.0, 3.0]), POINTS).item() > 1e-3


PAIRS = {
    "hint_loss": (A, B),
    "attention_loss": (A, B),
    "neuron_loss": (A, B),
    "boundary_loss": (A, B),
    "channel_loss": (A, B),
    "channel_map_loss": (A, B),
    "normalized_feature_loss": (torch.cat([A, B], 1), torch.cat([B, A], 1)),
    "relation_distance_loss": (LINE, POINTS),
    "relation_angle_loss": (POINTS * torch.tensor([1.0, 3.0]), POINTS),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_student_gets_a_finite_gradient_and_the_teacher_none(name: str) -> None:
    student, teacher = (x.clone().requires_grad_() for x in PAIRS[name])
    getattr(distill, name)(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0 and teacher.grad is None


def test_batches_of_too_few_images_have_no_relations() -> None:
    distances, angles = distill.relation_distance_loss, distill.relation_angle_loss
    for loss, few in ((distances, 1), (angles, 1), (angles, 2)):
        student = torch.randn(few, 4, requires_grad=True)
        value = loss(student, torch.randn(few, 5))
        value.backward()
        assert value.item() == 0 and student.grad is not None and not student.grad.any()


def test_equal_images_have_finite_gradients_in_relations() -> None:
    student = torch.zeros(4, 3, requires_grad=True)
    teacher = torch.randn(4, 3)
    (distill.relation_distance_loss(student, teacher) + distill.relation_angle_loss(student, teacher)).backward()
    assert student.grad.isfinite().all()

"""Bits by search: exact costs, the best of all choices, limits that nothing meets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms
from ofa.compress.layers import weight_layers
from ofa.compress.linear import Linear, quantize_linear
from ofa.compress.operations import bit_operations
from ofa.compress.packed import pack
from ofa.data import digits
from ofa.errors import UserError
from ofa.files import write_json
from ofa.finetune import Finetuning
from predictors.layer_bits import LayerSum, bits_space, chosen_bits
from scripts.mixed import Mixed
from search.agents import RandomSearch
from search.genetic import Genetic
from tests.ofa.nets import random_net


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), 8)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 16, 10)).eval()


def test_a_sum_over_layers_is_that_computed_by_hand() -> None:
    space = bits_space(2, (2, 8), (4, 6, 8))
    assert space.size == (2 * 3) ** 2 and len(space.genes) - 2 == 4
    genes = space.largest()
    genes[:, space.columns("op")] = [[0, 1, 2, 0]]
    weights, inputs = chosen_bits(space, genes, ((2, 8), (4, 6, 8)))
    assert weights.tolist() == [[2, 8]] and inputs.tolist() == [[8, 4]]
    table = np.array([[[1, 2, 3], [4, 5, 6]], [[10, 20, 30], [40, 50, 60.0]]])
    assert LayerSum("a", "", space, table, 0.5)(genes).tolist() == [3 + 40 + 0.5]
    assert LayerSum("a", "", space, table[:, :, :1])(genes).tolist() == [1 + 40]
    assert LayerSum("a", "", space, table[:, :1])(genes).tolist() == [3 + 10]


def test_the_search_finds_the_best_of_all_choices(work: Work) -> None:
    step = Mixed({"weight_bytes": 1350}, (2, 4, 8), (4, 8), images=64, evaluations=216, verify=3, verify_images=50)
    net = small_net()
    found = step.search(net, work)
    problem = step.problem(fold_batch_norms(net), work)
    space = bits_space(3, (2, 4, 8), (4, 8))
    every = np.array([[0, 0, *op] for op in itertools.product(range(3), range(3), range(3), *[range(2)] * 3)], np.int8)
    evaluation = problem.evaluate(every)
    allowed = np.flatnonzero(evaluation.violation <= 0)
    best = allowed[evaluation.cost[allowed, 0].argmin()]
    weights, _ = chosen_bits(space, every[[best]], ((2, 4, 8), (4, 8)))
    assert list(found[0][0].values()) == weights[0].tolist()
    sizes = [layer.weight.numel() for layer in weight_layers(net).values()]
    bits = sum(n * b for n, b in zip(sizes, weights[0], strict=True))
    biases_scales_and_grids = 4 * 2 * (4 + 6 + 10) + 4 * 2 * 3
    header = evaluation.values["weight_bytes"][best] - bits / 8 - biases_scales_and_grids
    assert 300 < header < 500 and evaluation.values["weight_bytes"][best] <= 1350


def test_the_packed_file_keeps_the_limit_of_bytes(work: Work) -> None:
    net, metadata = random_net(), {"step": "mixed", "resolution": 16}
    work = Work(digits(), 16)
    for tuning in (None, Finetuning(epochs=0)):
        quantization = Linear(bias_correction=True, finetuning=tuning, learned_steps=True)
        step = Mixed({"weight_bytes": 16200}, (2, 4, 8), (4, 8), quantization=quantization, images=64, evaluations=500)
        problem = step.problem(fold_batch_norms(net), work)
        made = replace(step, verify=1)(net, work)
        assert len(pack(made.state_dict(), metadata)) <= 16_200
    genes = bits_space(19, (2, 4, 8), (4, 8)).largest()
    whole = quantize_linear(net, replace(quantization, weight_bits=8), [torch.zeros(2, 1, 16, 16)])
    most, packed = problem.predictors["weight_bytes"](genes)[0], len(pack(whole.state_dict(), metadata))
    assert packed <= most < 1.03 * packed


def test_the_quantized_network_keeps_its_limit_with_any_agent(work: Work) -> None:
    net, image = small_net(), torch.zeros(1, 1, 8, 8)
    most = bit_operations(net, image) * 20 // 1024
    for agent in (RandomSearch, partial(Genetic, population=20)):
        step = Mixed({"bit_operations": most}, (2, 4, 8), (4, 8), images=64, agent=agent, evaluations=150, verify=2)
        assert bit_operations(step(net, work), image) <= most


def test_latencies_come_from_a_file(work: Work, tmp_path: Path) -> None:
    table = {name: {"4x8": 1.0, "8x8": 3.0} for name in ("0", "3", "6")}
    write_json(tmp_path / "ms.json", table)
    step = Mixed({"latency_ms": 5}, (4, 8), (8,), latency=str(tmp_path / "ms.json"), images=32, evaluations=8)
    bits = [sorted(weights.values()) for weights, _ in step.search(small_net(), work)]
    assert bits[0] == [4, 4, 8] and [8, 8, 8] not in bits
    write_json(tmp_path / "ms.json", {"0": {"4x8": 1.0}})
    with pytest.raises(UserError, match=r"ms.json lacks"):
        step.search(small_net(), work)


def test_limits_that_nothing_meets_and_settings_that_mean_nothing_are_refused(work: Work) -> None:
    with pytest.raises(UserError, match=r"no choice of bits meets weight_bytes <= 50: the least that .* reach is \d+"):
        Mixed({"weight_bytes": 50}, images=32)(small_net(), work)
    with pytest.raises(UserError, match=r"no choice of bits meets noise <= 1e-06; raise a limit"):
        Mixed({"noise": 1e-6}, images=32)(small_net(), work)
    with pytest.raises(UserError, match="'sram' is not known"):
        Mixed({"sram": 50}, images=32)(small_net(), work)
    with pytest.raises(UserError, match="needs a limit"):
        Mixed({})
    with pytest.raises(UserError, match=r"3.5 bits"):
        Mixed({"weight_bytes": 50}, weight_choices=(2, 3.5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ascending order"):
        bits_space(2, (4, 2), (8,))

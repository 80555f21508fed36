"""Steps whose order cannot work: they say which goes first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ofa.compress.binary import Binary
from ofa.compress.chain import Step, Work, compress
from ofa.compress.channels import Channels
from ofa.compress.equalize import Equalization
from ofa.compress.gating import Gating
from ofa.compress.kmeans import KMeans
from ofa.compress.linear import Linear
from ofa.compress.low_rank import LowRank
from ofa.compress.magnitude import Magnitude, NOfM
from ofa.compress.movement import Movement, SoftFilter
from ofa.compress.norms import Norms
from ofa.compress.order import check_order
from ofa.compress.pt2e import Pt2e
from ofa.compress.scales import Scales
from ofa.data import digits
from ofa.errors import UserError
from ofa.finetune import Finetuning
from tests.ofa.nets import random_net

BARE = Finetuning(epochs=0)
INT8, GATING, XNOR = Linear(images=64), Gating(finetuning=BARE), Binary("xnor", finetuning=BARE)
CHANNELS, LOW_RANK = Channels(images=64, finetuning=BARE), LowRank(finetuning=BARE)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((INT8, CHANNELS), "put channels before"),
        ((Equalization(), CHANNELS), "put channels before"),
        ((XNOR, CHANNELS), "put channels before"),
        ((GATING, CHANNELS), "put channels before"),
        ((LOW_RANK, INT8, CHANNELS), "put channels before"),
        ((LOW_RANK, Equalization(), CHANNELS), "put channels before"),
        ((GATING, GATING), "give gating once"),
        ((INT8, XNOR), "put xnor before"),
        ((XNOR, XNOR), "put xnor before"),
    ],
)
def test_an_order_that_cannot_work_names_the_step_that_goes_first(steps: tuple[Step, ...], message: str) -> None:
    net: nn.Module = random_net()
    with pytest.raises(UserError, match=message):
        for step in steps:
            net = step(net, Work(digits(), 16))


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.3)])
def test_a_weight_that_is_computed_is_refused(computed: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Flatten(), computed(nn.Linear(256, 10)))
    with pytest.raises(UserError, match="layer 1 computes its weight from others; make it a plain one"):
        next(compress(net, {"int8": INT8}, Work(digits(), 16)))
    tied = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 10))
    tied[2].weight = tied[1].weight
    with pytest.raises(UserError, match=r"1.weight and 2.weight are one parameter; make one of them a copy"):
        next(compress(tied, {"int8": INT8}, Work(digits(), 16)))
    with pytest.raises(UserError, match=r"is of torch.float16; steps work in single precision, give net.float\(\)"):
        next(compress(random_net().half(), {"int8": INT8}, Work(digits(), 16)))
    broken = random_net()
    broken.units[2].project.conv.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"units.2.project.conv.weight has values that are not finite; give"):
        next(compress(broken, {"int8": INT8}, Work(digits(), 16)))


@pytest.mark.parametrize(
    ("steps", "remedy"),
    [
        ((Norms(), LOW_RANK), "step 1 trains or recalibrates, which 0 leaves no statistics for; put 1 before it"),
        ((INT8, CHANNELS), "step 1 cannot follow 0, which changes the layers that it needs; put 1 before it"),
        ((GATING, CHANNELS), "put 1 before it"),
        ((CHANNELS, LOW_RANK, Pt2e(), CHANNELS), "step 3 cannot follow 2"),
        ((INT8, GATING), "put 1 before it"),
        ((Equalization(), GATING), "put 1 before it"),
        ((GATING, GATING), "leave one of them out"),
        ((INT8, Scales()), "put 1 before it"),
        ((INT8, XNOR), "put 1 before it"),
        ((XNOR, XNOR), "leave one of them out"),
        ((XNOR, Pt2e()), "leave one of them out"),
        ((Pt2e(), XNOR), "leave one of them out"),
        ((KMeans(), Scales()), "step 1 would undo 0; put 1 before it"),
        ((KMeans(), Equalization()), "step 1 would undo 0; put 1 before it"),
        ((INT8, Equalization()), "step 1 would undo 0; put 1 before it"),
        ((INT8, LOW_RANK), "step 1 would undo 0; put 1 before it"),
        ((KMeans(), Magnitude()), "step 1 trains all weights, which would undo 0; put 1 before it"),
        ((KMeans(), Channels()), "step 1 trains all weights, which would undo 0; put 1 before it"),
        ((Binary("ternary"), Binary("ternary")), "step 1 trains all weights, which would undo 0; leave one of them"),
        ((Magnitude(), Binary("binary")), "step 1 would undo 0; leave one of them out"),
        ((NOfM(), XNOR), "step 1 would undo 0; leave one of them out"),
        *(
            (
                (first, second),
                "step 1 trains all weights, for which 0 leaves no batch norms; "
                + ("leave one of them" if isinstance(second, Binary) and isinstance(first, Equalization) else "put 1"),
            )
            for first in (INT8, Equalization(), Pt2e())
            for second in (Magnitude(), NOfM(), Movement(), SoftFilter(), Binary("ternary"))
        ),
    ],
)
def test_an_order_that_never_works_is_refused_before_any_step(steps: tuple[Step, ...], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        check_order({str(i): step for i, step in enumerate(steps)})


def test_a_chain_begins_no_step_where_a_later_one_cannot_follow() -> None:
    begun: list[str] = []

    def first(net: nn.Module, work: Work) -> nn.Module:
        begun.append("first")
        return net

    with pytest.raises(UserError, match=r"step channels cannot follow int8, .*; put channels before it"):
        next(compress(random_net(), {"first": first, "int8": INT8, "channels": CHANNELS}, Work(digits(), 16)))
    assert not begun


@pytest.mark.parametrize(
    "steps",
    [
        (Scales(), CHANNELS, GATING, Equalization(), INT8, Pt2e()),
        (CHANNELS, Binary("ternary"), XNOR, INT8),
        (Equalization(relu6="relu"), CHANNELS),  # works on modules that are no StaticNet
        (INT8, Binary("xnor", keep=("units.0.*",))),  # may keep what is quantized
        (Magnitude(), Binary("binary", keep=("units.0.*",))),  # may keep what is pruned
        (Magnitude(), Binary("ternary"), KMeans(finetuning=Finetuning(epochs=1)), INT8),
        (KMeans(), Magnitude(finetuning=BARE)),
        (INT8, Magnitude(finetuning=BARE), NOfM(finetuning=BARE), Linear(finetuning=Finetuning(epochs=1))),
    ],
)
def test_an_order_that_may_work_is_left_to_the_steps(steps: tuple[Step, ...]) -> None:
    check_order({str(i): step for i, step in enumerate(steps)})


def test_a_step_of_somebody_else_may_stand_anywhere_whatever_its_name() -> None:
    theirs = type("Mixed", (), {"__module__": "mine", "__call__": lambda self, net, work: net})()
    check_order({"theirs": theirs, "channels": CHANNELS})


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (lambda net: None, "step mine gave NoneType; it must return the network"),
        (
            lambda net: nn.Sequential(net, nn.LazyLinear(3)),
            r"logits \(2, 3\), of which 6 .* keep \(2, 10\) finite ones",
        ),
        (lambda net: nn.Sequential(net, nn.Threshold(9e9, math.nan)), r"logits \(2, 10\), of which 0 are finite"),
    ],
)
def test_a_step_whose_result_is_no_such_network_is_refused(made: Callable[[Any], Any], answer: str) -> None:
    net, work = random_net(), Work(digits(), 16)
    with pytest.raises(UserError, match=answer):
        list(compress(net, {"mine": lambda net, work: made(net)}, work))
    (kept,) = compress(net, {"mine": lambda net, work: nn.Sequential(net)}, work)
    assert isinstance(kept[1], nn.Sequential)

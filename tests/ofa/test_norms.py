"""Batch norms in fewer bytes: the same function, and a file as small as counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ofa.compress.chain import Work
from ofa.compress.norms import Norms
from ofa.compress.packed import packed_sizes, save_packed
from ofa.data import digits
from tests.ofa.nets import random_net


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(digits(), 16)


def test_a_channel_of_a_batch_norm_is_the_line_computed_by_hand(work: Work) -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, eps=0.25)).eval()
    net[0].weight.data.fill_(3.0)
    net[0].bias.data.fill_(1.0)
    net[0].running_mean.fill_(2.0)
    net[0].running_var.fill_(2.0)  # with eps 2.25: the scale is 3 / 1.5, the shift 1 - 2 x 2
    merged = Norms()(net, work)[0]
    assert (merged.weight.item(), merged.bias.item(), merged.running_mean.item()) == (2.0, -3.0, 0.0)
    assert merged.running_var.item() == 0.75
    assert merged(torch.full((1, 1, 1, 1), 5.0)).item() == 7.0
    assert net[0].running_mean.item() == 2.0, "the network itself is left as it is"


def test_without_rounding_a_network_computes_the_same_and_half_precision_is_near(work: Work) -> None:
    net, x = random_net(), torch.randn(32, 1, 16, 16)
    with torch.inference_mode():
        y, exact, half = (one(x) for one in (net, Norms(half=False)(net, work), Norms()(net, work)))
    torch.testing.assert_close(exact, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
    error = (half - y).norm() / y.norm()
    assert 1e-5 < error < 5e-3


def test_four_float32_values_a_channel_become_two_of_half_precision(work: Work, tmp_path: Path) -> None:
    net = Norms()(random_net(), work)
    save_packed(tmp_path / "net.ofap", net.state_dict())
    rows = {row.name: row for row in packed_sizes(tmp_path / "net.ofap")}
    scale, mean = rows["units.3.expand.bn.weight"], rows["units.3.expand.bn.running_mean"]
    assert (scale.coding, scale.size) == ("half", 2 * 76)
    assert (mean.size, rows["units.3.expand.bn.running_var"].size) == (0, 4), "zeros, and one value once"

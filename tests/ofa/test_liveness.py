"""What is recorded on a running network equals sums written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa.extraction import recalibrate
from ofa.liveness import peak_elements
from tests.ofa.nets import random_net


class Residual(nn.Module):
    def __init__(self, *, kept: bool) -> None:
        super().__init__()
        self.wide, self.narrow, self.kept = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1), kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(torch.relu(self.wide(x)))
        return y + x if self.kept else y


def test_a_tensor_lives_until_its_last_reader() -> None:
    image = torch.randn(1, 2, 4, 4)  # 32 elements, 128 in the middle
    assert peak_elements(Residual(kept=False), image) == 128 + 128  # the activation: its input and its output
    assert peak_elements(Residual(kept=True), image) == 32 + 128 + 128  # and the image that the sum still reads


def test_work_in_place_and_views_need_no_room_of_their_own() -> None:
    conv, image = nn.Conv2d(2, 8, 1), torch.randn(1, 2, 4, 4)
    assert peak_elements(nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten()), image) == 32 + 128
    assert peak_elements(nn.Sequential(conv, nn.ReLU(), nn.Flatten()), image) == 128 + 128


def test_the_batch_counts_and_the_network_is_left_as_it_was() -> None:
    net = random_net().train()
    frozen = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    one, three = (peak_elements(net, torch.randn(n, 1, 16, 16)) for n in (1, 3))
    assert three == 3 * one
    recalibrate(net, [torch.randn(2, 1, 16, 16)])
    assert net.training
    assert not frozen.training

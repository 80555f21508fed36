"""Slow weights against the recursion written out, and a start at the identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ofa.data import ImageData
from ofa.errors import UserError
from ofa.modules import identity
from ofa.schedule import Phase, Schedule
from ofa.space import Space, load_space
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.lookahead import Lookahead
from tests.ofa.test_schedules import WATCH


def test_slow_weights_follow_every_few_steps_and_give_theirs_back() -> None:
    net = nn.Linear(1, 1, bias=False)
    weight = net.weight.data.fill_(3.0)
    lookahead, slow = Lookahead(net, 2), 3.0
    for taken in range(1, 8):
        weight += taken  # a step of training
        fast, done = float(weight), taken / 7
        lookahead.step(net, taken, done)
        if taken % 2 == 0 or taken == 7:
            kept = 0.95 ** (2 - taken % 2) * done**3
            slow = kept * slow + (1 - kept) * fast
        assert float(weight) == pytest.approx(slow if taken % 2 == 0 or taken == 7 else fast, rel=1e-6)
    assert float(weight) == pytest.approx(slow, rel=1e-6) and slow != fast


def test_training_without_a_lookahead_ends_elsewhere(tmp_path: Path, data: ImageData, space: Space) -> None:
    one = Schedule((Phase("one", 0.2, 0.05, sort_channels=True),), batch_size=16)
    ends = [
        Trainer(space, data, replace(one, lookahead=every), tmp_path / str(every), watch=WATCH).run().state_dict()
        for every in (0, 2, 1000)
    ]
    assert not torch.equal(ends[0]["units.0.conv.weight"], ends[1]["units.0.conv.weight"])
    start = Trainer(space, data, one, tmp_path / "start", watch=WATCH).supernet
    start.sort_channels()
    distance = [
        max(float((end[name] - parameter.detach()).abs().max()) for name, parameter in start.named_parameters())
        for end in ends
    ]
    steps = round(0.2 * (data.size("train") // 16))
    assert 0 < distance[2] == pytest.approx((1 - 0.95**steps) * distance[0], rel=1e-3), "it took the last step in alone"


def test_the_steps_of_a_lookahead_are_whole() -> None:
    with pytest.raises(UserError, match=r"lookahead is -1; give a number of steps"):
        Schedule((Phase("one", 1, 0.05),), lookahead=-1)
    for wrong in (0.5, None):
        with pytest.raises(UserError, match=f"lookahead is {wrong}"):
            Schedule((Phase("one", 1, 0.05),), lookahead=wrong)  # type: ignore[arg-type]


def test_a_checkpoint_with_a_lookahead_goes_on_with_one(tmp_path: Path, data: ImageData, space: Space) -> None:
    one = Schedule((Phase("one", 0.1, 0.05),), batch_size=32, lookahead=2)
    Trainer(space, data, one, tmp_path, watch=WATCH).run()
    with pytest.raises(UserError, match="was written with a lookahead; give the same"):
        Trainer(space, data, replace(one, lookahead=0), tmp_path, watch=WATCH).run()


def test_convolutions_start_by_passing_their_channels_on() -> None:
    space = load_space("cifar_conv")
    net = Supernet(space)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identity(net)
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1}
    for name, conv in convs.items():
        x, n, stride = torch.randn(2, conv.in_channels, 6, 6), conv.in_channels, conv.stride[0]
        assert torch.equal(conv(x)[:, :n], x[:, :, ::stride, ::stride])
        part = nn.functional.conv2d(x[:, :2], conv.weight[:5, :2], stride=stride, padding=1)  # of a narrower network
        assert torch.equal(part[:, :2], x[:, :2, ::stride, ::stride])
        own, fresh = net.state_dict()[f"{name}.weight"], before[f"{name}.weight"]
        assert torch.equal(own[n:], fresh[n:]) and not torch.equal(own[:n], fresh[:n])
    assert any(conv.out_channels > conv.in_channels for conv in convs.values())


def test_an_identity_leaves_depthwise_and_1x1_convolutions(space: Space) -> None:
    net = Supernet(space)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identity(net)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"units.0.conv.weight"}


def test_training_starts_at_the_identity_where_the_schedule_says_so(
    tmp_path: Path, data: ImageData, space: Space
) -> None:
    one = Schedule((Phase("one", 0.1, 0.05),), batch_size=32)
    for asked in (True, False):
        run = Trainer(space, data, replace(one, identity=asked), tmp_path / str(asked), watch=WATCH)
        weight = run.supernet.units[0].conv.weight
        expected = nn.init.dirac_(torch.empty_like(weight))[: weight.shape[1]]
        assert torch.equal(weight[: weight.shape[1]], expected) == asked

"""ofa-specialize's on-device part: the plan fits the limit as people write it, an impossible one is explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from ofa.data import digits
from ofa.errors import UserError
from scripts.ondevice import adapt
from scripts.stage import plain
from tests.ofa.nets import random_net


def options(memory: str) -> dict[str, Any]:
    with initialize_config_module("conf", version_base="1.3"):
        overrides = [f"ondevice.memory={memory}", "ondevice.finetuning.epochs=0.1", "ondevice.batches=1"]
        return plain(compose("config", overrides).ondevice)


def test_a_network_is_fine_tuned_within_the_limit() -> None:
    net = random_net()
    tuned, found = adapt(net, digits(), options("16KB"), seed=0)
    assert found["memory"]["total"] <= found["limit"] == 16_000
    old, new = net.state_dict(), tuned.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    planned = tuple(f"{layer}." for layer in found["plan"])
    assert changed and all(name.startswith(planned) for name in changed)


def test_an_impossible_limit_is_answered_with_the_least() -> None:
    with pytest.raises(UserError, match=r"needs 120 bytes: raise ondevice\.memory"):
        adapt(random_net(), digits(), options("0.1KB"), seed=0)

"""A sparse update under a memory limit: which layers and channels move.

What a part contributes is the squared norm of its gradient on training images, by which a small step of SGD lowers the
loss (to first order, for each unit of the learning rate); MCUNetV3 (Lin et al. 2022, sec. 3.2) measures accuracies
instead, at the price of a fine-tuning for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.ondevice.memory import FLOAT, Layer, Memory, Plan, Update, layers, memory, parameters, passed, read
from ofa.ondevice.modules import Updating
from ofa.spec import NetSpec
from ofa.static import StaticNet

if TYPE_CHECKING:
    from ofa.data import ImageData

METHODS = ("sparse", "bias", "last")
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the input channels of a layer


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What a device can spend on training.

    limit: bytes.  method: "sparse" takes what contributes most for its bytes, "last" whole layers from the last on,
    "bias" biases alone from the last on.  images: held at once.  momentum: whether the optimizer has one.  batches: of
    64 training images, over which contributions are measured.
    """

    limit: float
    method: str = "sparse"
    images: int = 1
    momentum: bool = True
    batches: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method not in METHODS:
            raise UserError(f"ondevice.method {self.method!r} is not known; choose from {', '.join(METHODS)}")
        if self.images < 1 or self.batches < 1:
            raise UserError(f"ondevice.images {self.images} and batches {self.batches} must be at least 1")

    def needed(self, spec: NetSpec, plan: Plan) -> Memory:
        """What a plan needs."""
        return memory(spec, plan, images=self.images, momentum=self.momentum)


@dataclass(frozen=True, slots=True)
class Gain:
    """What each input channel's weights (C,) of a layer, and its bias, contribute."""

    channels: NDArray[np.float64]
    bias: float


def whole(net: StaticNet, *, weights: bool = True) -> dict[str, Update]:
    """The plan that updates every layer: its bias and, if asked, all weights."""
    return {x.name: Update(x.bias, tuple(range(x.cin)) if weights else ()) for x in layers(net.spec)}


def smallest(spec: NetSpec, settings: OnDevice) -> dict[str, Update]:
    """The plan that needs the least, one bias; raises UserError where not even that fits the limit."""
    single = [{layer.name: Update()} for layer in layers(spec) if layer.bias]
    need, plan = min(((settings.needed(spec, plan).total, plan) for plan in single), key=lambda found: found[0])
    if settings.limit < need:
        least = f"the smallest, of the bias of {next(iter(plan))}, needs {need:,} bytes"
        raise UserError(f"no update fits {settings.limit:,.0f} bytes; {least}: raise ondevice.memory")
    return plan


def contributions(net: StaticNet, data: ImageData, settings: OnDevice, *, seed: int = 0) -> dict[str, Gain]:
    """The squared gradient norm of every layer's parts, of the mean loss over some training images."""
    updating, device = Updating(net, whole(net)), next(net.parameters()).device
    rng = np.random.default_rng((seed, 6))
    limit = min(64 * settings.batches, data.size("train"))
    for x, y in data.batches("train", min(64, limit), net.spec.resolution, rng=rng, limit=limit):
        (F.cross_entropy(updating(x.to(device)), y.to(device), reduction="sum") / limit).backward()
    return {name: _gain(updating.net.get_submodule(name)) for name in updating.plan}


def _gain(module: Any) -> Gain:
    weighted = module if hasattr(module, "part") else module.conv
    shift = module.bias if hasattr(module, "part") else getattr(module.bn, "shift", None)
    squares = weighted.part.grad.double().square()
    by_channel = squares.flatten(1).sum(1) if weighted.dimension == 0 else squares.transpose(0, 1).flatten(1).sum(1)
    bias = 0.0 if shift is None or shift.grad is None else float(shift.grad.double().square().sum())
    return Gain(by_channel.cpu().numpy(), bias)


def choose(net: StaticNet, data: ImageData, settings: OnDevice, *, seed: int = 0) -> dict[str, Update]:
    """The best plan found within the limit; raises UserError, with the least that any plan needs, where none fits."""
    known, least = layers(net.spec), smallest(net.spec, settings)
    if settings.method != "sparse":
        return _last(net, known, settings) or least
    gains = contributions(net, data, settings, seed=seed)
    plans = [_fill(known, first, gains, settings) for first in range(len(known))]
    fitting = [(gain, plan) for gain, plan in plans if plan and settings.needed(net.spec, plan).total <= settings.limit]
    return max(fitting, key=lambda found: found[0])[1] if fitting else least


def _last(net: StaticNet, known: Sequence[Layer], settings: OnDevice) -> dict[str, Update]:
    """As many layers from the last on as fit."""
    every, plan = whole(net, weights=settings.method == "last"), dict[str, Update]()
    for layer in reversed(known):
        longer = plan | {layer.name: every[layer.name]}
        if settings.needed(net.spec, longer).total > settings.limit:
            break
        plan = longer
    return plan


def _fill(
    known: Sequence[Layer], first: int, gains: dict[str, Gain], settings: OnDevice
) -> tuple[float, dict[str, Update]]:
    """The gain and the plan that updates layers from `first` on: greedily, what contributes most for its bytes.

    Channels are taken in the order of their contribution, so that each further share of a layer brings less.
    """
    left = settings.limit - sum(passed(layer, settings.images) for layer in known[first:])
    steps = [step for layer in known[first:] for step in _steps(layer, gains[layer.name], settings)]
    plan, total = dict[str, Update](), 0.0
    closed = set[str]()
    for gain, cost, layer, bias, count in sorted(steps, key=lambda step: -step[0] / step[1]):
        key = f"{layer.name} {bias}"
        if cost > left or key in closed:
            closed.add(key)
            continue
        left, total = left - cost, total + gain
        old = plan.get(layer.name, Update(bias=False))
        order = np.argsort(-gains[layer.name].channels, kind="stable")
        channels = old.channels if bias else tuple(sorted(order[:count].tolist()))
        plan[layer.name] = Update(old.bias or bias, channels)
    return total, plan


def _steps(layer: Layer, gain: Gain, settings: OnDevice) -> list[tuple[float, float, Layer, bool, int]]:
    """Gain, bytes, layer, whether of the bias, channels in all: of each further part of a layer."""
    each = FLOAT * (2 + settings.momentum)
    found: list[tuple[float, float, Layer, bool, int]] = []
    if layer.bias:
        found.append((gain.bias, each * layer.cout, layer, True, 0))
    best, counts = np.sort(gain.channels)[::-1], [max(1, round(share * layer.cin)) for share in SHARES]
    for before, count in zip([0, *counts], counts, strict=False):
        if count > before:
            more = Update(bias=False, channels=tuple(range(count - before)))
            cost = each * parameters(layer, more) + read(layer, count - before, settings.images)
            found.append((float(best[before:count].sum()), cost, layer, False, count))
    return found

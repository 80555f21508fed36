"""Channels chosen anew for every image: feature boosting and suppression (FBS, Gao et al. 2019).  N images.

What this saves is saved only by a runtime that skips suppressed channels.  PyTorch, ONNX Runtime and LiteRT compute
them all and the gates besides: `gated_macs` counts both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.layers import device_of, image_of, opened, put
from ofa.compress.magnitude import Ramp, finetuned
from ofa.errors import UserError
from ofa.finetune import Finetuning
from ofa.modules import evaluating

GATE_STD = 0.01  # of the gates' first weights


class Gated(nn.Module):
    """A convolution with its batch norm, whose least salient output channels are zero and whose others are scaled.

    The gate of a channel is ReLU(linear of the input channels' mean magnitudes); all but the `kept` largest become
    zero (Gao et al. 2019, eq. 5-7).  Zeroed are the outputs of batch norm.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, kept: int):
        super().__init__()
        self.conv, self.bn, self.kept = conv, bn, kept
        self.gate = nn.Linear(conv.in_channels, conv.out_channels, device=conv.weight.device)
        nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gate.bias)

    def gates(self, x: Tensor) -> Tensor:
        """(N, cout) for inputs (N, cin, H, W); at most `kept` of each image are above 0."""
        gates = F.relu(self.gate(x.abs().mean((2, 3))))
        top = gates.topk(self.kept, dim=1).indices
        return torch.zeros_like(gates).scatter(1, top, gates.gather(1, top))

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H', W')."""
        gated: Tensor = self.bn(self.conv(x)) * self.gates(x)[:, :, None, None]
        return gated


@dataclass(frozen=True, slots=True)
class GatedMacs:
    """Multiply-adds of a gated network, a mean for one image.

    dense: of the same network without gates.  executed: what runtimes do, all channels and the gates.  needed: what a
    runtime that skips suppressed outputs, and inputs that are zero everywhere, would do, gates included.
    """

    dense: float
    executed: float
    needed: float


@dataclass(frozen=True, slots=True)
class Gating:
    """Gate every convolution that batch norm follows, and train network and gates.

    kept: share of each convolution's channels that an image gets.  Gates begin near 1 for all channels, and learn
    from the loss alone.  gradual: share of the fine-tuning during which channels become fewer, by a cubic.  Depthwise
    and other grouped convolutions, and the first one, are left alone.
    """

    kept: float = 0.5
    gradual: float = 0.6
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise UserError(f"kept {self.kept} is the share of channels an image gets: above 0, at most 1")
        if not 0 < self.gradual <= 1:
            raise UserError(f"gradual {self.gradual} is the share of training in which channels become fewer: (0, 1]")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A gated, trained network in evaluation mode, no StaticNet any more.

        Raises UserError where no convolution can be gated, where some are already, or where batch norms do not follow
        the convolutions that they stand behind.
        """
        if any(isinstance(module, Gated) for module in net.modules()):
            raise UserError("the network's convolutions are gated already; give gating once")
        gated, image = opened(net), image_of(net, work).normal_(generator=_generator(net))
        pairs = conv_norms(gated)[1:]
        if not pairs:
            raise UserError("no convolution but the first has a batch norm behind it to gate; use another step")
        for conv, bn in pairs:
            _gate(gated, conv, bn, 1.0)
        with torch.no_grad(), evaluating(gated, net):
            same = torch.allclose(gated(image), net(image), rtol=1e-3, atol=1e-4)
        if not same:
            raise UserError("the network's batch norms do not follow its convolutions in order; gate another network")
        for module in gated.modules():
            if isinstance(module, Gated):  # equal gates cannot compete
                nn.init.normal_(module.gate.weight, 0, GATE_STD, generator=_generator(net))
        if not (steps := self.finetuning.steps(work.data.size("train"))):
            self._narrow(gated, 1.0)
        return finetuned(gated, work, self.finetuning, Ramp(self._narrow, steps, self.gradual, holds=False))

    def _narrow(self, net: nn.Module, done: float) -> None:
        """Leave an image so many channels, in place; done: 0 leaves all, 1 `kept` of them."""
        for module in net.modules():
            if isinstance(module, Gated):
                module.kept = max(1, round((1 - done * (1 - self.kept)) * module.conv.out_channels))


def conv_norms(net: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions, not grouped, that stand before a batch norm of their width in the same module."""
    pairs = []
    for prefix, module in net.named_modules():
        children = list(module.named_children())
        for (first, conv), (second, bn) in pairwise(children):
            able = isinstance(conv, nn.Conv2d) and conv.groups == 1 and isinstance(bn, nn.BatchNorm2d)
            if able and conv.out_channels == bn.num_features:
                pairs.append((f"{prefix}.{first}".lstrip("."), f"{prefix}.{second}".lstrip(".")))
    return pairs


def gated_macs(net: nn.Module, batches: Iterable[Tensor]) -> GatedMacs:
    """Multiply-adds of its convolutions and linear layers, counted on images (N, C, H, W)."""
    dense = gates = needed = images = 0.0
    kept: dict[nn.Module, Tensor] = {}
    owned = {module.gate for module in net.modules() if isinstance(module, Gated)}

    def choose(module: Gated, inputs: tuple[Tensor, ...]) -> None:
        kept[module.conv] = module.gates(inputs[0]).count_nonzero(1)

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal dense, gates, needed
        macs = output[0].numel() * module.weight[0].numel()  # type: ignore[index]
        if module in owned:
            gates += macs * len(output)
            return
        dense += macs * len(output)
        own = kept[module] / output.shape[1] if module in kept else torch.ones(len(output), device=output.device)
        needed += float((own * _alive(inputs[0])).sum()) * macs

    handles = []
    for module in net.modules():
        if isinstance(module, Gated):
            handles.append(module.register_forward_pre_hook(choose))
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(watch))
    try:
        with torch.no_grad(), evaluating(net):
            for x in batches:
                images += len(x)
                net(x.to(device_of(net)))
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise UserError("counting gated multiply-adds got no images; give at least one batch")
    # choose() runs each gate once more than the network does
    return GatedMacs(dense / images, (dense + gates / 2) / images, (needed + gates / 2) / images)


def _alive(x: Tensor) -> Tensor:
    """The share of each image's input channels that are not zero everywhere, (N,)."""
    return x.flatten(2).any(2).float().mean(1) if x.ndim > 2 else (x != 0).float().mean(1)


def _gate(net: nn.Module, conv: str, bn: str, kept: float) -> None:
    layer, norm = net.get_submodule(conv), net.get_submodule(bn)
    assert isinstance(layer, nn.Conv2d)
    gated = Gated(layer, norm, max(1, round(kept * layer.out_channels))).train(layer.training)
    put(net, bn, nn.Identity())  # first: the gated one has it too
    put(net, conv, gated)


def _generator(net: nn.Module) -> torch.Generator:
    return torch.Generator(device_of(net)).manual_seed(0)

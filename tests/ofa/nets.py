"""Small networks for tests: every kind of unit, and parameters that all matter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ofa.extraction import recalibrate
from ofa.space import Space, load_space
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec

SPEC = NetSpec(
    units=(
        Unit("conv", 1, 16, 3, 2, act="h_swish"),
        Unit("mbconv", 16, 16, 3, 1, 16, 0, "relu", expand=False, shortcut=True),
        Unit("mbconv", 16, 24, 5, 2, 64, 16, "relu", expand=True),
        Unit("mbconv", 24, 24, 3, 1, 76, 24, "h_swish", expand=True, shortcut=True),
        Unit("mbconv", 24, 40, 3, 2, 96, 0, "relu6", expand=True),
        Unit("conv", 40, 64, act="h_swish"),
        Unit("pool", 64, 64),
        Unit("conv", 64, 48, act="h_swish", bn=False),
        Unit("linear", 48, 10),
    ),
    resolution=16,
    in_channels=1,
    classes=10,
)
RESNET = NetSpec(
    units=(
        Unit("conv", 1, 16, 3, 1, act="relu"),
        Unit("conv", 16, 16, 3, 1, act="relu", shortcut=True),
        Unit("maxpool", 16, 16, 3, 2),
        Unit("bottleneck", 16, 64, 3, 1, 24, act="relu"),
        Unit("bottleneck", 64, 64, 3, 1, 16, act="relu", shortcut=True),
        Unit("bottleneck", 64, 96, 3, 2, 32, act="relu"),
        Unit("pool", 96, 96),
        Unit("linear", 96, 10),
    ),
    resolution=16,
    in_channels=1,
    classes=10,
    bn_eps=1e-3,
)


def random_net(spec: NetSpec = SPEC, seed: int = 0) -> StaticNet:
    """A net whose every parameter and statistic matters, and whose logits follow the image."""
    torch.manual_seed(seed)
    net = build_spec(spec)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.normal_(net.units[-1].weight)  # type: ignore[arg-type]
    recalibrate(net, [torch.randn(64, spec.in_channels, spec.resolution, spec.resolution)])
    return net.eval()


def small(name: str) -> Space:
    """A published family with few blocks and narrow stages, so that it is quick."""
    space = load_space(name)
    stages = tuple(
        replace(
            s,
            channels=(64 if s.block == "bottleneck" else 8) * (i + 1),
            before=tuple(replace(x, channels=x.channels and 16) for x in s.before),
        )
        for i, s in enumerate(space.stages[:3])
    )
    stem = tuple(replace(layer, channels=8) for layer in space.stem)
    return replace(space, name="small", resolution=(32,), stages=stages, stem=stem, classes=10)

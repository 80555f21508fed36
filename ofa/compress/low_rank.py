"""Low-rank factorization of a network's layers to a number of multiply-adds.

O, I channels out and in, kernel Y x X, R ranks; a, b pixels before and after a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.factors import cp, cp_product, factorized, tucker
from ofa.compress.fisher import Metric, metrics
from ofa.compress.layers import Layer, image_of, layer_macs, listed, observe, opened, patterns, put, weight_layers
from ofa.compress.magnitude import finetuned
from ofa.compress.targets import Target, amount, check_target
from ofa.errors import UserError
from ofa.finetune import Finetuning

METHODS = ("svd", "spatial", "tucker", "cp")
TUCKER_RANKS = 16  # of each of the two channels that are tried
CP_RANKS = 6  # that are tried: each one is a fit of its own
TRIAL_SWEEPS = 20


@dataclass(frozen=True, slots=True)
class Pixels:
    """Of one layer on one image: before, after, and after its first factor where that has only the kernel's column."""

    before: int
    after: int
    column: int


@dataclass(frozen=True, slots=True)
class Option:
    """One way to write a layer: its ranks (none: as it is), what is lost in the layer's metric, multiply-adds."""

    ranks: tuple[int, ...]
    loss: float
    macs: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """Write layers as chains of thinner ones, and fine-tune with the whole network as teacher.

    macs: to keep, as a share of the network's or an amount ("5M").  method: of kernels larger than 1 x 1: svd (a
    narrow convolution, then 1 x 1: Zhang et al. 2016), spatial (a column, then a row: Jaderberg et al. 2014), tucker
    (1 x 1, a narrow core, 1 x 1: Kim et al. 2016), cp (1 x 1, column, row, 1 x 1, the middle ones depthwise: Lebedev et
    al. 2015).  Linear layers and 1 x 1 convolutions are always split by SVD.  Depthwise and other grouped convolutions
    are left alone, and layers that match `keep`.

    images: validation images that tell what the loss feels of each layer's output (`ofa.compress.fisher`).  SVD keeps
    the directions of the output that matter most to it, and ranks lose the least of it for the multiply-adds they save.
    0: the weights' energy alone, relative to each layer's.
    """

    macs: Target = 0.5
    method: str = "svd"
    keep: tuple[str, ...] = ()
    images: int = 512
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        check_target("macs", self.macs)
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not known; choose from {', '.join(METHODS)}")
        if self.images < 0:
            raise UserError(f"images {self.images} must be at least 0, which takes the weights alone")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A factorized and fine-tuned copy in evaluation mode, no StaticNet any more: its layers are in no spec.

        Raises UserError where no layer can be factorized, and where the target is below what ranks of 1 leave.
        """
        able_layers = {name: layer for name, layer in weight_layers(net, self.keep).items() if able(layer)}
        if not able_layers:
            listing = listed(list(weight_layers(net, self.keep)))
            raise UserError(f"no layer can be factorized: {listing} are grouped; use another step")
        thin, metric = opened(net), metrics(net, able_layers, work, self.images)
        for name, ranks in self._ranks(net, able_layers, metric, image_of(net, work)).items():
            put(thin, name, factorized(able_layers[name], self.method, ranks, metric[name]))
        return finetuned(thin, work, self.finetuning)

    def _ranks(
        self, net: nn.Module, layers: Mapping[str, Layer], metric: Mapping[str, Metric], image: Tensor
    ) -> dict[str, tuple[int, ...]]:
        """The ranks of the layers that are to be factorized."""
        macs, pixels = layer_macs(net, image), layer_pixels(net, image)
        limit = amount("macs", self.macs, sum(macs.values()))
        options = {
            name: [
                Option((), 0.0, macs[name]),
                *layer_options(layer, self.method, pixels[name], macs[name], metric[name]),
            ]
            for name, layer in layers.items()
            if name in pixels  # it runs
        }
        rest = sum(n for name, n in macs.items() if name not in options)
        least = rest + sum(min(o.macs for o in own) for own in options.values())
        if least > limit:
            share = least / sum(macs.values())
            raise UserError(f"macs {self.macs} cannot be met: ranks of 1 leave {least:,} ({share:.3g}); give more")
        return {name: option.ranks for name, option in choose(options, limit - rest).items() if option.ranks}


def able(layer: Layer) -> bool:
    """Whether a layer can be factorized: not a grouped convolution, and padded with zeros by a number."""
    return isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def choose(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option]:
    """An option for each layer, so that multiply-adds are at most `limit` and the losses' sum is small.

    The price of a multiply-add for which each layer's cheapest option just meets the limit, found by bisection: the
    best choice of all among those on the layers' convex hulls.
    """

    def at(price: float) -> dict[str, Option]:
        return {name: min(own, key=lambda o: (o.loss + price * o.macs, o.macs)) for name, own in options.items()}

    low, high = 0.0, max(o.loss for own in options.values() for o in own) or 1.0  # at which the fewest are best
    if sum(option.macs for option in at(low).values()) <= limit:
        return at(low)
    for _ in range(100):
        middle = (low * high) ** 0.5 if low else high / 1e4
        fits = sum(option.macs for option in at(middle).values()) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return at(high)


def layer_options(layer: Layer, method: str, pixels: Pixels, macs: int, metric: Metric) -> Iterator[Option]:
    """Every way to factorize a layer that saves multiply-adds; other ways than SVD lose their share of the whole."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1) or method == "svd":
        values, _ = metric.directions()
        found = _svd_options(weight, pixels, values)
    else:
        whole = metric.total()
        found = ((ranks, whole * loss, cost) for ranks, loss, cost in OPTIONS[method](weight, pixels, macs))
    for ranks, loss, cost in found:
        if cost < macs:
            yield Option(ranks, loss, cost)


Options = Iterator[tuple[tuple[int, ...], float, int]]


def _svd_options(weight: Tensor, pixels: Pixels, values: Tensor) -> Options:
    cost = pixels.after * (weight[0].numel() + len(weight))
    for rank, lost in enumerate((values.sum() - values.cumsum(0)).tolist(), 1):
        yield (rank,), max(0.0, lost), rank * cost


def _spatial_options(weight: Tensor, pixels: Pixels, macs: int) -> Options:
    o, i, y, x = weight.shape
    cost = pixels.column * i * y + pixels.after * o * x
    energy = torch.linalg.svdvals(weight.permute(1, 2, 0, 3).reshape(i * y, o * x)).square()
    lost = 1 - energy.cumsum(0) / energy.sum().clamp_min(1e-30)
    for rank, loss in enumerate(lost.tolist(), 1):
        yield (rank,), max(0.0, loss), rank * cost


def _tucker_options(weight: Tensor, pixels: Pixels, macs: int) -> Options:
    """HOSVD's losses, for all pairs of ranks at once: the energy outside a corner of its core; HOOI loses less."""
    o, i, y, x = weight.shape
    _, core, _ = tucker(weight, (i, o), sweeps=0)
    kept = core.square().sum((2, 3)).cumsum(0).cumsum(1)
    for outer, inner in product(_ranks(o, TUCKER_RANKS), _ranks(i, TUCKER_RANKS)):
        loss = 1 - float(kept[outer - 1, inner - 1] / kept[-1, -1].clamp_min(1e-30))
        cost = pixels.before * i * inner + pixels.after * (inner * outer * y * x + outer * o)
        yield (inner, outer), max(0.0, loss), cost


def _cp_options(weight: Tensor, pixels: Pixels, macs: int) -> Options:
    o, i, y, x = weight.shape
    cost = pixels.before * i + pixels.column * y + pixels.after * (x + o)
    for rank in _ranks(max(1, macs // cost), CP_RANKS, geometric=True):
        error = weight - cp_product(cp(weight, rank, TRIAL_SWEEPS))
        yield (rank,), float(error.square().sum() / weight.square().sum().clamp_min(1e-30)), rank * cost


OPTIONS: dict[str, Callable[[Tensor, Pixels, int], Options]] = {
    "spatial": _spatial_options,
    "tucker": _tucker_options,
    "cp": _cp_options,
}


def _ranks(most: int, n: int, *, geometric: bool = False) -> list[int]:
    """Up to n ranks from 1 to `most`."""
    values = np.geomspace(1, most, n) if geometric else np.linspace(1, most, n)
    return sorted({round(float(value)) for value in values})


def layer_pixels(net: nn.Module, image: Tensor) -> dict[str, Pixels]:
    """The pixels of each convolution or linear layer on one image (1, C, H, W), of all times that it runs."""
    found: dict[str, Pixels] = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if isinstance(net.get_submodule(name), nn.Linear):
            n = y.numel() // y.shape[-1]
            now = Pixels(n, n, n)
        else:
            now = Pixels(x.shape[-2] * x.shape[-1], y.shape[-2] * y.shape[-1], y.shape[-2] * x.shape[-1])
        past = found.get(name, Pixels(0, 0, 0))  # a layer may run more than once
        found[name] = Pixels(past.before + now.before, past.after + now.after, past.column + now.column)

    observe(net, image, see)
    return found

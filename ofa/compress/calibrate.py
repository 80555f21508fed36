"""What the inputs of a network's layers look like on calibration images: extremes, means, histograms, products.

C channels of a layer's input, B bins, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ofa.compress.adaround import second_moments
from ofa.compress.layers import Layer
from ofa.compress.ranges import BINS, Histogram
from ofa.errors import UserError
from ofa.modules import evaluating


@dataclass(slots=True)
class Inputs:
    """One layer's input: its extremes, the mean of each channel (C,), its histogram, its second moments (G, K, K)."""

    low: float = np.inf
    high: float = -np.inf
    means: Tensor | None = None
    counts: Tensor | None = None
    moments: Tensor | None = None
    seen: int = 0

    @property
    def histogram(self) -> Histogram:
        """Of all values, (B,) bins; only the extremes where no counts were taken."""
        counts = np.zeros(BINS) if self.counts is None else self.counts.double().numpy()
        return Histogram(self.low, self.high, counts)


def observe(
    net: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Tensor],
    *,
    histograms: bool = True,
    moments: bool = False,
    seed: int = 0,
) -> dict[str, Inputs]:
    """What each of the layers reads while `net` sees the batches (N, C, H, W), in evaluation mode.

    Histograms need a second pass, over the extremes that the first one found.  Raises UserError where no image comes.
    """
    kept, found = list(batches), {name: Inputs() for name in layers}
    generator = torch.Generator().manual_seed(seed)
    if not kept:
        raise UserError("calibration got no images; give at least one batch")

    def first(name: str, x: Tensor) -> None:
        it, n = found[name], len(x)
        it.low, it.high = min(it.low, float(x.min())), max(it.high, float(x.max()))
        share = n / (it.seen + n)
        channels = x.ndim - 1 if isinstance(layers[name], nn.Linear) else 1
        means = x.mean([i for i in range(x.ndim) if i != channels])
        it.means = means if it.means is None else it.means.lerp(means, share)
        if moments:
            products = second_moments(layers[name], x, generator)
            it.moments = products if it.moments is None else it.moments.lerp(products, share)
        it.seen += n

    def second(name: str, x: Tensor) -> None:
        it = found[name]
        counts = torch.histc(x, BINS, it.low, it.high).cpu()
        it.counts = counts if it.counts is None else it.counts + counts

    for watcher in (first, second) if histograms else (first,):
        with watching(layers, watcher), evaluating(net), torch.no_grad():
            for batch in kept:
                net(batch)
    if unused := [name for name, it in found.items() if not it.seen]:
        raise UserError(f"layer {unused[0]} was never used on the calibration images; keep it in float")
    return found


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with a layer's name and input before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: see(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

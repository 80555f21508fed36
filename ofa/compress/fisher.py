"""What the loss feels of a layer's output, as a metric on it.

N images, O channels out; a response is a layer's output at one pixel, (O,).  With g the gradient of the loss with
respect to a response, the loss grows by half of d' E[g g'] d to second order where a response changes by d (Fisher's
information in place of the Hessian, as in K-FAC: Martens & Grosse 2015).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.layers import Layer, device_of, outputs
from ofa.modules import evaluating

BATCH = 128  # images, fewer where they are large:
PIXELS = 1 << 18  # of a batch, whose maps are all kept for their gradients
FEW = 4  # images whose gradients are squared together, which at a trained network is as good as one by one
FLOOR = 1e-3  # of a layer's mean information
DAMPING = 0.01  # of the mean eigenvalue, added to all: no direction is free


@dataclass(frozen=True, slots=True)
class Metric:
    """Coordinates of a layer's responses in which the loss feels all directions alike.

    root, inverse: to these coordinates and back, (O, O).  covariance: of the responses there (O, O); its trace is twice
    what an image's loss would grow if all of them became their mean.  mean: of the responses (O,), None if not known.
    """

    root: Tensor
    inverse: Tensor
    covariance: Tensor
    mean: Tensor | None = None

    @classmethod
    def of_weight(cls, layer: Layer) -> Metric:
        """As if all inputs and all outputs mattered alike; the trace is 1."""
        weight = layer.weight.detach().double().flatten(1)
        same = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
        return cls(same, same, weight @ weight.T / weight.square().sum().clamp_min(1e-30))

    def total(self) -> float:
        """What is lost without any response."""
        return float(self.covariance.trace())

    def directions(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (O,) of the covariance, the largest first, and its eigenvectors as columns (O, O)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def kept(self, response: Tensor, rank: int) -> Tensor:
        """What the first directions hold of a response (O,)."""
        directions = self.directions()[1][:, :rank]
        return self.inverse @ (directions @ (directions.T @ (self.root @ response)))


def metrics(net: nn.Module, layers: Mapping[str, Layer], work: Work, images: int) -> dict[str, Metric]:
    """The metric of each layer, from so many validation images and their labels.

    That of its weights alone where `images` is 0, and for a layer that does not run in evaluation mode.
    """
    if not images:
        return {name: Metric.of_weight(layer) for name, layer in layers.items()}
    sums = {name: _Sums(len(layer.weight), device_of(net)) for name, layer in layers.items()}
    batch, n = max(1, min(BATCH, images, PIXELS // work.resolution**2)), 0
    with evaluating(net), torch.enable_grad(), outputs(net, layers) as seen:
        for x, labels in work.data.batches("val", batch, work.resolution, rng=None, limit=images):
            x, labels = x.to(device_of(net)).requires_grad_(), labels.to(device_of(net))
            loss = F.cross_entropy(net(x), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [y for _, y in seen], materialize_grads=True)
            for (name, y), gradient in zip(seen, gradients, strict=True):
                sums[name].add(_rows(y.detach()), _rows(gradient))
            seen.clear()
            n += len(x)
    return {name: own.metric(n) if own.n else Metric.of_weight(layers[name]) for name, own in sums.items()}


class _Sums:
    """Over all responses of a layer."""

    def __init__(self, channels: int, device: torch.device) -> None:
        zeros = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.n, self.sum, self.products, self.gradients = 0, zeros[0].clone(), zeros, zeros.clone()

    def add(self, responses: Tensor, gradients: Tensor) -> None:
        """Of one batch, as rows."""
        self.n += len(responses)
        self.sum += responses.sum(0)
        self.products += responses.T @ responses
        self.gradients += gradients.T @ gradients

    def metric(self, images: int) -> Metric:
        """From so many images in all."""
        mean = self.sum / self.n
        felt = self.gradients / images
        damping = DAMPING * felt.trace() / len(felt) + 1e-30
        values, vectors = torch.linalg.eigh(felt + damping * torch.eye(len(felt), dtype=felt.dtype, device=felt.device))
        root = vectors * values.sqrt() @ vectors.T
        covariance = root @ (self.products / self.n - torch.outer(mean, mean)) @ root
        return Metric(root, vectors / values.sqrt() @ vectors.T, (covariance + covariance.T) / 2, mean)


def _rows(y: Tensor) -> Tensor:
    """Responses (N, O, H, W) or (..., O) as rows (N H W, O), float64."""
    y = y.permute(0, 2, 3, 1) if y.ndim == 4 else y
    return y.reshape(-1, y.shape[-1]).double()


def weight_scales(net: nn.Module, names: Collection[str], work: Work, images: int) -> dict[str, Tensor]:
    """What the magnitude of each weight of the named layers counts: f^(1/4), f the square of its gradient per image.

    Optimal brain damage (LeCun et al. 1990) asks for w^2 f, magnitude for w^2 alone; w^2 f^(1/2) lies half-way, which
    trusts neither wholly where most weights go at once.  From so many validation images.
    """
    twin = deepcopy(net).requires_grad_()
    weights: dict[str, Tensor] = {name: twin.get_submodule(name).weight for name in names}  # type: ignore[misc]
    sums = [torch.zeros_like(weight) for weight in weights.values()]
    with evaluating(twin), torch.enable_grad():
        for x, labels in work.data.batches("val", min(FEW, images), work.resolution, rng=None, limit=images):
            loss = F.cross_entropy(twin(x.to(device_of(net))), labels.to(device_of(net)), reduction="sum")
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.square()
    return {
        name: (total + FLOOR * total.mean() + torch.finfo(total.dtype).tiny).div(images).pow(0.25)
        for name, total in zip(weights, sums, strict=True)
    }

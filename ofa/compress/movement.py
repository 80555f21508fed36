"""Sparsity found while training: movement pruning, and filters that are pruned softly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa.compress.allocation import uniform, zeros_for
from ofa.compress.chain import Work
from ofa.compress.kmeans import bake
from ofa.compress.layers import BYTES, Layer, patterns, weight_layers
from ofa.compress.magnitude import Ramp, finetuned
from ofa.compress.sparsity import zero_smallest
from ofa.compress.targets import Target, amount, check_target
from ofa.errors import UserError
from ofa.finetune import Finetuning


class _Straight(torch.autograd.Function):
    """weight x mask forwards; backwards the mask is the score itself (straight through: Sanh et al. 2020, eq. 2)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, sparsity: float) -> Tensor:
        """The weight with its share of lowest scores at zero; those that are zero already are the first to go."""
        mask = zero_smallest(torch.ones_like(weight), sparsity, scores.masked_fill(weight == 0, -torch.inf))
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """dL/dW x mask for the weight, dL/dW x W for the score."""
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


class Scored(nn.Module):
    """A parametrization of a weight: what is kept is decided by learned scores.

    Trained by SGD from 0, a score is the sum of -lr x dL/dW x W: it rises where the weight moves away from zero (Sanh
    et al. 2020, eq. 3).  `sparsity`: the share that is zero now.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.sparsity = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros."""
        masked: Tensor = _Straight.apply(weight, self.scores, self.sparsity)
        return masked


@dataclass(frozen=True, slots=True)
class Movement:
    """Movement pruning (Sanh et al. 2020): while fine-tuning, weights that move towards zero become zero.

    size: of the parameters that are not zero, as a share of all, or in bytes of float32.  gradual: share of the
    fine-tuning during which sparsity rises by a cubic.  keep: patterns of layers that are left as they are.  Every
    other layer gets the same sparsity, as in the paper.  Zeros give no speed in ONNX Runtime or LiteRT.
    """

    size: Target = 0.25
    gradual: float = 0.6
    keep: tuple[str, ...] = ()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        check_target("size", self.size, "bytes")
        if not 0 < self.gradual <= 1 or not self.finetuning.epochs:
            given = f"gradual {self.gradual}, epochs {self.finetuning.epochs}"
            raise UserError(f"{given}: movement is learned; give a share above 0 and at most 1, and some epochs")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A sparse, trained copy with ordinary weights, in evaluation mode."""
        parameters = sum(parameter.numel() for parameter in net.parameters())
        share = min(1.0, amount("size", self.size, parameters * BYTES, "bytes") / (parameters * BYTES))
        layers = weight_layers(net, self.keep)
        sparsities = uniform(layers, zeros_for(net, layers, share * parameters, self.size))
        scored = copy.deepcopy(net)
        for name in sparsities:
            layer: Layer = scored.get_submodule(name)  # type: ignore[assignment]
            parametrize.register_parametrization(layer, "weight", Scored(layer.weight))
        ramp = Ramp(_raise_to(sparsities), self.finetuning.steps(work.data.size("train")), self.gradual, holds=False)
        return bake(finetuned(scored, work, self.finetuning, ramp))


def _raise_to(sparsities: Mapping[str, float]) -> Callable[[nn.Module, float], None]:
    def prune(net: nn.Module, done: float) -> None:
        for name, sparsity in sparsities.items():
            net.get_submodule(name).parametrizations.weight[0].sparsity = done * sparsity  # type: ignore

    return prune


@dataclass(frozen=True, slots=True)
class SoftFilter:
    """Soft filter pruning (He et al. 2018, alg. 1): each epoch the weakest filters become zero, but go on learning.

    ratio: share of each convolution's filters, by L2 norm.  After the last epoch they stay zero; `channels` with
    criterion=l2 removes them, weakest first.  Depthwise convolutions, and layers that match `keep`, are left alone.
    """

    ratio: float = 0.3
    keep: tuple[str, ...] = ()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", patterns(self.keep))
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio {self.ratio} is the share of filters to zero: above 0 and below 1; 0.3 is usual")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A trained copy with filters of zeros, in evaluation mode."""
        layers = weight_layers(net, self.keep)
        names = [name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
        if not names:
            raise UserError("soft filter pruning needs a convolution that is not grouped; use another step")
        total = self.finetuning.steps(work.data.size("train"))
        per_epoch, step = max(1, round(total / max(1.0, self.finetuning.epochs))), 0

        def after(trained: nn.Module) -> None:
            nonlocal step
            step += 1
            if step % per_epoch == 0 or step == total:
                zero_filters(trained, names, self.ratio)

        start = copy.deepcopy(net)
        if not total:
            zero_filters(start, names, self.ratio)
        return finetuned(start, work, self.finetuning, after)


@torch.no_grad()
def zero_filters(net: nn.Module, names: list[str], ratio: float) -> None:
    """Zero the round(ratio x n) filters of smallest L2 norm of each convolution, with biases, in place; one stays."""
    for name in names:
        layer: Layer = net.get_submodule(name)  # type: ignore[assignment]
        n = min(round(ratio * len(layer.weight)), len(layer.weight) - 1)
        weak = layer.weight.flatten(1).norm(dim=1).argsort(stable=True)[:n]
        layer.weight[weak] = 0
        if layer.bias is not None:
            layer.bias[weak] = 0

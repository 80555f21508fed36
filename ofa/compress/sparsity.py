"""Zeros among the weights: which ones, and how they stay.

A mask is no object of its own: a weight that is exactly zero is pruned.  So masks survive saving, loading and copying
by themselves (torch.nn.utils.prune's do not: a module with one cannot be deep-copied), and `hold_zeros` gives
`finetune` what keeps them through training.  Zeros make packed files smaller; they give no speed in ONNX Runtime or
LiteRT, which multiply by them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ofa.compress.layers import Layer, weight_layers
from ofa.errors import UserError


def zero_smallest(values: Tensor, sparsity: float, scores: Tensor | None = None) -> Tensor:
    """A copy in which the round(sparsity x n) entries of smallest score are zero; scores: the magnitudes by default.

    Of equal scores the first ones go.
    """
    scores = values.abs() if scores is None else scores
    order = scores.flatten().argsort(stable=True)[: round(sparsity * values.numel())]
    return values.flatten().index_fill(0, order, 0).view_as(values)


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """A copy that keeps the n largest magnitudes of every m neighbours along the input channels (Mishra et al. 2021).

    weight: (cout, cin, ...), cin a multiple of m.  Of equal magnitudes the last ones stay.
    """
    check_pattern(n, m)
    if weight.shape[1] % m:
        raise UserError(f"{n}:{m} needs input channels in multiples of {m}, not {weight.shape[1]}; keep this layer")
    last = weight.movedim(1, -1)
    groups = last.reshape(-1, m)
    order = groups.abs().argsort(dim=1, stable=True)[:, : m - n]
    return groups.scatter(1, order, 0).view(last.shape).movedim(-1, 1).contiguous()


def check_pattern(n: int, m: int) -> None:
    """Raise UserError unless 0 < n < m."""
    if not 0 < n < m:
        raise UserError(f"{n}:{m} keeps n of every m weights: n must be at least 1 and below m; 2:4 is usual")


def hold_zeros(net: nn.Module) -> Callable[[nn.Module], None]:
    """For `finetune(after_step=...)`: zeroes, in place, those weights of a network that are zero in `net` now.

    Of a weight that is trained through a parametrization, what the parametrization is given.
    """
    zeros = {name: layer.weight == 0 for name, layer in weight_layers(net).items()}
    zeros = {name: zero for name, zero in zeros.items() if bool(zero.any())}

    @torch.no_grad()
    def hold(trained: nn.Module) -> None:
        for name, zero in zeros.items():
            layer: Layer = trained.get_submodule(name)  # type: ignore[assignment]
            whole = parametrize.is_parametrized(layer, "weight")
            weight = layer.parametrizations["weight"].original if whole else layer.weight  # type: ignore[index, union-attr]
            weight.masked_fill_(zero, 0)

    return hold

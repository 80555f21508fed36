"""One layer as a chain of thinner ones.  O, I channels out and in, kernel Y x X, R ranks.

A weight (O, I, Y, X) or (O, I) is written as factors; a chain of convolutions with them computes what the layer does
with the product of the factors, at any stride, padding and dilation.  At full rank that is the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ofa.compress.fisher import Metric
from ofa.compress.layers import Layer

Factors = tuple[Tensor, ...]
SWEEPS = 100  # of alternating least squares, at most
RIDGE = 1e-10  # of the largest entry of the normal equations, which near-parallel components make singular
ONE, NONE = (1, 1), (0, 0)


def svd(weight: Tensor, rank: int, metric: Metric) -> Factors:
    """(R, I, Y, X) and (O, R): the layer's responses projected on the directions that vary most in a metric.

    In that of the weight alone this is the best of that rank of the O x IYX matrix (Eckart & Young; Zhang et al. 2016).
    """
    directions = metric.directions()[1][:, :rank]
    first, last = directions.T @ metric.root @ weight.flatten(1), metric.inverse @ directions
    ratio = (first.norm(dim=1) / last.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)  # both as large
    return (first / ratio[:, None]).view(-1, *weight.shape[1:]), last * ratio


def spatial(weight: Tensor, rank: int) -> Factors:
    """(R, I, Y) and (O, R, X): a column of filters, then a row (Jaderberg et al. 2014, scheme 2, by SVD: Tai 2016)."""
    o, i, y, x = weight.shape
    u, s, v = torch.linalg.svd(weight.permute(1, 2, 0, 3).reshape(i * y, o * x), full_matrices=False)
    root = s[:rank].sqrt()
    first = (u[:, :rank] * root).T.reshape(-1, i, y)
    return first, (root[:, None] * v[:rank]).reshape(-1, o, x).transpose(0, 1)


def tucker(weight: Tensor, ranks: tuple[int, int], sweeps: int = 10) -> Factors:
    """(I, Ri), (Ro, Ri, Y, X) and (O, Ro): Tucker-2 (Kim et al. 2016, sec. 3.1), HOSVD refined by `sweeps` of HOOI."""
    inner, outer = ranks
    a, b = _leading(_unfold(weight, 1), inner), _leading(_unfold(weight, 0), outer)
    for _ in range(sweeps):
        b = _leading(_unfold(torch.einsum("oiyx,ir->oryx", weight, a), 0), outer)
        a = _leading(_unfold(torch.einsum("oiyx,or->riyx", weight, b), 1), inner)
    return a, torch.einsum("oiyx,ir,os->sryx", weight, a, b), b


def cp(weight: Tensor, rank: int, sweeps: int = SWEEPS, start: Sequence[Tensor] | None = None) -> Factors:
    """(O, R), (I, R), (Y, R), (X, R): CP by alternating least squares (Lebedev et al. 2015, sec. 3.1).

    start: the four factors to begin with (None: random ones, always the same).
    """
    generator = torch.Generator().manual_seed(0)
    begin = start or [torch.randn(n, rank, generator=generator, dtype=weight.dtype) for n in weight.shape]
    factors, last = [factor.to(weight.device) for factor in begin], float("inf")
    for _ in range(sweeps):
        for mode in range(4):
            factors[mode] = _least_squares(weight, factors, mode)
            if mode < 3:  # the last factor keeps the scale of all
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-30)
        error = float((weight - cp_product(factors)).norm() / weight.norm())
        if last - error < 1e-6:
            break
        last = error
    return tuple(factors)


def cp_product(factors: Sequence[Tensor]) -> Tensor:
    """The weight (O, I, Y, X) that CP factors stand for."""
    return torch.einsum("or,ir,yr,xr->oiyx", *factors)


def _least_squares(weight: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """The factor of one mode that is best beside the others."""
    letters, others = "oiyx", [m for m in range(4) if m != mode]
    inputs = ",".join(f"{letters[m]}r" for m in others)
    target = torch.einsum(f"oiyx,{inputs}->{letters[mode]}r", weight, *(factors[m] for m in others))
    gram = torch.stack([factors[m].T @ factors[m] for m in others]).prod(0)
    gram = gram + RIDGE * gram.abs().max() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, target.T).T


def _unfold(weight: Tensor, mode: int) -> Tensor:
    return weight.movedim(mode, 0).flatten(1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Its first left singular vectors, from the smaller Gram matrix."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors.flip(1)[:, :rank]


def factorized(layer: Layer, method: str, ranks: tuple[int, ...], metric: Metric | None = None) -> nn.Sequential:
    """The chain of thinner layers that takes a layer's place; the last one has its bias.  Computed in float64.

    metric: of the layer's responses, for svd (None: of its weight alone).  Where it knows their mean, a bias makes up
    for what is left out of that; a layer without one is taken to feed a batch norm, which does.
    """
    weight, metric = layer.weight.detach().double(), metric or Metric.of_weight(layer)
    if isinstance(layer, nn.Linear):
        first, last = svd(weight, ranks[0], metric)
        return nn.Sequential(_linear(layer, first), _linear(layer, last, _bias(layer, ranks[0], metric)))
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    assert not isinstance(padding, str), "able() lets no such layer through"
    if layer.kernel_size == ONE:
        method = "svd"
    if method == "tucker":
        a, core, b = tucker(weight, (ranks[0], ranks[1]))
        parts = [(_point(a.T), ONE, NONE, ONE, 1), (core, stride, padding, dilation, 1), (_point(b), ONE, NONE, ONE, 1)]
        return _convolutions(layer, parts, layer.bias)
    if method == "svd":
        first, last = svd(weight, ranks[0], metric)
        parts = [(first, stride, padding, dilation, 1), (_point(last), ONE, NONE, ONE, 1)]
        return _convolutions(layer, parts, _bias(layer, ranks[0], metric))
    down = ((stride[0], 1), (padding[0], 0), (dilation[0], 1))
    across = ((1, stride[1]), (0, padding[1]), (1, dilation[1]))
    if method == "spatial":
        column, row = spatial(weight, ranks[0])
        return _convolutions(layer, [(column[..., None], *down, 1), (row[:, :, None], *across, 1)], layer.bias)
    o, i, y, x = cp(weight, ranks[0])
    rank = ranks[0]
    thin = [(y.T[:, None, :, None], *down, rank), (x.T[:, None, None, :], *across, rank)]
    return _convolutions(layer, [(_point(i.T), ONE, NONE, ONE, 1), *thin, (_point(o), ONE, NONE, ONE, 1)], layer.bias)


def _bias(layer: Layer, rank: int, metric: Metric) -> Tensor | None:
    """The layer's bias and the mean of the responses that its factors leave out."""
    if layer.bias is None or metric.mean is None:
        return layer.bias
    weighed = metric.mean - layer.bias.detach().double()  # of the responses without the bias
    return (metric.mean - metric.kept(weighed, rank)).to(layer.bias.dtype)


Part = tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


def _convolutions(layer: nn.Conv2d, parts: Sequence[Part], last_bias: Tensor | None) -> nn.Sequential:
    chain = nn.Sequential()
    for n, (weight, stride, padding, dilation, groups) in enumerate(parts):
        bias = last_bias if n == len(parts) - 1 else None
        o, i, *kernel = weight.shape
        conv = nn.utils.skip_init(
            nn.Conv2d, i * groups, o, tuple(kernel), stride, padding, dilation, groups, bias is not None
        )
        chain.append(_filled(conv, layer, weight.contiguous(memory_format=torch.channels_last), bias))
    return chain


def _linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None)
    return _filled(made, layer, weight, bias)


def _filled(made: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A new layer with its values, of the old layer's type, device and mode."""
    made.weight = nn.Parameter(weight.to(layer.weight.dtype))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made.train(layer.training)


def _point(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]

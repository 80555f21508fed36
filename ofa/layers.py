"""Elastic layers: each holds the weights of its largest form and runs as whatever a Unit asks for.

N images, C channels, H x H pixels, K kernel size.  Nothing is written by forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ofa.copies import leading_copy
from ofa.depthwise import depthwise
from ofa.kernels import plain
from ofa.modules import ConvBN, SqueezeExcite, activation
from ofa.norm import ACTIVATIONS, batch_norm_act
from ofa.products import compact, product, product_into
from ofa.shrink import Smaller, shrink
from ofa.spec import Unit

Layout = tuple[Sequence[int], Sequence[int]]  # sizes and strides
SMALL = 16  # pixels of a map up to which a convolution is a matrix product


def crop_kernel(weight: Tensor, size: int, stride: int) -> Tensor:
    """The taps of a kernel (C, 1, K, K) that an image whose longer side has `size` pixels can reach: (C, 1, k, k)."""
    return shrink(Smaller(weight, len(weight), reach(weight.shape[-1], size, stride)))[0]


def reach(kernel: int, size: int, stride: int) -> int:
    """How wide the part of a kernel is, around its centre, that an image whose longer side has `size` pixels can reach.

    At stride 1 a tap further than size - 1 from the centre only ever meets padding, so leaving it out is exact.
    """
    return min(kernel, 2 * max(size, 1) - 1) if stride == 1 else kernel


def leading(weight: Tensor, cout: int, cin: int) -> Tensor:
    """The view weight[:cout, :cin]; its gradient fills one tensor of zeros instead of one for each slice."""
    if weight.shape[:2] == (cout, cin):
        return weight
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return weight[:cout, :cin] if traced or not torch.is_grad_enabled() else _Leading.apply(weight, cout, cin)


class _Leading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, cout: int, cin: int) -> Tensor:
        ctx.layout = weight.size(), weight.stride()
        return weight[:cout, :cin]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cout, cin = gradient.shape[:2]
        whole = _gradient(gradient, ctx.layout, cout, cin)
        whole[:cout, :cin].copy_(gradient)
        return whole, None, None


def _gradient(like: Tensor, layout: Layout, cout: int, cin: int) -> Tensor:
    """A gradient of a whole weight, zero but for its leading part, which is still to be written."""
    whole = like.new_empty_strided(*layout)
    if cout < layout[0][0]:
        whole[cout:].zero_()
    if cin < layout[0][1]:
        whole[:cout, cin:].zero_()
    return whole


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, cout: int | None = None, stride: int = 1) -> Tensor:
    """Convolution of (N, C, H, W) with the leading part (cout, C, K, K) of a weight, padded by K // 2.

    A matrix product on small maps, where a convolution on a CPU spends more on reordering its weights than on them.
    """
    (_, c, h, w), cout, k = x.shape, len(weight) if cout is None else cout, weight.shape[-1]
    if x.device.type == "cpu" and strided(h, stride) * strided(w, stride) <= SMALL:
        if plain(x, weight):
            run = _Product.apply if torch.is_grad_enabled() else _product
            return run(x, weight, bias, cout, stride)
        if k == stride == 1:
            part = leading(weight, cout, c).flatten(1)
            return _images(F.linear(_patches(x), part, bias if bias is None else bias[:cout]), x.shape)
    return F.conv2d(x, leading(weight, cout, c), bias if bias is None else bias[:cout], stride, k // 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Features (N, C) times the leading part (K, C) of a weight, plus a bias (K,): (N, K)."""
    if x.device.type != "cpu":
        return F.linear(x, weight[:, : x.shape[1]], bias)
    return convolve(x[..., None, None], weight[..., None, None], bias).flatten(1)


class FastLinear(nn.Linear):
    """A linear layer by the faster product."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, K), or whatever else a linear layer takes."""
        return linear(x, self.weight, self.bias) if x.ndim == 2 else super().forward(x)


def squeeze_excite(x: Tensor, reduce: nn.Conv2d, expand: nn.Conv2d, reduced: int | None = None) -> Tensor:
    """(N, C, H, W) to the same, each channel scaled by a gate of all channels' means, with `reduced` hidden channels.

    `reduce` and `expand`: 1x1 convolutions, of which the leading parts are used.
    """
    weights = reduce.weight, reduce.bias, expand.weight, expand.bias
    tensors = [weight for weight in weights if weight is not None]
    if torch.is_grad_enabled() and len(tensors) == len(weights) and plain(x, *tensors):
        return _Gated.apply(x, reduced, *weights)
    return x * gate(x, reduced, *weights)


def gate(
    x: Tensor, reduced: int | None, reduce: Tensor, bias: Tensor | None, expand: Tensor, last: Tensor | None
) -> Tensor:
    """The gate (N, C, 1, 1) of `squeeze_excite`, by the weights and biases of its convolutions."""
    mean = x if x.shape[2] * x.shape[3] == 1 else x.mean((2, 3), keepdim=True)
    hidden = F.relu(convolve(mean, reduce, bias, reduced))
    return F.hardsigmoid(convolve(hidden, expand, last, x.shape[1]))


class _Gated(torch.autograd.Function):
    """`squeeze_excite` with a gradient of the image that is written once, where autograd adds up two whole ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduced: int | None, *weights: Tensor) -> Tensor:
        mean = _sum(x) / (x.shape[2] * x.shape[3])  # of bfloat16 far faster than x.mean
        with torch.enable_grad():
            inputs = [given.detach().requires_grad_() for given in (mean, *weights)]
            gated = gate(inputs[0], reduced, *inputs[1:])
        ctx.save_for_backward(x)
        ctx.inputs, ctx.gate = inputs, gated
        return x * gated.detach()

    @staticmethod
    @once_differentiable  # as the hard sigmoid is
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        to_gate = _sum(gradient * x)
        to_mean, *rest = torch.autograd.grad(ctx.gate, ctx.inputs, to_gate, retain_graph=True)
        gx = torch.addcmul(to_mean / (x.shape[2] * x.shape[3]), gradient, ctx.gate.detach())
        return gx, None, *rest


def _sum(x: Tensor) -> Tensor:
    """The sum of all pixels, (N, C, 1, 1)."""
    return x if x.shape[2] * x.shape[3] == 1 else x.sum((2, 3), keepdim=True)


class _Product(torch.autograd.Function):
    """`convolve` by products with the patches of the image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cout: int, stride: int) -> Tensor:
        used = _used(x, weight, cout)
        ctx.save_for_backward(x, weight, used)
        ctx.biases, ctx.stride = None if bias is None else len(bias), stride
        return _product(x, weight, bias, cout, stride, used)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, used = ctx.saved_tensors
        (cout, cin), stride, k = (gradient.shape[1], x.shape[1]), ctx.stride, weight.shape[-1]
        whole = _gradient(weight, (weight.size(), weight.stride()), cout, cin)
        g, rows = _patches(gradient), _patches(x, k, stride)
        twice = torch.is_grad_enabled()  # a gradient of the gradient is asked for
        if twice:
            used = _matrix(weight, cout, cin).to(x.dtype)
        if k > 1 or twice or x.dtype != weight.dtype:
            whole[:cout, :cin].copy_(product(g.t(), rows).view(cout, k, k, cin).permute(0, 3, 1, 2))
        elif len(weight) == cout and weight.stride()[:2] == (cin, 1):  # all of it, without gaps
            whole = product(g.t(), rows).as_strided(weight.size(), weight.stride())
        else:
            product_into(_matrix(whole, cout, cin), g.t(), rows)
        taps = used.view(cout, k, k, cin)
        if k == stride == 1:
            gx = _images(product(g, used), x.shape)
        elif stride == 1 and not twice:
            turned = taps.flip(1, 2).permute(1, 2, 0, 3).reshape(-1, cin)
            gx = _images(product(_patches(gradient, k), turned), x.shape)
        else:
            shape = [stride] * 2, [k // 2] * 2, [1, 1], False, [0, 0], 1
            kernel = taps.permute(0, 3, 1, 2)
            gx, _, _ = torch.ops.aten.convolution_backward(gradient, x, kernel, None, *shape, [True, False, False])
        biases = ctx.biases and F.pad(gradient.sum((0, 2, 3), dtype=weight.dtype), (0, ctx.biases - cout))
        return gx, whole, biases, None, None


def _used(x: Tensor, weight: Tensor, cout: int) -> Tensor:
    """The part of a weight that images are multiplied by, as a matrix of their type."""
    return compact(_matrix(weight, cout, x.shape[1]).to(x.dtype))


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, cout: int, stride: int, used: Tensor | None = None
) -> Tensor:
    """What `_Product` gives."""
    used = _used(x, weight, cout) if used is None else used
    y = product(_patches(x, weight.shape[-1], stride), used.t(), bias if bias is None else bias[:cout].to(x.dtype))
    images = _images(y, x.shape, stride)
    return y.as_strided_(images.size(), images.stride())  # no view, or what follows could not work in place


def strided(size: int, stride: int) -> int:
    """Pixels of a side after a convolution of some stride."""
    return (size - 1) // stride + 1


def _matrix(weight: Tensor, cout: int, cin: int) -> Tensor:
    """The leading part of a weight (M, C, K, K) as a matrix (cout, K * K * cin), of 1x1 a view."""
    if weight.shape[-1] == 1:
        return weight.as_strided((cout, cin), weight.stride()[:2])
    return weight[:cout, :cin].permute(0, 2, 3, 1).reshape(cout, -1)


def _patches(x: Tensor, k: int = 1, stride: int = 1) -> Tensor:
    """What each pixel of a convolution sees of (N, C, H, W): (N * pixels, k * k * C); of one tap a view."""
    x = x.permute(0, 2, 3, 1)
    if k == stride == 1:
        return x.reshape(-1, x.shape[-1])
    windows = F.pad(x, (0, 0, *(4 * [k // 2]))).unfold(1, k, stride).unfold(2, k, stride)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, k * k * x.shape[-1])


def _images(rows: Tensor, shape: Sequence[int], stride: int = 1) -> Tensor:
    """Rows for each pixel of what an image (N, C, H, W) became, as images, channels last."""
    n, _, h, w = shape
    return rows.view(n, strided(h, stride), strided(w, stride), -1).permute(0, 3, 1, 2)


def give(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Set the parameters of a layer to copies in the shapes that it has, from the first channels, channels last.

    What it held before is dropped, not written.  To be called without gradients.
    """
    own = layer._parameters
    size = own["weight"].shape  # type: ignore[union-attr]
    own["weight"] = nn.Parameter(leading_copy(weight, size))
    if bias is not None:
        own["bias"] = nn.Parameter(torch.narrow_copy(bias, 0, 0, size[0]))


def copy_parts(elastic: nn.Module, plain: nn.Module) -> None:
    """Each part of an elastic module gives its weights to the part of that name of a plain one."""
    mine: dict[str, Any] = elastic._modules  # attributes of a module are looked up slowly, those of a class are not
    theirs: dict[str, Any] = plain._modules
    for name, part in mine.items():
        copy_to = getattr(type(part), "copy_to", None)
        if copy_to is not None:
            copy_to(part, theirs[name])
        elif part is not None and part._parameters:
            give(theirs[name], part._parameters["weight"], part._parameters["bias"])


class ElasticBatchNorm(nn.Module):
    """Batch norm over the first C of its channels, with the activation that follows it.

    Training normalises by the batch and keeps no statistics, since those of one subnet are wrong for the next;
    evaluation uses the stored ones, as of an imported checkpoint.  Extracted nets get their own.
    """

    def __init__(self, channels: int, act: str = "none"):
        super().__init__()
        self.act, self.eps = act, 1e-5
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if self.training:
            return batch_norm_act(x, self.weight, self.bias, self.act, self.eps)
        c = x.shape[1]
        mean, var = self.running_mean[:c], self.running_var[:c]
        y = F.batch_norm(x, mean, var, self.weight[:c], self.bias[:c], eps=self.eps)
        return ACTIVATIONS[self.act](y)

    def copy_to(self, bn: nn.BatchNorm2d) -> None:
        """Give a plain batch norm copies of the leading channels."""
        c, given, kept = bn.num_features, bn._parameters, bn._buffers
        parameters: dict[str, Any] = self._parameters  # attributes of a module are looked up slowly
        statistics: dict[str, Any] = self._buffers
        for name, own in parameters.items():
            given[name] = nn.Parameter(torch.narrow_copy(own, 0, 0, c))
        for name, own in statistics.items():
            kept[name] = torch.narrow_copy(own, 0, 0, c)
        kept["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=own.device)


class ElasticConv(nn.Module):
    """Convolution over the first channels in and out, with optional batch norm and activation."""

    def __init__(self, unit: Unit, *, act: str | None = None):
        super().__init__()
        self.conv = nn.Conv2d(unit.cin, unit.cout, unit.kernel, unit.stride, unit.kernel // 2, bias=False)
        act = unit.act if act is None else act
        self.bn = ElasticBatchNorm(unit.cout, act) if unit.bn else activation(act)

    def forward(self, x: Tensor, cout: int) -> Tensor:
        """(N, C, H, W) to (N, cout, H / stride, W / stride)."""
        return self.bn(convolve(x, self.conv.weight, None, cout, self.conv.stride[0]))

    def copy_to(self, plain: ConvBN) -> None:
        """Give a plain convolution copies of the leading channels."""
        copy_parts(self, plain)


class ElasticDepthwise(nn.Module):
    """Depthwise convolution of elastic width and kernel.

    A smaller kernel is the centre of the next larger one times a learned matrix, which all channels of the layer share
    and which is the identity at first (Cai et al. 2020, sec. 3.3).
    """

    def __init__(self, unit: Unit, kernels: tuple[int, ...]):
        super().__init__()
        self.kernels, self.stride = tuple(sorted(kernels)), unit.stride
        self.weight = nn.Parameter(torch.empty(unit.mid, 1, unit.kernel, unit.kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.transforms = nn.ParameterDict({str(k): nn.Parameter(torch.eye(k * k)) for k in self.kernels[:-1]})
        self.bn = ElasticBatchNorm(unit.mid, unit.act)

    def smaller(self, channels: int, kernel: int, taps: int) -> Smaller:
        """What `shrink` makes the weights of a smaller layer from, or their centre (channels, 1, taps, taps)."""
        matrices = [self.transforms[str(k)] for k in reversed(self.kernels[:-1]) if k >= kernel]
        return Smaller(self.weight, channels, taps, matrices)

    def forward(self, x: Tensor, kernel: int, weight: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, C, H / stride, W / stride), by kernel x kernel taps; weight: what `shrink` made of them.

        A weight of taps for another size of images is left out of account.
        """
        taps = reach(kernel, max(x.shape[-2:]), self.stride)
        if weight is None or weight.shape[-1] != taps:
            (weight,) = shrink(self.smaller(x.shape[1], kernel, taps))
        return self.bn(depthwise(x, weight, self.stride))

    def copy_to(self, plain: ConvBN) -> None:
        """Give a plain depthwise convolution the transformed kernels of the leading channels."""
        channels, _, kernel, _ = plain.conv.weight.shape
        give(plain.conv, *shrink(self.smaller(channels, kernel, kernel)))
        assert isinstance(plain.bn, nn.BatchNorm2d)
        self.bn.copy_to(plain.bn)


class ElasticSE(nn.Module):
    """Squeeze-excite over the first channels."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(unit.mid, unit.se, 1), nn.Conv2d(unit.se, unit.mid, 1)

    def forward(self, x: Tensor, reduced: int) -> Tensor:
        """(N, C, H, W) to the same, each channel scaled by a gate of `reduced` hidden channels."""
        return squeeze_excite(x, self.reduce, self.expand, reduced)

    def copy_to(self, plain: SqueezeExcite) -> None:
        """Give a plain squeeze-excite copies of the leading channels."""
        copy_parts(self, plain)


class ElasticLinear(nn.Module):
    """The classifier over the first features."""

    def __init__(self, unit: Unit):
        super().__init__()
        self.linear = nn.Linear(unit.cin, unit.cout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1) or (N, C) to (N, classes)."""
        return linear(x.flatten(1), self.linear.weight, self.linear.bias)

    def copy_to(self, plain: nn.Linear) -> None:
        """Give a plain linear layer copies of the leading features."""
        give(plain, self.linear.weight, self.linear.bias)


def importance(weight: Tensor, widths: Sequence[int] = ()) -> Tensor:
    """The channels (C,) that a convolution (K, C, H, W) reads, those of the largest L1 norm first.

    widths: for each, the first so many channels stay the first so many.
    """
    order = weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    part = torch.bucketize(order, torch.tensor(widths, dtype=order.dtype, device=order.device), right=True)
    return order[part.argsort(stable=True)]


def permute(tensor: Tensor, order: Tensor, dimension: int) -> None:
    """Reorder one dimension, in place."""
    tensor.copy_(tensor.index_select(dimension, order))


def permute_norm(norm: nn.Module, order: Tensor) -> None:
    """Reorder the channels of a batch norm, in place."""
    assert isinstance(norm, ElasticBatchNorm)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        permute(tensor, order, 0)

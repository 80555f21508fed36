"""The reference for integer-only networks: numpy, exact, many images at once.

N images, H, W: rows, columns, C, K: channels.  Sums of products come from floating-point matrix products, which are
exact as long as no partial sum can pass their mantissa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ofa.arrays import Int
from ofa.errors import UserError
from ofa.integer.fixed import clamp, rescale
from ofa.integer.net import FURTHEST, Add, Conv, Depthwise, Int8, IntegerNet, Lookup, MaxPool, Mean, Mul, Pair, Pool

Maps = NDArray[Any]  # (N, H, W, C)
ADD_SHIFT = 20


def run(net: IntegerNet, images: Int8, *, batch_size: int = 64) -> Int8:
    """Outputs (N, K) of quantized images (N, H, W, C)."""
    shape = net.tensors[net.input].shape
    if images.dtype != np.int8 or images.shape[1:] != shape:
        raise UserError(f"images are {images.dtype} {images.shape[1:]}; this network takes int8 {shape}")
    parts = [_run(net, images[i : i + batch_size])[net.output] for i in range(0, len(images), batch_size)]
    return np.concatenate(parts).reshape(len(images), -1)


def run_all(net: IntegerNet, images: Int8) -> dict[int, Int8]:
    """Every tensor (N, H, W, C) by its index, for quantized images."""
    return _run(net, images, keep=True)


def quantize_images(net: IntegerNet, images: NDArray[np.floating[Any]]) -> Int8:
    """Normalised images (N, C, H, W) as this network's input (N, H, W, C)."""
    tensor = net.tensors[net.input]
    q = np.rint(images.transpose(0, 2, 3, 1) / np.float32(tensor.scale)).astype(np.int64) + tensor.zero
    return np.ascontiguousarray(clamp(q))


def run_float(net: IntegerNet, images: NDArray[np.floating[Any]], *, batch_size: int = 64) -> NDArray[np.float32]:
    """Logits (N, K) of normalised images (N, C, H, W)."""
    y = net.tensors[net.output]
    q = run(net, quantize_images(net, images), batch_size=batch_size)
    return ((q.astype(np.float32) - y.zero) * np.float32(y.scale)).astype(np.float32)


def _run(net: IntegerNet, images: Int8, *, keep: bool = False) -> dict[int, Int8]:
    last = {i: n for n, op in enumerate(net.ops) for i in op.inputs} | {net.output: len(net.ops)}
    maps = {net.input: images}
    for n, op in enumerate(net.ops):
        maps[op.y] = OPS[type(op)](net, op, *(maps[i] for i in op.inputs))
        for i in set(op.inputs):
            if last[i] == n and not keep:
                del maps[i]
    return maps


def _centred(net: IntegerNet, index: int, x: Maps) -> NDArray[np.int32]:
    return x.astype(np.int32) - net.tensors[index].zero


def _windows(x: Maps, kernel: Pair, op: Conv | Pool, shape: tuple[int, ...], fill: float) -> Maps:
    """What lies under each window, (N, H, W, C, kh, kw), as a view of the padded maps."""
    ends = [(out - 1) * stride + k for out, stride, k in zip(shape, op.stride, kernel, strict=False)]
    after = [max(0, end - pad - side) for end, pad, side in zip(ends, op.pad, x.shape[1:3], strict=True)]
    padded = np.pad(x, ((0, 0), *zip(op.pad, after, strict=True), (0, 0)), constant_values=fill)
    view = sliding_window_view(padded[:, : ends[0], : ends[1]], kernel, axis=(1, 2))
    return view[:, :: op.stride[0], :: op.stride[1]]


def _finish(net: IntegerNet, op: Conv, acc: Int) -> Int8:
    return clamp(rescale(acc, op.multiplier, op.shift) + net.tensors[op.y].zero, op.low, op.high)


def _conv(net: IntegerNet, op: Conv, x: Maps) -> Int8:
    shape, kernel = net.tensors[op.y].shape, op.weight.shape[1:3]
    largest = FURTHEST * np.abs(op.weight.astype(np.int64)).reshape(len(op.weight), -1).sum(1).max()
    real = np.float32 if largest < 2**24 else np.float64
    windows = _windows(_centred(net, op.x, x).astype(real), (kernel[0], kernel[1]), op, shape, 0)
    columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, op.weight[0].size)
    acc = columns @ op.weight.reshape(len(op.weight), -1).T.astype(real)
    return _finish(net, op, acc.astype(np.int64) + op.bias).reshape(len(x), *shape)


def _depthwise(net: IntegerNet, op: Depthwise, x: Maps) -> Int8:
    shape, kernel = net.tensors[op.y].shape, op.weight.shape[1:3]
    windows = _windows(_centred(net, op.x, x), (kernel[0], kernel[1]), op, shape, 0)
    acc = np.zeros((len(x), *shape), np.int32)
    for i, j in np.ndindex(*kernel):
        acc += windows[..., i, j] * op.weight[:, i, j].astype(np.int32)
    return _finish(net, op, acc.astype(np.int64) + op.bias)


def _add(net: IntegerNet, op: Add, a: Maps, b: Maps) -> Int8:
    terms = [
        rescale(_centred(net, index, x).astype(np.int64) << ADD_SHIFT, op.multiplier[i], op.shift[i])
        for i, (index, x) in enumerate(((op.a, a), (op.b, b)))
    ]
    total = rescale(terms[0] + terms[1], op.multiplier[2], op.shift[2])
    return clamp(total + net.tensors[op.y].zero, op.low, op.high)


def _mul(net: IntegerNet, op: Mul, a: Maps, b: Maps) -> Int8:
    acc = _centred(net, op.a, a) * _centred(net, op.b, b)
    return clamp(rescale(acc, op.multiplier, op.shift) + net.tensors[op.y].zero, op.low, op.high)


def _mean(net: IntegerNet, op: Mean, x: Maps) -> Int8:
    acc = _centred(net, op.x, x).sum((1, 2), keepdims=True, dtype=np.int64)
    return clamp(rescale(acc, op.multiplier, op.shift) + net.tensors[op.y].zero, op.low, op.high)


def _pool(net: IntegerNet, op: Pool, x: Maps) -> Int8:
    shape = net.tensors[op.y].shape
    total = _windows(x.astype(np.int64), op.kernel, op, shape, 0).sum((-2, -1))
    count = _windows(np.ones_like(x, dtype=np.int64), op.kernel, op, shape, 0).sum((-2, -1))
    rounded = (np.abs(total) + count // 2) // count * np.sign(total)
    return clamp(rounded, op.low, op.high)


def _max_pool(net: IntegerNet, op: MaxPool, x: Maps) -> Int8:
    windows = _windows(x.astype(np.int64), op.kernel, op, net.tensors[op.y].shape, -128)
    return clamp(windows.max((-2, -1)), op.low, op.high)


def _lookup(net: IntegerNet, op: Lookup, x: Maps) -> Int8:
    return op.table[x.astype(np.int64) + 128]


OPS: dict[type, Callable[..., Int8]] = {
    Conv: _conv,
    Depthwise: _depthwise,
    Add: _add,
    Mul: _mul,
    Mean: _mean,
    Pool: _pool,
    MaxPool: _max_pool,
    Lookup: _lookup,
}

"""The forward pass of a small multilayer perceptron, for batches of a few to thousands of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
MULTIPLE = 8  # of rows, to which batches are padded: oneDNN compiles a product for each number it has not seen


def perceptron(layers: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Callable[[Float32], Float32]:
    """A function from features (Q, F) to the first output (Q,), in float32; layers: weights (in, out) and bias (out,).

    ReLU after each layer but the last.  Product, bias and ReLU are one call, of oneDNN where it multiplies faster, with
    the weights laid out for it once; elsewhere MKL takes some half of oneDNN's time for 28 rows and as long for 1,000.
    """
    import torch

    from ofa.products import prefers_onednn

    packed = prefers_onednn()
    tensors = [(torch.tensor(w, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)) for w, b in layers]
    *hidden, (last, bias) = tensors
    last, bias = last[:, 0].contiguous(), bias[:1]
    if packed:
        hidden = [(torch.ops.mkldnn._reorder_linear_weight(w.T.contiguous()), b) for w, b in hidden]

    def forward(x: Float32) -> Float32:
        y = torch.from_numpy(_padded(x) if packed else x)
        for weight, b in hidden:
            if packed:
                y = torch.ops.mkldnn._linear_pointwise(y, weight, b, "relu", [], "")
            else:
                y = torch._addmm_activation(b, y, weight)
        return torch.addmv(bias, y, last).numpy()[: len(x)]

    return forward


def _padded(x: Float32) -> Float32:
    rows = np.zeros((len(x) + -len(x) % MULTIPLE, x.shape[1]), dtype=np.float32)
    rows[: len(x)] = x
    return rows

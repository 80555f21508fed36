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

    ReLU after each layer but the last.  Where PyTorch has oneDNN, the weights are laid out for it once, and product,
    bias and ReLU are one call: faster than the products of NumPy and PyTorch, for few rows and for many.
    """
    import torch
    from torch.nn import functional as F

    fused = torch.backends.mkldnn.is_available()
    tensors = [(torch.tensor(w.T, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)) for w, b in layers]
    if fused:
        tensors = [(torch.ops.mkldnn._reorder_linear_weight(w), b) for w, b in tensors]

    @torch.inference_mode()
    def forward(x: Float32) -> Float32:
        y = F.pad(torch.from_numpy(x), (0, 0, 0, -len(x) % MULTIPLE))
        for i, (weight, bias) in enumerate(tensors):
            last = i == len(tensors) - 1
            if fused:
                y = torch.ops.mkldnn._linear_pointwise(y, weight, bias, "none" if last else "relu", [], "")
            else:
                y = F.linear(y, weight, bias) if last else F.linear(y, weight, bias).relu_()
        return y.numpy()[: len(x), 0]

    return forward

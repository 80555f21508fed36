"""The fast forward pass of a perceptron against plain products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictors.perceptron import perceptron


@pytest.mark.parametrize("onednn", [True, False])
def test_outputs_are_those_of_plain_products(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr("ofa.products.prefers_onednn", lambda: onednn)
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=shape), rng.normal(size=shape[1])) for shape in ((45, 40), (40, 24), (24, 1))]
    forward = perceptron(layers)
    for n in (1, 7, 8, 9, 2049):
        x = rng.normal(size=(n, 45)).astype(np.float32)
        plain = x.astype(np.float64)
        for weights, bias in layers[:-1]:
            plain = np.maximum(plain @ weights + bias, 0)
        plain = plain @ layers[-1][0] + layers[-1][1]
        np.testing.assert_allclose(forward(x), plain[:, 0], rtol=1e-4, atol=1e-3)

"""Products are those of float64 by either library, whatever the layout of the matrices, and have a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ofa import products
from ofa.layers import FastLinear, convolve, linear
from ofa.products import compact, product, product_into

Layout = Callable[[int, int], Tensor]
LAYOUTS: dict[str, Layout] = {
    "rows": lambda m, n: torch.randn(m, n),
    "columns": lambda m, n: torch.randn(n, m).t(),
    "part of each row": lambda m, n: torch.randn(m, n + 3)[:, :n],
    "part of each column": lambda m, n: torch.randn(n, m + 3)[:, :m].t(),
    "some rows": lambda m, n: torch.randn(m + 3, n)[:m],
}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(params=["onednn", "mm"], autouse=True)
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "ENOUGH", 1)
    return str(request.param)


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize(("m", "k", "n"), [(5, 24, 17), (17, 40, 3), (64, 4, 16), (1, 1, 1)])
def test_products_equal_those_of_float64(first: str, second: str, m: int, k: int, n: int) -> None:
    a, b, bias = LAYOUTS[first](m, k), LAYOUTS[second](k, n), torch.randn(n)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(a, b, bias).double(), exact + bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(compact(a), compact(b)).double(), exact, rtol=1e-5, atol=1e-5)
    whole = torch.full((m + 2, n + 1), 7.0)
    product_into(whole[:m, :n], a, b)
    torch.testing.assert_close(whole[:m, :n].double(), exact, rtol=1e-5, atol=1e-5)
    assert (whole[m:] == 7).all() and (whole[:, n:] == 7).all()


def test_compact_copies_only_what_has_gaps_and_only_where_it_pays(used: str) -> None:
    for name, layout in LAYOUTS.items():
        matrix = layout(6, 5)
        copied = compact(matrix).data_ptr() != matrix.data_ptr()
        assert copied == (used == "onednn" and name.startswith("part"))
    half = LAYOUTS["part of each row"](6, 5).bfloat16()
    assert compact(half) is half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_have_a_gradient_where_one_is_asked_for(dtype: torch.dtype) -> None:
    a, b = torch.randn(8, 16, dtype=dtype, requires_grad=True), torch.randn(16, 4, dtype=dtype)
    (found,) = torch.autograd.grad(product(a, b).sum(), a)
    torch.testing.assert_close(found, b.sum(1).expand(8, 16))


@pytest.mark.parametrize(("cout", "cin"), [(20, 32), (12, 32), (20, 24), (12, 24), (20, 16)])
@pytest.mark.parametrize("stored", ["whole", "wider", "with gaps"])
def test_gradients_of_weights_with_and_without_gaps_equal_float64(cout: int, cin: int, stored: str) -> None:
    x = torch.randn(40, cin, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(20, {"whole": cin, "wider": 32, "with gaps": 40}[stored], 1, 1, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    y = convolve(x, weight[:, :32], bias, cout)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), g)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = exact[0].flatten(1) @ exact[1][:cout, :cin].flatten(1).t() + exact[2][:cout]
    for mine, other in zip(found, torch.autograd.grad(expected, exact, g.double().flatten(1)), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


def test_linear_layers_by_products_are_those_of_pytorch() -> None:
    plain, x = nn.Linear(32, 20), torch.randn(9, 32)
    fast = FastLinear(32, 20)
    fast.load_state_dict(plain.state_dict())
    for given in (x, x[:, :], x[0], x.view(3, 3, 32)):
        torch.testing.assert_close(fast(given), plain(given))
    torch.testing.assert_close(
        linear(x[:, :24], plain.weight, plain.bias), x[:, :24] @ plain.weight[:, :24].t() + plain.bias
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == plain(x).dtype == torch.bfloat16
    wrong = linear(x, plain.weight * 1.01, plain.bias)
    assert not torch.allclose(wrong, plain(x), rtol=1e-4)

"""The plan of the arena: no byte has two owners, and no plan is below what lives at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa.integer.factors import FREE
from ofa.integer.fixed import quantize_multiplier
from ofa.integer.net import Conv, Depthwise, IntegerNet, Lookup, Op, Tensor
from ofa.integer.plan import Group, Span, check, extent, live_bytes, place, plan


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Buffers with lives of their own, some written over by a smaller one later."""
    found: list[Group] = []
    for _ in range(draw(st.integers(1, 9))):
        first, length, size = draw(st.integers(0, 9)), draw(st.integers(0, 4)), draw(st.integers(1, 40))
        spans = [Span(first, first + length, size)]
        if draw(st.booleans()):
            spans.append(Span(first + length, first + length + draw(st.integers(0, 3)), draw(st.integers(1, size))))
        found.append(tuple(spans))
    return found


def owners(found: list[Group], offsets: list[int]) -> np.ndarray:
    """How many groups own each byte at each operator, by painting them."""
    canvas = np.zeros((20, extent(found, offsets)), int)
    for group, offset in zip(found, offsets, strict=True):
        own = np.zeros(canvas.shape, bool)
        for span in group:
            own[span.first : span.last + 1, offset : offset + span.size] = True
        canvas += own
    return canvas


@given(groups())
def test_no_byte_has_two_owners_at_once(found: list[Group]) -> None:
    offsets = place(found)
    canvas = owners(found, offsets)
    assert canvas.max() == 1
    assert max(live_bytes(found)) == canvas.sum(1).max() <= extent(found, offsets) <= sum(g[0].size for g in found)


@given(groups())
def test_an_overlap_is_found_where_painting_finds_one(found: list[Group]) -> None:
    offsets = [0] * len(found)
    if owners(found, offsets).max() > 1:
        with pytest.raises(RuntimeError, match="overlap at operator"):
            check(found, offsets)
    else:
        check(found, offsets)


def test_another_order_saves_what_greedy_by_size_would_waste() -> None:
    """The largest first (7, 6, 5, 4, 2) puts 4 above 7, where 2 and 6 leave it at 6 + 2 + 4 = 12 at operator 3."""
    found: list[Group] = [(Span(*span),) for span in ((2, 2, 5), (3, 3, 2), (3, 5, 6), (1, 3, 4), (0, 1, 7))]
    assert extent(found, [0, 11, 0, 7, 0]) == 13, "what that order gives"
    assert extent(found, place(found)) == max(live_bytes(found)) == 12


def chain(*ops: Op, shapes: list[tuple[int, int, int]]) -> IntegerNet:
    tensors = tuple(Tensor(f"t{i}", shape, 1.0, 0) for i, shape in enumerate(shapes))
    return IntegerNet(tensors, ops, 0, len(shapes) - 1)


def filters(kind: type[Conv], y: int, x: int, weight: tuple[int, ...], **place: tuple[int, int]) -> Conv:
    multiplier, shift = quantize_multiplier(np.full(weight[0], 0.01))
    w, bias = np.ones(weight, np.int8), np.zeros(weight[0], np.int32)
    return kind(y=y, **FREE, x=x, weight=w, bias=bias, multiplier=multiplier, shift=shift, **place)


def test_an_inverted_residual_by_hand() -> None:
    """8x8x8 expands to 32, a depthwise one of stride 2 and a table work in place, a projection follows."""
    identity = Lookup(y=3, **FREE, x=2, table=np.arange(-128, 128).astype(np.int8))
    net = chain(
        filters(Conv, 1, 0, (32, 1, 1, 8)),
        filters(Depthwise, 2, 1, (32, 3, 3), stride=(2, 2), pad=(1, 1)),
        identity,
        filters(Conv, 4, 3, (8, 1, 1, 32)),
        shapes=[(8, 8, 8), (8, 8, 32), (4, 4, 32), (4, 4, 32), (4, 4, 8)],
    )
    found = plan(net)
    assert found.tensors[1] == found.tensors[2] == found.tensors[3]
    assert found.arena == found.bound == 8 * 8 * 8 + 8 * 8 * 32  # while it expands
    assert found.scratch[0] == found.scratch[2] == 0, "pointwise convolutions and tables need no scratch"


def test_a_depthwise_convolution_needs_rows_of_one_channel_beside_its_map() -> None:
    net = chain(filters(Depthwise, 1, 0, (4, 5, 5), pad=(2, 2)), shapes=[(9, 9, 4), (9, 9, 4)])
    assert plan(net).arena == 9 * 9 * 4 + 5 * (9 + 4) + 3  # 65 bytes of rows, in steps of 4


def test_what_is_read_later_is_not_written_over() -> None:
    from ofa.integer.factors import add_factors
    from ofa.integer.net import Add

    t = Tensor("t", (4, 4, 4), 1.0, 0)
    multiplier, shift = add_factors(t, t, t)
    net = chain(
        Lookup(y=1, **FREE, x=0, table=np.zeros(256, np.int8)),
        Add(y=2, **FREE, a=0, b=1, multiplier=multiplier, shift=shift),
        shapes=[(4, 4, 4)] * 3,
    )
    found = plan(net)
    assert found.tensors[0] != found.tensors[1] and found.tensors[2] == found.tensors[0]
    assert found.arena == 128

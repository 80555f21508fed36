"""One static arena for all tensors of an integer-only network, planned by when each of them lives.

An operator that can work in place writes over an input that nobody reads later: table look-ups, sums, products, and
depthwise convolutions, which keep the last rows of one channel beside them (TinyEngine, Lin et al. 2021, a channel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ofa.integer.net import Add, Conv, Depthwise, IntegerNet, Lookup, Mul, Op

ALIGN = 4
TRIES = 200  # orders that are tried where the first ones miss the lower bound


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes that are needed from operator `first` to operator `last`, both included."""

    first: int
    last: int
    size: int


Group = tuple[Span, ...]  # spans that begin at the same byte: a tensor, and what is written over it


@dataclass(frozen=True)
class Plan:
    """Where everything lies.  tensors: byte of each tensor, None where none is needed; scratch: of each operator's.

    arena: bytes of all; bound: bytes that live at the fullest operator, which no plan can go below; fullest: its
    position.
    """

    tensors: tuple[int | None, ...]
    scratch: tuple[int, ...]
    arena: int
    bound: int
    fullest: int


def plan(net: IntegerNet) -> Plan:
    """Offsets of all tensors and scratch buffers of a network, checked against each other."""
    chains = _chains(net)
    spans = _spans(net)
    groups = [tuple(spans[i] for i in chain) for chain in chains]
    work = [scratch_bytes(net, op) for op in net.ops]
    groups += [(Span(n, n, _aligned(size)),) for n, size in enumerate(work) if size]
    offsets = place(groups)
    tensors: list[int | None] = [None] * len(net.tensors)
    for chain, offset in zip(chains, offsets, strict=False):
        for i in chain:
            tensors[i] = offset
    rest = iter(offsets[len(chains) :])
    live = live_bytes(groups)
    fullest = int(np.argmax(live))
    scratch = tuple(next(rest) if size else 0 for size in work)
    return Plan(tuple(tensors), scratch, extent(groups, offsets), live[fullest], fullest)


def place(groups: Sequence[Group]) -> list[int]:
    """An offset for each group, the arena as small as was found: greedy by several orders, then by random ones."""
    sizes = np.array([max(span.size for span in group) for group in groups])
    starts = np.array([group[0].first for group in groups])
    lengths = np.array([group[-1].last - group[0].first for group in groups])
    bound, rng = max(live_bytes(groups)), np.random.default_rng(0)
    best: list[int] = []
    orders = [np.lexsort((starts, -sizes)), np.lexsort((-sizes, -lengths)), np.lexsort((-sizes, starts))]
    for n in range(len(orders) + TRIES):
        order = orders[n] if n < len(orders) else np.argsort(-sizes * rng.uniform(0.5, 1.5, len(sizes)))
        offsets = _greedy(groups, order.tolist())
        if not best or extent(groups, offsets) < extent(groups, best):
            best = offsets
        if extent(groups, best) == bound:
            break
    check(groups, best)
    return best


def check(groups: Sequence[Group], offsets: Sequence[int]) -> None:
    """Raise RuntimeError where two groups share a byte at the same time."""
    for j, i in combinations(range(len(groups)), 2):
        for a, b in _together(groups[i], groups[j]):
            if offsets[i] < offsets[j] + b.size and offsets[j] < offsets[i] + a.size:
                raise RuntimeError(f"buffers {j} and {i} overlap at operator {max(a.first, b.first)}")


def extent(groups: Sequence[Group], offsets: Sequence[int]) -> int:
    """Bytes from 0 to the end of the last group."""
    return max(offset + span.size for group, offset in zip(groups, offsets, strict=True) for span in group)


def live_bytes(groups: Sequence[Group]) -> list[int]:
    """Bytes alive at each operator, first to last."""
    start, end = min(g[0].first for g in groups), max(g[-1].last for g in groups)
    live = np.zeros(end - start + 1, np.int64)
    for group in groups:
        own = np.zeros_like(live)
        for span in group:
            part = slice(span.first - start, span.last - start + 1)
            own[part] = np.maximum(own[part], span.size)
        live += own
    return live.tolist()


def scratch_bytes(net: IntegerNet, op: Op) -> int:
    """Bytes that an operator needs beside its tensors: rows of one channel, or the pixels under one window."""
    if isinstance(op, Depthwise):
        _, rows, columns = op.weight.shape
        return rows * ((net.tensors[op.y].shape[1] - 1) * op.stride[1] + columns)
    return 0 if not isinstance(op, Conv) or is_product(net, op) else op.weight[0].size


def is_product(net: IntegerNet, op: Conv) -> bool:
    """Whether a convolution is a matrix product of the pixels as they lie: 1x1, or one window over the whole map."""
    x, kernel = net.tensors[op.x].shape, op.weight.shape[1:3]
    return op.pad == (0, 0) and (
        (kernel == (1, 1) and op.stride == (1, 1)) or (kernel == x[:2] and net.tensors[op.y].shape[:2] == (1, 1))
    )


def _greedy(groups: Sequence[Group], order: Sequence[int]) -> list[int]:
    """Each group in order at the lowest byte that is free while it lives."""
    offsets: dict[int, int] = {}
    for i in order:
        taken = sorted(
            (offsets[j] - a.size, offsets[j] + b.size) for j in offsets for a, b in _together(groups[i], groups[j])
        )
        offset = 0
        for low, high in taken:  # an offset strictly between these two would overlap
            if low < offset < high:
                offset = high
        offsets[i] = offset
    return [offsets[i] for i in range(len(groups))]


def _together(a: Group, b: Group) -> Iterator[tuple[Span, Span]]:
    """The pairs of spans that live at the same time."""
    return ((s, t) for s in a for t in b if s.first <= t.last and t.first <= s.last)


def _last_reads(net: IntegerNet) -> dict[int, int]:
    return {i: n for n, op in enumerate(net.ops) for i in op.inputs} | {net.output: len(net.ops)}


def _spans(net: IntegerNet) -> dict[int, Span]:
    """The life of each tensor; the image is there before the first operator, the result after the last."""
    last = _last_reads(net)
    written = {net.input: -1} | {op.y: n for n, op in enumerate(net.ops)}
    return {i: Span(n, last.get(i, n), _aligned(net.tensors[i].size)) for i, n in written.items()}


def _chains(net: IntegerNet) -> list[list[int]]:
    """Tensors that lie at the same byte, one written over the other, in order."""
    last = _last_reads(net)
    chains, of = [[net.input]], {net.input: 0}
    for n, op in enumerate(net.ops):
        over = next((i for i in _overwritable(net, op) if last[i] == n), None)
        if over is None:
            of[op.y] = len(chains)
            chains.append([op.y])
        else:
            of[op.y] = of[over]
            chains[of[over]].append(op.y)
    return chains


def _overwritable(net: IntegerNet, op: Op) -> tuple[int, ...]:
    """The inputs that an operator may write its result over."""
    if isinstance(op, Add) and op.a != op.b:
        return op.a, op.b
    if isinstance(op, Mul) and op.a != op.b:
        return (op.a,)
    if isinstance(op, Depthwise):
        x, y = net.tensors[op.x].shape, net.tensors[op.y].shape
        return (op.x,) if y[0] <= x[0] and y[1] <= x[1] else ()
    return op.inputs if isinstance(op, Lookup) else ()


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN

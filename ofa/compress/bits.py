"""Streams of small whole numbers as bytes: of a fixed width, or in canonical Huffman codes.

n symbols, each from 0 to S - 1.  Huffman codes are cut into lanes of `LANE` symbols whose lengths are stored, so that
all lanes are decoded side by side on whole arrays: millions of symbols a second without a line of C.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError

LONGEST = 15  # bits of a code: a table of 32,768 entries decodes it
LANE = 2048  # symbols; a lane's length in bits, at most 30,720, takes two bytes
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stream:
    """Symbols as bytes: `width` bits each, or, where `lengths` (S,) has any, in canonical Huffman codes."""

    count: int
    width: int
    lengths: tuple[int, ...]
    data: bytes


def width_of(symbols: int) -> int:
    """Bits that tell `symbols` different numbers apart; 0 for one."""
    return max(symbols - 1, 0).bit_length()


def code_lengths(counts: Int) -> Int:
    """Bits of each symbol's Huffman code, (S,), 0 for a symbol that never occurs; at most 15 (Huffman 1952).

    Where a code would be longer, rare symbols are counted as more frequent until it is not.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    weights = counts[used].astype(np.int64)
    while True:
        lengths[used] = _tree_depths(weights)
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        weights = (weights + 1) // 2


def _tree_depths(weights: Int) -> Int:
    if len(weights) == 1:
        return np.ones(1, dtype=np.int64)
    heap: list[tuple[int, int]] = [(int(weight), i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = np.zeros(2 * len(weights) - 1, dtype=np.int64)
    for node in range(len(weights), 2 * len(weights) - 1):
        (a, i), (b, j) = heapq.heappop(heap), heapq.heappop(heap)
        parent[i] = parent[j] = node
        heapq.heappush(heap, (a + b, node))
    depth = np.zeros_like(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[: len(weights)]


def canonical_codes(lengths: Int) -> Int:
    """The code of each symbol, (S,): shorter codes first, symbols of one length in their order (RFC 1951, 3.2.2)."""
    codes = np.zeros(len(lengths), dtype=np.int64)
    code = previous = 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda s: (lengths[s], s)):
        code <<= int(lengths[symbol]) - previous
        codes[symbol], previous = code, int(lengths[symbol])
        code += 1
    return codes


def stream_bytes(counts: Int) -> tuple[int, int]:
    """Bytes that symbols of these counts (S,) take at a fixed width, and in Huffman codes with their table."""
    n, used = int(counts.sum()), width_of(len(counts))
    lengths = code_lengths(counts) if n else np.zeros(len(counts), dtype=np.int64)
    lanes = -(-n // LANE)
    coded = -(-int(counts @ lengths) // 8) + 2 * lanes + -(-len(counts) // 2)
    return -(-n * used // 8), coded


def encode(symbols: Int, number: int) -> Stream:
    """Symbols (n,) from 0 to number - 1 as the shorter of the two streams."""
    counts = np.bincount(symbols, minlength=number)
    fixed, coded = stream_bytes(counts)
    if coded >= fixed:
        width = width_of(number)
        return Stream(len(symbols), width, (), _join(symbols, np.full(len(symbols), width)))
    lengths = code_lengths(counts)
    sizes = lengths[symbols]
    ends = np.add.reduceat(sizes, np.arange(0, len(symbols), LANE))
    return Stream(
        len(symbols),
        0,
        tuple(lengths.tolist()),
        ends.astype("<u2").tobytes() + _join(canonical_codes(lengths)[symbols], sizes),
    )


def decode(stream: Stream) -> Int:
    """The symbols of a stream, (n,); raises UserError where it is damaged."""
    if not stream.lengths:
        return _fixed(stream)
    lanes = -(-stream.count // LANE)
    sizes = np.frombuffer(stream.data[: 2 * lanes], dtype="<u2").astype(np.int64)
    body = np.frombuffer(stream.data[2 * lanes :] + bytes(4), dtype=np.uint8).astype(np.int64)
    if len(sizes) < lanes or sizes.sum() > 8 * (len(body) - 4):
        raise UserError("a compressed tensor is cut short; write the file again")
    table = _table(np.array(stream.lengths))
    at = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    found = np.zeros((LANE, lanes), dtype=np.int64)
    last = stream.count - (lanes - 1) * LANE  # symbols of the last lane
    for i in range(min(stream.count, LANE)):
        if i == last:
            at = at[:-1]
        byte = at >> 3
        window = (body[byte] << 16 | body[byte + 1] << 8 | body[byte + 2]) >> (24 - LONGEST - (at & 7))
        entry = table[window & ((1 << LONGEST) - 1)]
        found[i, : len(at)] = entry >> 4
        at = at + (entry & 15)
    return found.T.ravel()[: stream.count]


def _table(lengths: Int) -> Int:
    """For every 15 bits the symbol whose code they begin with, times 16, plus the length of the code."""
    table = np.zeros(1 << LONGEST, dtype=np.int64)
    for symbol, code in enumerate(canonical_codes(lengths).tolist()):
        if lengths[symbol]:
            spare = LONGEST - int(lengths[symbol])
            table[code << spare : (code + 1) << spare] = symbol << 4 | int(lengths[symbol])
    return table


def _join(codes: Int, sizes: Int) -> bytes:
    """Codes of the given sizes in bits, one behind the other, the highest bit first."""
    ends = np.cumsum(sizes)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    starts = ends - sizes
    for bit in range(int(sizes.max(initial=0))):
        has = sizes > bit
        bits[starts[has] + bit] = codes[has] >> (sizes[has] - 1 - bit) & 1
    return np.packbits(bits).tobytes()


def _fixed(stream: Stream) -> Int:
    if not stream.width:
        return np.zeros(stream.count, dtype=np.int64)
    bits = np.unpackbits(np.frombuffer(stream.data, dtype=np.uint8), count=stream.count * stream.width)
    if len(bits) < stream.count * stream.width or len(stream.data) * 8 < stream.count * stream.width:
        raise UserError("a compressed tensor is cut short; write the file again")
    powers = 1 << np.arange(stream.width - 1, -1, -1, dtype=np.int64)
    return bits.reshape(stream.count, stream.width) @ powers

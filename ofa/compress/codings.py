"""The shortest exact form of one tensor: dense, in half precision where that is exact, a codebook, scaled whole
numbers, each also without its zeros (but for half precision).

n values, k entries of a codebook, e stored entries of a sparse tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.compress.bits import Int, Stream, decode, encode, stream_bytes

LARGEST = 1024  # entries of a codebook
EXACT = 2**24  # below which float32 has every whole number; infinite ones and those that are none are not below it
SPANS = tuple(range(2, 9))  # bits of a relative index that are tried
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Coded:
    """One tensor's values as bytes, and what must be known to read them.

    coding: "dense", "half", "codebook" or "scaled", after "sparse " where zeros are left out, before " huffman" where a
    stream is in Huffman codes.  about: JSON.
    """

    coding: str
    about: dict[str, Any]
    data: bytes


@dataclass(frozen=True, slots=True)
class _Symbols:
    """Values as whole numbers from 0 to number - 1, the one that stands for 0.0, and the bytes of their table."""

    kind: str
    symbols: Int
    number: int
    zero: int | None
    table: bytes
    about: dict[str, Any]


def code(values: Floats, scale: Floats | None = None) -> Coded:
    """The shortest form of float32 values of any shape.

    scale: (C,) or (1,): the values may be its multiples by whole numbers, along their first axis.  The form is exact,
    except that -0.0 becomes 0.0.
    """
    flat = values.ravel() + np.float32(0)
    best: tuple[int, Callable[[], Coded]] = (flat.nbytes, lambda: Coded("dense", {}, flat.tobytes()))
    for size, make in _forms(flat, values.shape, scale):
        if size < best[0]:
            best = size, make
    return best[1]()


def values_of(coded: Coded, shape: tuple[int, ...], scale: Floats | None = None) -> Floats:
    """The values of a form, of that shape; raises UserError where the form is damaged."""
    parts = coded.coding.split()
    about, data = coded.about, coded.data
    positions = None
    if parts[0] == "sparse":
        stream, data = _take(about["gaps"], data)
        positions = np.cumsum(decode(stream) + 1) - 1
        parts = parts[1:]
    if parts[0] == "dense":
        values = np.frombuffer(data, dtype="<f4")
    elif parts[0] == "half":
        values = np.frombuffer(data, dtype="<f2").astype(np.float32)
    else:
        table = np.frombuffer(data[: about["table"]], dtype="<f4")
        symbols = decode(_take(about["symbols"], data[about["table"] :])[0])
        values = table[symbols] if parts[0] == "codebook" else (symbols + about["low"]).astype(np.float32)
    if positions is not None:
        entries, values = values, np.zeros(int(np.prod(shape)), dtype=np.float32)
        values[positions] = entries
    values = values.reshape(shape)
    return values if parts[0] != "scaled" else _spread(scale, shape) * values


def _forms(flat: Floats, shape: tuple[int, ...], scale: Floats | None) -> Iterator[tuple[int, Callable[[], Coded]]]:
    """Each form that fits: its size in bytes, and what makes it."""
    forms = [form for form in (_codebook(flat), _scaled(flat, shape, scale)) if form]
    with np.errstate(over="ignore"):
        half = flat.astype("<f2")
    if half.astype(np.float32).tobytes() == flat.tobytes():
        yield half.nbytes, lambda: Coded("half", {}, half.tobytes())
    nonzero = np.flatnonzero(flat)
    few = len(nonzero) < 0.75 * len(flat)
    for form in forms:
        yield _stream_size(form.symbols, form.number) + len(form.table), lambda f=form: _coded(f)  # type: ignore[misc]
    if not few:
        return
    for span in SPANS:
        gaps, entries = relative_indices(nonzero, span)
        cost = _stream_size(gaps, 1 << span)
        stored = np.where(entries < 0, np.float32(0), flat[entries]) if len(entries) else flat[:0]
        yield cost + stored.nbytes, lambda g=gaps, s=span, v=stored: _sparse(g, s, None, v)  # type: ignore[misc]
        for form in forms:
            if form.zero is None:
                continue
            kept = np.where(entries < 0, form.zero, form.symbols[entries]) if len(entries) else form.symbols[:0]
            size = cost + _stream_size(kept, form.number) + len(form.table)
            part = _Symbols(form.kind, kept, form.number, form.zero, form.table, form.about)
            yield size, lambda g=gaps, s=span, p=part, v=stored: _sparse(g, s, p, v)  # type: ignore[misc]


def relative_indices(positions: Int, bits: int) -> tuple[Int, Int]:
    """Positions as zeros skipped before each, in `bits` bits (Han et al. 2016, sec. 2, fig. 2).

    Where more zeros lie between than fit, filler zeros are stored among the entries.  Returns: gaps (e,) from 0 to
    2^bits - 1, and where each entry comes from (e,), -1 for a filler.
    """
    span = 1 << bits
    between = np.diff(positions, prepend=-1) - 1
    fillers = between // span
    ends = np.cumsum(fillers + 1)
    gaps = np.full(int(ends[-1]) if len(ends) else 0, span - 1, dtype=np.int64)
    entries = np.full(len(gaps), -1, dtype=np.int64)
    gaps[ends - 1], entries[ends - 1] = between - fillers * span, positions
    return gaps, entries


def _codebook(flat: Floats) -> _Symbols | None:
    raw = np.ascontiguousarray(flat).view(np.uint32)
    if not len(raw) or len(np.unique(raw[: 8 * LARGEST])) > LARGEST:
        return None
    entries, symbols = np.unique(raw, return_inverse=True)
    if len(entries) > LARGEST:
        return None
    zero = 0 if entries[0] == 0 else None
    return _Symbols("codebook", symbols.astype(np.int64), len(entries), zero, entries.tobytes(), {})


def _scaled(flat: Floats, shape: tuple[int, ...], scale: Floats | None) -> _Symbols | None:
    if scale is None or not len(flat) or scale.size not in (1, shape[0]) or not (scale > 0).all():
        return None
    step = _spread(scale, shape)
    with np.errstate(over="ignore"):
        numbers = np.rint(flat.reshape(shape) / step)
    if not (np.abs(numbers) < EXACT).all():
        return None
    exact = (step * (numbers + np.float32(0))).ravel().tobytes() == flat.tobytes()
    low, high = numbers.min(), numbers.max()
    if not exact or high - low >= LARGEST:
        return None
    symbols = (numbers - low).astype(np.int64).ravel()
    return _Symbols(
        "scaled", symbols, int(high - low) + 1, int(-low) if low <= 0 <= high else None, b"", {"low": int(low)}
    )


def _spread(scale: Floats | None, shape: tuple[int, ...]) -> Floats:
    assert scale is not None, "a scaled tensor is stored behind its scale"
    return scale.astype(np.float32).reshape(-1, *[1] * (len(shape) - 1))


def _coded(form: _Symbols) -> Coded:
    stream = encode(form.symbols, form.number)
    about = form.about | {"table": len(form.table), "symbols": _told(stream)}
    return Coded(form.kind + _suffix(stream), about, form.table + _bytes(stream))


def _sparse(gaps: Int, span: int, form: _Symbols | None, values: Floats) -> Coded:
    first = encode(gaps, 1 << span)
    rest = Coded("dense" + _suffix(first), {}, values.tobytes()) if form is None else _coded(form)
    return Coded(f"sparse {rest.coding}", rest.about | {"gaps": _told(first)}, _bytes(first) + rest.data)


def _suffix(stream: Stream) -> str:
    return " huffman" if stream.lengths else ""


def _stream_size(symbols: Int, number: int) -> int:
    return min(stream_bytes(np.bincount(symbols, minlength=number)))


def _told(stream: Stream) -> list[int]:
    """What the header says of a stream: its symbols, their width or 0, entries of its code table, bytes."""
    return [stream.count, stream.width, len(stream.lengths), len(_bytes(stream))]


def _bytes(stream: Stream) -> bytes:
    """The lengths of its codes, four bits each, and its data."""
    lengths = np.array([*stream.lengths, *[0] * (len(stream.lengths) % 2)], dtype=np.uint8).reshape(-1, 2)
    return (lengths[:, 0] << 4 | lengths[:, 1]).tobytes() + stream.data


def _take(told: list[int], data: bytes) -> tuple[Stream, bytes]:
    """A stream from the front of some bytes, and the bytes behind it."""
    count, width, number, size = told
    head = -(-number // 2)
    pairs = np.frombuffer(data[:head], dtype=np.uint8)
    lengths = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()[:number]
    return Stream(count, width, tuple(lengths.tolist()), data[head:size]), data[size:]

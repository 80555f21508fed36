"""The text of an integer-only network in C: constants, and one call for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np

from ofa.integer.net import Add, Conv, Depthwise, IntegerNet, Lookup, MaxPool, Mean, Mul, Op, Pool
from ofa.integer.plan import Plan, is_product

HEADER = """\
/* {name}: an 8-bit network.  Put an image where net_input says, call net_run, read what it points to. */
#ifndef NET_H
#define NET_H

#include <stdint.h>

#define NET_ROWS {rows}
#define NET_COLUMNS {columns}
#define NET_CHANNELS {channels}
#define NET_INPUT_SIZE {input_size} /* bytes: rows, columns, channels side by side */
#define NET_INPUT_SCALE {input_scale}f /* v becomes v / scale + zero, rounded and held in -128..127 */
#define NET_INPUT_ZERO ({input_zero})
{pixels}
#define NET_OUTPUT_SIZE {output_size}
#define NET_OUTPUT_SCALE {output_scale}f /* a logit is scale * (number - zero) */
#define NET_OUTPUT_ZERO ({output_zero})
#define NET_ARENA_SIZE {arena} /* bytes of RAM, image and result among them */

int8_t *net_input(void);     /* NET_INPUT_SIZE bytes, which net_run writes over */
const int8_t *net_run(void); /* NET_OUTPUT_SIZE logits, there until the next image is put in */

#endif
"""
KNOWN = """\
#define NET_MEAN {mean} /* of each channel: v = (byte / 255 - mean) / std */
#define NET_STD {std}"""
UNKNOWN = "/* v = (byte / 255 - mean) / std of the channel, which the network's card has */"
SOURCE = """\
/* {name}: constants, arena and operators in their order. */
#include "net.h"

#include "kernels.h"

static union {{
    int32_t aligned;
    int8_t byte[NET_ARENA_SIZE];
}} arena;

{constants}

int8_t *net_input(void) {{ return arena.byte + {input}; }}

const int8_t *net_run(void) {{
    int8_t *const at = arena.byte;
{calls}
    return at + {output};
}}
"""
MAIN = """\
/* Reads images of NET_INPUT_SIZE bytes and writes NET_OUTPUT_SIZE logits of each: ./main < images > logits */
#include <stdio.h>

#include "net.h"

int main(void) {
    while (fread(net_input(), 1, NET_INPUT_SIZE, stdin) == NET_INPUT_SIZE) {
        const int8_t *logits = net_run();
        int best = 0, i;
        for (i = 1; i < NET_OUTPUT_SIZE; i++)
            if (logits[i] > logits[best]) best = i;
        fwrite(logits, 1, NET_OUTPUT_SIZE, stdout);
        fprintf(stderr, "class %d\\n", best);
    }
    return 0;
}
"""
MAKEFILE = """\
# make: the example.  For a board: make net.o kernels.o CC=arm-none-eabi-gcc CFLAGS="-Os -mcpu=cortex-m7 -mthumb"
CFLAGS = -O2
CHECKS = -std=c99 -Wall -Wextra -Werror

main: main.o net.o kernels.o
\t$(CC) $(CFLAGS) -o $@ $^

%.o: %.c net.h kernels.h
\t$(CC) $(CFLAGS) $(CHECKS) -c -o $@ $<

clean:
\trm -f main *.o

.PHONY: clean
"""


@dataclass(frozen=True, slots=True)
class Pixels:
    """Mean and standard deviation of each channel, of pixels from 0 to 1, by which images are normalised."""

    mean: Sequence[float]
    std: Sequence[float]


def header(net: IntegerNet, plan: Plan, name: str, pixels: Pixels | None = None) -> str:
    """net.h; pixels: what is known of them."""
    x, y = net.tensors[net.input], net.tensors[net.output]
    rows, columns, channels = x.shape
    return HEADER.format(
        name=name,
        rows=rows,
        columns=columns,
        channels=channels,
        input_size=x.size,
        input_scale=f"{x.scale:.9g}" if "e" in f"{x.scale:.9g}" else f"{x.scale:#.9g}",
        input_zero=x.zero,
        pixels=UNKNOWN if pixels is None else KNOWN.format(mean=_floats(pixels.mean), std=_floats(pixels.std)),
        output_size=y.size,
        output_scale=f"{y.scale:.9g}" if "e" in f"{y.scale:.9g}" else f"{y.scale:#.9g}",
        output_zero=y.zero,
        arena=plan.arena,
    )


def _floats(values: Iterable[float]) -> str:
    return "{" + ", ".join(f"{value:#.9g}f" for value in values) + "}"


def source(net: IntegerNet, plan: Plan, name: str) -> str:
    """net.c."""
    constants, calls = [], []
    for n, op in enumerate(net.ops):
        made, call = WRITERS[type(op)](net, plan, n, op)
        constants += made
        calls.append(f"    {call};")
    return SOURCE.format(
        name=name,
        constants="\n".join(constants),
        input=plan.tensors[net.input],
        output=plan.tensors[net.output],
        calls="\n".join(calls),
    )


def _array(kind: str, name: str, values: Iterable[Any]) -> str:
    text = "\n    ".join(wrap(", ".join(str(int(v)) for v in values), 112))
    return f"static const {kind} {name}[] = {{\n    {text}\n}};"


def _struct(kind: str, name: str, *values: Any) -> str:
    return f"static const {kind} {name} = {_braced(values)};"


def _braced(values: Iterable[Any]) -> str:
    return "{" + ", ".join(_braced(v) if isinstance(v, tuple) else str(v) for v in values) + "}"


def _call(plan: Plan, name: str, maps: Iterable[int], *others: Any) -> str:
    places = [f"at + {plan.tensors[i]}" for i in maps]
    return f"{name}({', '.join(map(str, [*places, *others]))})"


def _result(net: IntegerNet, op: Op) -> tuple[int, int, int]:
    return net.tensors[op.y].zero, op.low, op.high


def _window(net: IntegerNet, op: Conv | Pool, kernel: tuple[int, ...], name: str) -> str:
    x, y = net.tensors[op.x], net.tensors[op.y]
    return _struct("ofa_window", name, *x.shape[:2], *y.shape[:2], *kernel, *op.stride, *op.pad, x.zero)


Written = tuple[list[str], str]


def _conv(net: IntegerNet, plan: Plan, n: int, op: Conv) -> Written:
    x, y = net.tensors[op.x], net.tensors[op.y]
    weights = op.weight.astype(np.int64).reshape(len(op.weight), -1)
    made = [
        _array("int8_t", f"weight{n}", op.weight.ravel()),
        _array("int32_t", f"bias{n}", op.bias.astype(np.int64) - x.zero * weights.sum(1)),
        _array("int32_t", f"multiplier{n}", op.multiplier),
        _array("int8_t", f"shift{n}", op.shift),
    ]
    arrays = [f"{name}{n}" for name in ("weight", "bias", "multiplier", "shift")]
    made.append(_struct("ofa_filters", f"filters{n}", *arrays, _result(net, op)))
    maps, depthwise = (op.x, op.y), isinstance(op, Depthwise)
    if not depthwise and is_product(net, op):
        pixels, inputs = y.shape[0] * y.shape[1], op.weight[0].size
        return made, _call(plan, "ofa_pointwise", maps, pixels, inputs, len(op.weight), f"&filters{n}")
    made.append(_window(net, op, op.weight.shape[1:3], f"window{n}"))
    channels = [x.shape[2]] if depthwise else [x.shape[2], len(op.weight)]
    scratch, name = f"at + {plan.scratch[n]}", "ofa_depthwise" if depthwise else "ofa_conv"
    return made, _call(plan, name, maps, scratch, *channels, f"&window{n}", f"&filters{n}")


def _add(net: IntegerNet, plan: Plan, n: int, op: Add) -> Written:
    zeros = (net.tensors[op.a].zero, net.tensors[op.b].zero)
    factors = [(int(m), int(s)) for m, s in zip(op.multiplier, op.shift, strict=True)]
    made = _struct("ofa_sum", f"sum{n}", *zeros, *factors, _result(net, op))
    return [made], _call(plan, "ofa_add", (op.a, op.b, op.y), net.tensors[op.y].size, f"&sum{n}")


def _mul(net: IntegerNet, plan: Plan, n: int, op: Mul) -> Written:
    zeros = (net.tensors[op.a].zero, net.tensors[op.b].zero)
    made = _struct("ofa_product", f"product{n}", *zeros, (op.multiplier, op.shift), _result(net, op))
    sizes = net.tensors[op.a].size, net.tensors[op.b].size
    return [made], _call(plan, "ofa_mul", (op.a, op.b, op.y), *sizes, f"&product{n}")


def _mean(net: IntegerNet, plan: Plan, n: int, op: Mean) -> Written:
    x = net.tensors[op.x]
    made = _struct("ofa_average", f"average{n}", x.zero, (op.multiplier, op.shift), _result(net, op))
    return [made], _call(plan, "ofa_mean", (op.x, op.y), x.shape[0] * x.shape[1], x.shape[2], f"&average{n}")


def _pool(net: IntegerNet, plan: Plan, n: int, op: Pool) -> Written:
    made = [_window(net, op, op.kernel, f"window{n}"), _struct("ofa_result", f"result{n}", *_result(net, op))]
    name = "ofa_max_pool" if isinstance(op, MaxPool) else "ofa_average_pool"
    return made, _call(plan, name, (op.x, op.y), net.tensors[op.x].shape[2], f"&window{n}", f"&result{n}")


def _lookup(net: IntegerNet, plan: Plan, n: int, op: Lookup) -> Written:
    made = _array("int8_t", f"table{n}", op.table)
    return [made], _call(plan, "ofa_lookup", (op.x, op.y), net.tensors[op.y].size, f"table{n}")


WRITERS: dict[type, Callable[..., Written]] = {
    Conv: _conv,
    Depthwise: _conv,
    Add: _add,
    Mul: _mul,
    Mean: _mean,
    Pool: _pool,
    MaxPool: _pool,
    Lookup: _lookup,
}

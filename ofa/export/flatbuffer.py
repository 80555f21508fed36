"""TFLite files as data: weights moved into the flatbuffer, operators counted, tensors that are alive at once.

A TFLite file is one flatbuffer ("TFL3"), behind which large files keep their weights, each found by an offset.
TensorFlow Lite Micro ignores such offsets without a word and computes from nothing, so files are written without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ofa.errors import UserError
from ofa.export.runtime import require_file
from ofa.extras import extra

IDENTIFIER = b"TFL3"
FILTERS = ("DEPTHWISE_CONV_2D", "CONV_2D", "FULLY_CONNECTED")  # weights, then a bias for each filter
STEEPEST = 256  # steps of an output for one of a sum of products, which XNNPACK's int8 kernels stay below
ROOM = 2**29  # steps that a bias may take: half of what sums may
BYTES = {"FLOAT32": 4, "INT32": 4, "INT8": 1, "UINT8": 1, "INT16": 2, "INT64": 8, "BOOL": 1, "FLOAT16": 2, "FLOAT64": 8}


@dataclass(frozen=True, slots=True)
class Peak:
    """The fullest moment of a file run operator by operator: bytes, the operator, its tensors' bytes alive then."""

    bytes: int
    operator: str
    index: int
    alive: tuple[int, ...]


def schema() -> Any:
    """The classes of TFLite's schema; raises UserError without the extra."""
    return extra("ai_edge_litert.schema_py_generated", "tflite")


def parse(content: bytes) -> Any:
    """The model in a file's bytes, a `ModelT`; raises UserError for anything else."""
    tables = schema()
    try:
        if content[4:8] != IDENTIFIER:
            raise ValueError("it does not begin as one")
        model = tables.ModelT.InitFromObj(tables.Model.GetRootAsModel(content, 0))
        if not model.subgraphs or not model.buffers:
            raise ValueError("it holds no graph")
        return model
    except Exception as error:  # struct.error, IndexError, UnicodeDecodeError, ...: whatever the bytes lead to
        raise UserError(f"this is no usable TFLite file ({error}); export it again") from None


def read(path: Path) -> Any:
    """The model in a file; raises UserError, naming it, where it is absent or damaged."""
    try:
        return parse(require_file(path).read_bytes())
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def inline(content: bytes) -> bytes:
    """The same model with every weight inside its flatbuffer."""
    model = parse(content)
    for buffer in model.buffers:
        if buffer.offset > 1:  # 0 and 1: not used
            buffer.data = np.frombuffer(content[buffer.offset : buffer.offset + buffer.size], np.uint8)
        buffer.offset = buffer.size = 0
    whole = _packed(model)
    require_inline(whole)
    return whole


def with_room(content: bytes, ranges: Mapping[str, tuple[float, float]]) -> bytes:
    """A float model whose biases have room in int8, where they count in steps of the filter's scale times the input's.

    Beside filters of next to no weights a bias would pass 32 bits, and be cut off.  One weight of such a filter is made
    as large as leaves the bias at 2^29; it changes the sum by less than a ten-thousandth of the bias.  ranges: least
    and largest value of tensors by name, 0 among them.
    """
    model = parse(inline(content))
    graph, changed = model.subgraphs[0], False
    for op in graph.operators:
        name, inputs = _name(model, op), [int(number) for number in op.inputs]
        source = graph.tensors[inputs[0]].name.decode() if name in FILTERS and len(inputs) == 3 else ""
        if source not in ranges or inputs[2] < 0:
            continue
        stored = [graph.tensors[number] for number in inputs[1:]]
        held = [model.buffers[tensor.buffer] for tensor in stored]
        if any(t.type != schema().TensorType.FLOAT32 for t in stored) or any(buffer.data is None for buffer in held):
            continue
        weight, bias = (np.asarray(buffer.data, np.uint8).view(np.float32).copy() for buffer in held)
        rows = weight.reshape(-1, len(bias)).T if name == FILTERS[0] else weight.reshape(len(bias), -1)  # views
        low, high = ranges[source]
        least = 127 * np.abs(bias) * 255 / ((high - low) * ROOM)
        for k in np.flatnonzero(np.abs(rows).max(1) < least):
            rows[k, np.abs(rows[k]).argmax()] = least[k]
            changed = True
        held[0].data = weight.view(np.uint8)
    return _packed(model) if changed else content


def require_reach(content: bytes) -> None:
    """Raise UserError where a layer of an int8 model reads numbers too large for the range of what it gives."""
    model = parse(content)
    graph = model.subgraphs[0]
    for op in graph.operators:
        if _name(model, op) not in FILTERS:
            continue
        x, weight, y = (graph.tensors[int(number)] for number in (*op.inputs[:2], op.outputs[0]))
        scales = [np.asarray(tensor.quantization.scale, np.float64) for tensor in (x, weight, y)]
        steps = float((scales[0] * scales[1] / scales[2]).max())
        if steps >= STEEPEST:
            raise UserError(
                f"{y.name.decode()[-60:]}: one step of what this layer sums is {steps:.3g} steps of its output, and "
                f"int8 kernels take less than {STEEPEST}; normalise the images, or whatever makes its input so large"
            )


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def require_inline(content: bytes) -> None:
    """Raise RuntimeError where a constant lies outside the flatbuffer, or is not as large as its tensor."""
    model = parse(content)
    outside = [i for i, buffer in enumerate(model.buffers) if buffer.offset > 1]
    if outside:
        raise RuntimeError(f"{len(outside)} buffers lie outside the flatbuffer, the first is {outside[0]}")
    for graph in model.subgraphs:
        written = {t for op in graph.operators for t in op.outputs} | set(graph.inputs)
        for i, tensor in enumerate(graph.tensors):
            data = model.buffers[tensor.buffer].data
            size = _bytes(tensor)
            if i not in written and size and (data is None or len(data) != size):
                raise RuntimeError(f"tensor {i} of {size} bytes has {0 if data is None else len(data)} in its buffer")


def operators(path: Path) -> Counter[str]:
    """How many of each operator a file has."""
    model = read(path)
    return Counter(_name(model, op) for op in model.subgraphs[0].operators)


def peak(path: Path) -> Peak:
    """The most bytes of tensors that are alive at one operator, from the one that writes them to the last reader."""
    model = read(path)
    graph = model.subgraphs[0]
    alive = _alive(model)
    totals = [sum(sizes) for sizes in alive]
    at = max(range(len(totals)), key=totals.__getitem__)
    return Peak(totals[at], _name(model, graph.operators[at]), at, tuple(sorted(alive[at], reverse=True)))


def _alive(model: Any) -> list[list[int]]:
    """Bytes of each tensor alive at each operator of the first graph."""
    graph = model.subgraphs[0]
    first: dict[int, int] = dict.fromkeys(graph.inputs, 0)
    last: dict[int, int] = {}
    for i, op in enumerate(graph.operators):
        first |= {t: i for t in op.outputs if t not in first}
        last |= dict.fromkeys([*op.inputs, *op.outputs], i)
    last |= dict.fromkeys(graph.outputs, len(graph.operators) - 1)
    sizes = {t: _bytes(graph.tensors[t]) for t in first}
    return [[sizes[t] for t in first if first[t] <= i <= last.get(t, -1)] for i in range(len(graph.operators))]


def _bytes(tensor: Any) -> int:
    shape = () if tensor.shape is None else tensor.shape
    kinds = {value: name for name, value in vars(schema().TensorType).items() if not name.startswith("_")}
    return prod(int(side) for side in shape) * BYTES.get(kinds[tensor.type], 0)


def _name(model: Any, op: Any) -> str:
    code = model.operatorCodes[op.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    names = {value: name for name, value in vars(schema().BuiltinOperator).items() if not name.startswith("_")}
    return names[number]

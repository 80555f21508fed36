"""Int8 .tflite files as integer-only networks.

Everything that a file says is looked up here; what each operator becomes stands in `lite_ops`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.export import flatbuffer
from ofa.integer.factors import limits
from ofa.integer.lite_ops import OPS, Padding, as_map
from ofa.integer.net import IntegerNet, Op, Shape, Tensor

ACTS = ("none", "relu", "relu_n1_to_1", "relu6")  # by the schema's numbers


def read_tflite(path: str | Path) -> IntegerNet:
    """The network of a fully quantized int8 file; float inputs and outputs are left to `run_float`.

    Raises UserError for a file that is damaged, not quantized, or has an operator that is not supported, and where the
    extra that knows the format is absent.
    """
    model, raw = flatbuffer.read(Path(path)), Path(path).read_bytes()
    try:
        return Reader(flatbuffer.schema(), model, raw).net()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # flatbuffers checks nothing: whatever a damaged offset leads to
        raise UserError(f"{path} is no usable TFLite file ({type(error).__name__}: {error}); export it again") from None


class Reader:
    """Goes through a file's operators and gathers ours."""

    def __init__(self, schema: Any, model: Any, raw: bytes) -> None:
        self.names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        self.kinds = {number: name for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
        self.model, self.raw = model, raw
        self.graph = model.subgraphs[0]
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.index: dict[int, int] = {}  # of a file's tensor in ours; several where one only renames another
        self.padded: dict[int, Padding] = {}  # the file's tensors that are others with padding

    def net(self) -> IntegerNet:
        """The whole network."""
        if len(self.graph.inputs) != 1 or len(self.graph.outputs) != 1:
            raise UserError(f"it has {len(self.graph.inputs)} inputs; networks of one image and one output are read")
        start = int(self.graph.inputs[0])
        for op in self.graph.operators:
            code = self.model.operatorCodes[op.opcodeIndex]
            name = self.names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
            if name not in OPS:
                known = ", ".join(sorted(OPS))
                raise UserError(f"operator {name} is not supported in integer arithmetic; these are: {known}")
            if not self.index and name not in ("QUANTIZE", "RESHAPE", "TRANSPOSE"):
                self.tensor(start)
            OPS[name](self, op)
        return IntegerNet(tuple(self.tensors), tuple(self.ops), 0, self.index[int(self.graph.outputs[0])])

    def tensor(self, number: int) -> int:
        """Our index of a file's activation."""
        number = int(number)
        if number in self.padded:
            raise UserError("padding is read by an operator that has no window; only convolutions and pools take it in")
        if number not in self.index:
            t = self.graph.tensors[number]
            scale, zero = self.quantization(t)
            shape = as_map(t.shape)
            self.index[number] = len(self.tensors)
            self.tensors.append(Tensor(t.name.decode(), shape, float(scale[0]), int(zero[0])))
        return self.index[number]

    def of(self, number: int) -> Tensor:
        """The tensor itself."""
        return self.tensors[self.tensor(number)]

    def shape(self, number: int) -> Shape:
        """The shape of any tensor as a map."""
        return as_map(self.graph.tensors[int(number)].shape)

    def zero(self, number: int) -> int:
        """The zero point of any tensor."""
        return int(self.quantization(self.graph.tensors[int(number)])[1][0])

    def quantization(self, t: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scales and zero points of an int8 tensor."""
        if self.kinds[t.type] != "INT8" or t.quantization is None or t.quantization.scale is None:
            raise UserError(
                f"tensor {t.name.decode()[-60:]} is {self.kinds[t.type]}; quantize weights and activations to int8"
            )
        scale = np.asarray(t.quantization.scale, np.float32)
        zero = t.quantization.zeroPoint
        return scale, np.zeros(len(scale), np.int64) if zero is None else np.asarray(zero, np.int64)

    def is_constant(self, number: int) -> bool:
        """Whether a tensor is stored in the file."""
        buffer = self.model.buffers[self.graph.tensors[int(number)].buffer]
        return bool(buffer.size) or (buffer.data is not None and len(buffer.data) > 0)

    def constant(self, number: int, dtype: type = np.int8) -> NDArray[Any]:
        """What is stored of a tensor, inside the flatbuffer or behind it."""
        t = self.graph.tensors[int(number)]
        buffer = self.model.buffers[t.buffer]
        data = (
            self.raw[buffer.offset : buffer.offset + buffer.size]
            if buffer.size
            else bytes(np.asarray(buffer.data, np.uint8))
        )
        return np.frombuffer(data, dtype).reshape([] if t.shape is None else [int(n) for n in t.shape])

    def emit(self, kind: type[Op], out: int, act: dict[str, int], **fields: Any) -> None:
        """Add an operator that writes a file's tensor."""
        self.ops.append(kind(y=self.tensor(out), **act, **fields))

    def act(self, op: Any, out: int) -> dict[str, int]:
        """The clamp of an operator's fused activation."""
        number = op.builtinOptions.fusedActivationFunction
        if number >= len(ACTS):
            raise UserError(f"fused activation {number} is not supported; ReLU, ReLU6 and none are")
        return limits(ACTS[number], self.of(out))

    def window(self, op: Any, kernel: tuple[int, ...], fill: int | None) -> dict[str, Any]:
        """Input, stride and padding of a window; fill: what its operator takes for pixels outside, None for no pixels.

        Padding of an operator before it is taken in.
        """
        o, number, out = op.builtinOptions, int(op.inputs[0]), int(op.outputs[0])
        if (getattr(o, "dilationHFactor", 1), getattr(o, "dilationWFactor", 1)) != (1, 1):
            raise UserError("a convolution is dilated; only plain windows are supported")
        given = self.padded.get(number) or Padding(number, (0, 0), self.of(number).shape, fill)
        if given.fill != fill:
            raise UserError(f"padding is {given.fill} where its reader needs {fill}; pad by zero, pools by nothing")
        stride, pad = (o.strideH, o.strideW), given.pad
        if o.padding == 0:  # SAME
            out_shape = self.shape(out)
            sides = zip(given.shape, out_shape, kernel, stride, strict=False)
            rows, columns = (max(0, (n - 1) * s + k - side) // 2 for side, n, k, s in sides)
            pad = (pad[0] + rows, pad[1] + columns)
        return {"x": self.tensor(given.source), "stride": stride, "pad": pad}

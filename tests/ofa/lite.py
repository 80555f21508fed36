"""Int8 .tflite files of one operator, built from the schema, and LiteRT to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

KERNELS = {
    "reference": OpResolverType.BUILTIN_REF,
    "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "xnnpack": OpResolverType.BUILTIN,
}
VERSIONS = {"HARD_SWISH": 1, "RESHAPE": 1, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4}


class LiteFile:
    """Tensors and operators gathered, then written."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, shape: tuple[int, ...], scale: Any = None, zero: Any = 0, data: NDArray[Any] | None = None) -> int:
        """A tensor of int8, or of int32 where its data are; scale, zero: one, or one for each channel of axis 0."""
        t = schema.TensorT()
        t.name, t.shape, t.buffer = f"t{len(self.graph.tensors)}".encode(), list(shape), 0
        t.type = schema.TensorType.INT32 if data is not None and data.dtype == np.int32 else schema.TensorType.INT8
        if scale is not None:
            t.quantization = schema.QuantizationParametersT()
            t.quantization.scale = np.atleast_1d(np.asarray(scale, np.float32)).tolist()
            t.quantization.zeroPoint = np.broadcast_to(zero, len(t.quantization.scale)).tolist()
            t.quantization.quantizedDimension = 3 if len(shape) == 4 and shape[0] == 1 else 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            t.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(t)
        return len(self.graph.tensors) - 1

    def op(self, name: str, inputs: list[int], outputs: list[int], options: str = "", **fields: Any) -> None:
        """An operator with its options."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), VERSIONS.get(name, 2)
        op = schema.OperatorT()
        op.inputs, op.outputs, op.opcodeIndex = inputs, outputs, len(self.model.operatorCodes)
        if options:
            op.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            op.builtinOptions = getattr(schema, f"{options}T")()
            for field, value in fields.items():
                assert hasattr(op.builtinOptions, field), field
                setattr(op.builtinOptions, field, value)
        self.model.operatorCodes.append(code)
        self.graph.operators.append(op)

    def write(self, path: Path, inputs: list[int], outputs: list[int]) -> Path:
        """Write the file."""
        self.graph.inputs, self.graph.outputs = inputs, outputs
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


def run_lite(path: Path, images: NDArray[np.int8], kernels: str = "reference") -> NDArray[np.int8]:
    """Outputs (N, K) of a file for quantized images (N, H, W, C)."""
    lite = Interpreter(str(path), experimental_op_resolver_type=KERNELS[kernels], num_threads=1)
    lite.allocate_tensors()
    given, made = lite.get_input_details()[0], lite.get_output_details()[0]
    found = []
    for image in images[:, None]:
        if image.shape != tuple(given["shape"]):
            image = image.transpose(0, 3, 1, 2).reshape(given["shape"])
        lite.set_tensor(given["index"], np.ascontiguousarray(image))
        lite.invoke()
        found.append(lite.get_tensor(made["index"]).ravel().copy())
    return np.stack(found)

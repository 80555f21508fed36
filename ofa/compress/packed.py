"""A network's tensors in as few bytes as their values allow, exactly: the file that a compressed network ships in.

    magic "OFAP", version, length of the header, header (zlib of JSON), the tensors' bytes, CRC-32 of all before it

Each float32 tensor has the shortest of these forms: dense; half precision where that is exact; a codebook and an index
for each value; whole numbers times the scale in the buffer `<name>_scale`; each but half precision also sparse, with
relative indices; indices, numbers and relative indices of a fixed width or in Huffman codes (Han et al. 2016, "Deep
Compression", sec. 2 to 4).  Other types are kept as they are.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofa.compress.codings import Coded, code, values_of
from ofa.errors import UserError
from ofa.files import atomic_write

MAGIC, VERSION = b"OFAP", 1
HEAD = struct.Struct("<4sBI")
SPREAD = 4  # bytes, after zlib, by which other numbers may lengthen what the header says of a tensor
Scale = np.ndarray | None


@dataclass(frozen=True, slots=True)
class TensorSize:
    """One tensor of a packed file: its form, its bytes in the file, and what it takes uncompressed."""

    name: str
    shape: tuple[int, ...]
    coding: str
    size: int
    dense: int


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> bytes:
    """Tensors and JSON metadata as a packed file's content.

    `unpack` gives back the same values, shapes and types bit for bit, except that -0.0 becomes 0.0.
    """
    ordered = sorted(tensors, key=lambda name: not name.endswith("_scale"))  # a scale before what it scales
    entries, parts = [], []
    for name in ordered:
        coded = _coded(tensors[name], tensors.get(f"{name}_scale"))
        entries.append(
            [name, _kind(tensors[name]), list(tensors[name].shape), coded.coding, len(coded.data), coded.about]
        )
        parts.append(coded.data)
    header = {"tensors": entries, "order": [ordered.index(name) for name in tensors], "metadata": dict(metadata or {})}
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = b"".join([HEAD.pack(MAGIC, VERSION, len(text)), text, *parts])
    return body + struct.pack("<I", zlib.crc32(body))


def unpack(data: bytes, source: str = "the data") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, in their order, and metadata of a packed file's content; raises UserError, naming `source`."""
    header, at = _header(data, source)
    found: dict[str, Tensor] = {}
    for name, kind, shape, coding, size, about in header["tensors"]:
        part, at = data[at : at + size], at + size
        if coding == "as it is":
            found[name] = torch.empty(shape, dtype=getattr(torch, kind))
            if part:
                found[name].view(-1).view(torch.uint8).copy_(
                    torch.from_numpy(np.frombuffer(part, dtype=np.uint8).copy())
                )
            continue
        scale = found[f"{name}_scale"].numpy() if f"{name}_scale" in found else None
        values = values_of(Coded(coding, about, part), tuple(shape), scale)
        found[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    names = list(found)
    return {names[i]: found[names[i]] for i in header["order"]}, header["metadata"]


def save_packed(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> int:
    """Write a packed file at once; returns its bytes."""
    content = pack(tensors, metadata)
    atomic_write(path, content)
    return len(content)


def load_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a packed file; raises UserError, naming it, where it is absent or damaged."""
    return unpack(_read(path), str(path))


def packed_sizes(path: str | Path) -> list[TensorSize]:
    """Every tensor of a packed file, in the order of the file, then the file's header as a line of its own."""
    data = _read(path)
    header, at = _header(data, str(path))
    rows = [
        TensorSize(name, tuple(shape), coding, size, int(np.prod(shape)) * getattr(torch, kind).itemsize)
        for name, kind, shape, coding, size, _ in header["tensors"]
    ]
    return [*rows, TensorSize("header", (), "zlib", at + 4, 0)]


def bytes_beside(tensors: Mapping[str, Tensor], apart: Collection[str], metadata: Mapping[str, Any]) -> int:
    """The most bytes that a packed file takes besides the values of the tensors named by `apart`, whatever all are."""
    _, end = _header(pack(tensors, metadata), "the data")
    return end + 4 + SPREAD * len(tensors) + sum(t.nbytes for name, t in tensors.items() if name not in apart)


def size_table(sizes: list[TensorSize]) -> str:
    """The same as text, for people: a line for each tensor, the total last."""
    total = TensorSize("total", (), "", sum(s.size for s in sizes), sum(s.dense for s in sizes))
    width = max(len(s.name) for s in sizes)
    lines = [f"{'tensor':{width}}  {'shape':16} {'coding':24} {'bytes':>11} {'dense':>11} {'ratio':>7}"]
    for s in (*sizes, total):
        shape = "x".join(map(str, s.shape))
        ratio = f"{s.dense / s.size:7.2f}" if s.size and s.dense else " " * 7
        lines.append(f"{s.name:{width}}  {shape:16} {s.coding:24} {s.size:11,} {s.dense:11,} {ratio}".rstrip())
    return "\n".join(lines)


def _coded(tensor: Tensor, scale: Tensor | None) -> Coded:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.float32:
        return Coded("as it is", {}, bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    usable = scale is not None and scale.dtype == torch.float32 and tensor.ndim > 0 and scale.numel() > 0
    steps = scale.detach().cpu().reshape(-1).numpy() if usable and scale is not None else None
    return code(tensor.numpy(), steps)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that writes it first") from None


def _header(data: bytes, source: str) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin; everything is checked before anything is read."""
    if data[:4] != MAGIC:
        raise UserError(f"{source} is not a packed network (it begins with {data[:4]!r}); give a file that ofa wrote")
    if len(data) > 4 and data[4] != VERSION:
        raise UserError(f"{source} has version {data[4]}; this program reads version {VERSION}: update it")
    if len(data) < HEAD.size + 4 or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise UserError(f"{source} is damaged or cut short (its checksum differs); write it again")
    end = HEAD.size + HEAD.unpack_from(data)[2]
    header: dict[str, Any] = json.loads(zlib.decompress(data[HEAD.size : end]))
    return header, end

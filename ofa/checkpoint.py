"""Weights of once-for-all, ProxylessNAS and MCUNet: their files, and their names for what is here called otherwise."""

from __future__ import annotations

import hashlib
import re
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.files import atomic_write, cache_folder
from ofa.space import Space
from ofa.spec import Unit
from ofa.supernet import Supernet
from ofa.units import largest_units
from ofa.weights import load_weights

PLACE = re.compile(r"(?:module\.)?(first_conv|final_expand_layer|feature_mix_layer|classifier|\w+\.\d+)\.(.+)")
PARTS = {"inverted_bottleneck": "expand", "depth_conv": "depthwise", "point_linear": "project"}
WRAPPERS = ("mobile_inverted_conv", "fc")  # names that some versions put around a layer
MATRIX = re.compile(r"depthwise\.conv\.\d+to(\d+)_matrix")


def import_supernet(space: Space, checkpoint: str | Path, *, sha256: str | None = None) -> tuple[Supernet, str]:
    """A supernet with the weights of once-for-all's or MCUNet's checkpoint, in evaluation mode, and the file's SHA-256.

    checkpoint: a file, or a URL, which is kept in the cache.  Raises UserError for a file that is no checkpoint, has
    another digest than `sha256`, or is of another space.
    """
    state, digest = read_checkpoint(checkpoint, sha256=sha256)
    supernet = Supernet(space)
    units = [unit for unit, _ in largest_units(space)]
    source = f"{checkpoint}, read as space {space.name},"
    tensors = {_elastic(name): tensor for name, tensor in _rename(state, places(units), source).items()}
    for i in [i for i, unit in enumerate(units) if unit.kind == "conv"]:  # MCUNet's block of a projection alone
        tensors = {name.replace(f"units.{i}.project.", f"units.{i}."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    load_weights(supernet, tensors, source, _their_name(places(units)))
    return supernet.eval(), digest


def import_network(net: nn.Module, names: Sequence[str | None], weights: str | Path | Mapping[str, Tensor]) -> None:
    """Load their weights into a plain network, in place; names: their name for each of its units.

    Raises UserError unless every key of the file is used and every weight of the network is in it.
    """
    source = weights if isinstance(weights, str | Path) else "what is given as weights"
    state = read_checkpoint(weights)[0] if isinstance(weights, str | Path) else _state(weights, source)
    tensors = _rename(state, names, source)
    counters = [name for name in net.state_dict() if name.endswith("num_batches_tracked")]
    tensors = {name: torch.tensor(0) for name in counters} | tensors  # older files have none
    load_weights(net, {name.replace(".linear.", "."): t for name, t in tensors.items()}, source, _their_name(names))


def read_checkpoint(source: str | Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The state_dict in a PyTorch file or behind a URL, and the file's SHA-256; nothing in it is executed."""
    fetched = "://" in str(source)
    path = _fetch(str(source)) if fetched else Path(source)
    again = "delete it to fetch it again" if fetched else "fetch it again"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; give a file or a URL")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise UserError(f"{path} has the SHA-256 {digest}, not {sha256}; {again}, or correct sha256")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, zip and torch, which share no narrower class; torch's advice is to run what is in it
        raise UserError(f"{path} is damaged, or holds more than tensors, which is not read; {again}") from None
    return _state(content, path), digest


def _state(content: Any, source: str | Path) -> dict[str, Tensor]:
    """The state_dict in what a checkpoint holds."""
    for key in 2 * ("state_dict", "model"):  # some lie in one another
        content = content.get(key, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        found = f" but {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else ""
        raise UserError(f"{source} holds no state_dict{found}; give the file that torch.save wrote of net.state_dict()")
    return dict(content)


def _fetch(url: str) -> Path:
    """The cached file of a URL, downloaded now if it is not there."""
    path = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(urlsplit(url).path).name[-100:]}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                atomic_write(path, response.read())
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f"{url} cannot be fetched ({error}); download it yourself and give the file") from None
    return path


def places(units: Iterable[Unit]) -> list[str | None]:
    """Their name for each unit: "blocks.3"; None for a pool, which has no weights."""
    kinds = [unit.kind for unit in units]
    if "bottleneck" in kinds:
        return _count(kinds, {"conv": "input_stem", "bottleneck": "blocks"})
    if "mbconv" not in kinds or "pool" not in kinds:
        raise UserError("once-for-all and MCUNet have no such space; give one of MBConv blocks or bottlenecks")
    pool, last = kinds.index("pool"), max(i for i, kind in enumerate(kinds) if kind == "mbconv")
    names = [None, *(f"blocks.{i}" for i in range(last)), *[None] * (len(kinds) - last - 1)]
    names[0] = "first_conv"
    tail = [i for i in range(last + 1, len(kinds)) if kinds[i] == "conv"]
    if len(tail) == 2 and tail[0] < pool < tail[1]:
        names[tail[0]] = "final_expand_layer"
    if tail:
        names[tail[-1]] = "feature_mix_layer"
    names[-1] = "classifier"
    return names


def _count(kinds: Sequence[str], lists: Mapping[str, str]) -> list[str | None]:
    """Names by position in the list that each kind belongs to."""
    seen = dict.fromkeys(lists, -1)
    names: list[str | None] = []
    for kind in kinds:
        if kind in lists:
            seen[kind] += 1
            names.append(f"{lists[kind]}.{seen[kind]}")
        else:
            names.append("classifier" if kind == "linear" else None)
    return names


def _rename(state: Mapping[str, Tensor], names: Sequence[str | None], source: str | Path) -> dict[str, Tensor]:
    """Tensors by this project's names; raises UserError for a name that follows none of their versions."""
    units = {name: f"units.{i}" for i, name in enumerate(names) if name is not None}
    found = {}
    for key, tensor in state.items():
        match = PLACE.fullmatch(str(key))
        if match is None or match[1] not in units or not (layer := _layer(match[2])):
            known = ", ".join(list(units)[:3])
            raise UserError(
                f"{source} has {key!r}, which this network has no place for; its places are {known}, ...: "
                "give weights of the same network or space"
            )
        if (name := f"{units[match[1]]}.{layer}") in found:
            raise UserError(f"{source} has {key!r} a second time under another name; leave one of them out")
        found[name] = tensor
    return found


def _their_name(names: Sequence[str | None]) -> Callable[[str], str]:
    """From this project's names of tensors to ones that begin as theirs do; names: theirs for each unit."""

    def called(name: str) -> str:
        _, unit, layer = name.split(".", 2)
        return f"{names[int(unit)]}.{layer}"

    return called


def _layer(name: str) -> str:
    """A layer's name in one of their versions as the plain network's: "conv.inverted_bottleneck.bn.bn.weight"."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    parts = [part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1]]  # conv.conv, bn.bn
    if parts[:1] == ["conv"] and set(parts[1:2]) & {*PARTS, "bn"}:  # a residual block's own name for what it wraps
        parts = parts[1:]
    if parts[:2] == ["depth_conv", "se"]:
        parts = parts[1:]
    return ".".join(PARTS.get(part, part) for part in parts)


def _elastic(name: str) -> str:
    """The supernet's name for a plain network's."""
    if match := MATRIX.search(name):
        return f"{name[: match.start()]}depthwise.transforms.{match[1]}"
    return name.replace("depthwise.conv.", "depthwise.")

"""Which activations a running network holds at once, recorded from its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ofa.modules import evaluating


class _Recorder(TorchDispatchMode):
    """Notes the storages that every operation reads and makes; storages are kept, so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.operations: list[set[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append({self.key(t) for t in (*_tensors((args, kwargs)), *_tensors(result))})
        return result

    def key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return storage._cdata


@torch.no_grad()
def peak_elements(net: nn.Module, image: Tensor) -> int:
    """Elements of all activations alive at the fullest operation of a forward pass in evaluation mode.

    image: (N, C, H, W), itself an activation.  A tensor lives from the operation that makes it to the last that reads
    it; views share their storage; parameters and buffers do not count.  Any `nn.Module` will do.
    """
    recorder = _Recorder()
    own = {recorder.key(tensor) for tensor in (*net.parameters(), *net.buffers())}
    image = image.clone()  # without the rest of a larger tensor that it may have been cut from
    with evaluating(net), recorder:
        net(image)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, keys in enumerate(recorder.operations):
        for key in keys - own:
            first.setdefault(key, step)
            last[key] = step
    changes = [0] * (len(recorder.operations) + 1)
    for key in first:
        elements = recorder.storages[key].nbytes() // image.element_size()
        changes[first[key]] += elements
        changes[last[key] + 1] -= elements
    peak = alive = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def _tensors(value: Any) -> list[Tensor]:
    """All tensors inside nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [t for entry in value for t in _tensors(entry)]
        if isinstance(value, Sequence | tuple) and not isinstance(value, str)
        else []
    )

"""A second device that any machine has, to stand for a GPU; it computes on the processor.

    with second_device() as gpu:
        net.to(gpu)(images.to(gpu))

Operations refuse tensors of both devices as CUDA's do, so that code which forgets to move one fails here as it would
there.  It shows nothing of speed, memory or CUDA's own kernels.  It goes by the name of PyTorch's device "lazy", whose
gradients autograd computes without a driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("lazy", 0)
BETWEEN = ("aten._to_copy", "aten.copy_", "aten._copy_from")  # devices
INDEXED = (
    "aten.index",
    "aten.index_put",
    "aten.index_put_",
    "aten._index_put_impl_",
)  # also by the processor's tensors


class Distant(Tensor):
    """A tensor on the second device; `held` is it on the processor."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Distant], held: Tensor) -> Distant:
        made: Distant = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Its numbers; PyTorch's own refuses subclasses."""
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Distant({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Here(TorchDispatchMode):
    """Lets operations without a distant tensor make one: factories and copies that name the device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation on what the distant tensors hold; its tensors are where CUDA would leave them."""
    name = str(function.overloadpacket)
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    distant = [each for each in tensors if isinstance(each, Distant)]
    near = [each for each in tensors if not isinstance(each, Distant) and (each.ndim or not distant)]
    if distant and near and name not in BETWEEN and not (name in INDEXED and isinstance(args[0], Distant)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {GPU} and cpu")
    device = kwargs.get("device")
    there = bool(distant) if device is None else torch.device(device).type == GPU.type
    if name in ("aten.copy_", "aten._copy_from"):
        there = isinstance(args[0], Distant)
    plain = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    out = function(*tree_map(_held, args), **tree_map(_held, plain))
    if not there:
        return out
    wrapped = tree_map(lambda each: Distant(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(function, tuple(args), dict(kwargs), wrapped)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Distant) else value


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == GPU.type else device_type, *args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls: type[_Generator], device: Any = None) -> _Generator:
        return super().__new__(cls)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it there is a second device."""
    tensor = torch.tensor

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:  # it does not ask modes
        return tensor(*args, **kwargs).to(device)

    with ExitStack() as stack:
        for name, value in {"autocast": _Autocast, "Generator": _Generator, "tensor": made}.items():
            stack.enter_context(patch.object(torch, name, value))
        stack.enter_context(patch("torch.optim.sgd._device_dtype_check_for_fused", lambda *a, **k: None))
        stack.enter_context(_Here())
        yield GPU

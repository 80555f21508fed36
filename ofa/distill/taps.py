"""Reading feature maps from any network: where its stages end, and what they put out.

N images, K classes, D features before the classifier; maps are (N, C, H, W).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.modules import evaluating

Size = tuple[int, int]  # height and width of a map
SWIN = "torchvision.models.swin_transformer"


class Outputs(NamedTuple):
    """What a network says about images, and what it saw on the way.

    logits: (N, K).  maps: of the tapped layers.  embedding: the classifier's input, (N, D).  fitted: of a student, its
    maps with as many channels as the teacher's (None: as they are).
    """

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    fitted: tuple[Tensor, ...] | None = None

    def in_float32(self) -> Outputs:
        """The same in float32 at least, in which norms neither vanish nor overflow."""
        fitted = None if self.fitted is None else tuple(map(_wide, self.fitted))
        embedding = None if self.embedding is None else _wide(self.embedding)
        return Outputs(_wide(self.logits), tuple(map(_wide, self.maps)), embedding, fitted)

    def detached(self) -> Outputs:
        """The same as constants, for a teacher that is not to learn."""
        maps = tuple(each.detach() for each in self.maps)
        return Outputs(self.logits.detach(), maps, None if self.embedding is None else self.embedding.detach())


class _Call(NamedTuple):
    """One call of a module that put out a map: its name, the sizes before and after."""

    name: str
    before: Size
    after: Size


def stage_ends(net: nn.Module, x: Tensor) -> dict[str, Size]:
    """The layers after which a map gets smaller, and the last layer with a map, each with the size of its map.

    x: images that the network takes.  A module that halves the size at most is one block; a larger one is looked into.
    Maps of one pixel count where no block has larger ones.
    """
    blocks = _blocks(net, x)
    ends = {call.after: call.name for call in blocks}  # the last of each size
    large = {name: size for size, name in ends.items() if size != (1, 1)}
    return large or {name: size for size, name in ends.items()}


def match(student: dict[str, Size], teacher: dict[str, Size]) -> tuple[tuple[str, str], ...]:
    """Pairs of layers of student and teacher whose maps have one size; raises UserError where there is none."""
    by_size = {size: name for name, size in teacher.items()}
    pairs = tuple((name, by_size[size]) for name, size in student.items() if size in by_size)
    if not pairs:
        raise UserError(
            f"no stages of student and teacher have maps of one size: {_listed(student)} against {_listed(teacher)}; "
            "name pairs with layers=[[student,teacher]], or choose a loss on logits"
        )
    return pairs


def require_layers(net: nn.Module, names: Sequence[str], x: Tensor, whose: str) -> None:
    """Raise UserError, with the names that there are, where a network has no layer of a name that puts out a map."""
    known = {call.name for call in _calls(net, x)}
    for name in names:
        if name not in known:
            blocks = [call.name for call in _blocks(net, x)]
            near = [near for near in difflib.get_close_matches(name, sorted(known), 3) if near not in blocks]
            raise UserError(f"{whose} has no layer {name!r} with a map; choose from {', '.join([*blocks, *near])}")


class Tap:
    """A network that also gives the maps of the named layers and the input of its last linear layer.

    `tap(x)` runs it on images (N, C, H, W).  It hooks onto the network until `close`, or the end of a with block.
    forward: how the network is called (None: `net(x)`).  A network without linear layer has the mean over the pixels of
    its last map as embedding, where a layer is named.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        *,
        embedding: bool,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._forward, self._names, self._seen = forward or net, tuple(names), dict[str, Tensor]()
        modules = dict(net.named_modules())
        self._handles = [modules[name].register_forward_hook(self._keeper(name)) for name in dict.fromkeys(names)]
        if embedding:
            linear = [module for module in modules.values() if "Linear" in type(module).__name__]
            self._handles += [module.register_forward_hook(self._keep_input) for module in linear]

    def __call__(self, x: Tensor) -> Outputs:
        """Logits, maps and embedding of a batch."""
        self._seen.clear()
        logits = self._forward(x)
        maps = tuple(self._seen[name] for name in self._names)
        embedding = self._seen.get("")
        if embedding is None and maps:
            embedding = maps[-1].mean((2, 3))
        self._seen.clear()
        return Outputs(logits, maps, embedding)

    def __enter__(self) -> Self:
        """The tap."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen[name] = output

        return keep

    def _keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].shape[0] == output.shape[0]:
            self._seen[""] = inputs[0].flatten(1)


def _blocks(net: nn.Module, x: Tensor) -> list[_Call]:
    """The calls that the size of the maps is followed by: modules that halve it at most, the outermost ones."""
    calls = _calls(net, x)
    names = {call.name for call in calls}
    inside = {name: any(other.startswith(f"{name}.") for other in names) for name in names}
    opened = {
        c.name for c in calls if inside[c.name] and any(b > 2 * a for b, a in zip(c.before, c.after, strict=True))
    }

    def hidden(name: str) -> bool:
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        return any(parent in names and parent not in opened for parent in parents)

    return [call for call in calls if call.name not in opened and not hidden(call.name)]


def _calls(net: nn.Module, x: Tensor) -> list[_Call]:
    """Every module's call from a map to a map, in the order in which they end; the network is left as it is."""
    calls: list[_Call] = []
    if any(type(module).__module__ == SWIN for module in net.modules()):
        raise UserError(f"maps of {type(net).__name__} are (N, H, W, C), not (N, C, H, W); choose a loss on logits")

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            source = inputs[0] if inputs else None
            if isinstance(source, Tensor) and isinstance(output, Tensor) and source.ndim == output.ndim == 4:
                calls.append(_Call(name, _size(source), _size(output)))

        return keep

    handles = [module.register_forward_hook(keeper(name)) for name, module in net.named_modules() if name]
    try:
        with evaluating(net), torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _size(maps: Tensor) -> Size:
    return maps.shape[2], maps.shape[3]


def _listed(ends: dict[str, Size]) -> str:
    return ", ".join(f"{name} {height}x{width}" for name, (height, width) in ends.items()) or "none"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

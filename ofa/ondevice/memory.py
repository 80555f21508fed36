"""What updating a part of a network needs, in bytes.  B images at once, C channels, H x H pixels.

Backward of a layer y = W x + b needs x for the gradient of W, W for that of x, and nothing for that of b (Cai et al.
2020, "TinyTL", eq. 2); of W restricted to some input channels, only these channels of x (Lin et al. 2022, "MCUNetV3",
sec. 3.2).  ReLU and ReLU6 need one bit for each element, hard swish its input (TinyTL, sec. 3.1).  Batch norm keeps its
statistics and scale and moves only its shift, which is the bias.  Nothing is kept of layers before the first one
updated.  Weights that stay lie in flash and are not counted; those that move are held with their gradients and their
momentum, 4 bytes each.

    memory = activations + (2 + momentum) * 4 * updated parameters

The working memory of a forward pass, which inference needs too, comes on top (`predictors.spec`, peak_memory_bytes).
With batch norm fixed, a batch taken image by image has the gradient of the batch, so B may be 1 whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from ofa.errors import UserError
from ofa.spec import NetSpec
from ofa.table import POOLS, spec_table

FLOAT = 4  # bytes
SIZES = ("cin", "cout", "kernel", "size_in", "size_out")
KNOWN = ("conv", "mbconv", "pool", "linear")


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution with its batch norm, activation and squeeze-excite (`se` reduced channels), or the classifier."""

    name: str
    cin: int
    cout: int
    kernel: int
    size_in: int
    size_out: int
    act: str
    depthwise: bool = False
    bias: bool = True
    se: int = 0

    @property
    def column(self) -> int:
        """Weights that read one input channel."""
        return self.kernel**2 * (1 if self.depthwise else self.cout)


@dataclass(frozen=True, slots=True)
class Update:
    """What moves in a layer: its bias, and the weights that read some input channels."""

    bias: bool = True
    channels: tuple[int, ...] = ()


Plan = Mapping[str, Update]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: activations kept for backward; updated weights, their gradients, the optimizer's state."""

    activations: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.weights + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, int]:
        """As JSON values, in bytes."""
        return asdict(self) | {"total": self.total}


@lru_cache(maxsize=8)  # a plan is priced for each of its candidates
def layers(spec: NetSpec) -> tuple[Layer, ...]:
    """The layers of a network that can be updated, in order; raises UserError for units that are not known here."""
    if unknown := [unit.kind for unit in spec.units if unit.kind not in KNOWN]:
        raise UserError(f"on-device training knows {', '.join(KNOWN)}, not {unknown[0]}; choose another space")
    table, found = spec_table(spec), []
    for i, (name, op) in enumerate(zip(table.names, table.op, strict=True)):
        if op in POOLS or ".se." in name:  # what a gate needs is counted where it acts, behind the depthwise layer
            continue
        sizes: dict[str, Any] = {key: int(getattr(table, key)[0, i]) for key in SIZES}
        layer = Layer(name, **sizes, act=table.act[i], bias=bool(table.bias[i] or table.bn[i]))
        if name.endswith(".depthwise"):
            layer = replace(layer, depthwise=True, se=spec.units[int(table.block[i])].se)
        found.append(layer)
    return tuple(found)


def parameters(layer: Layer, update: Update) -> int:
    """How many numbers move in a layer."""
    return len(update.channels) * layer.column + layer.cout * update.bias


def passed(layer: Layer, images: int) -> int:
    """Bytes that a layer keeps so that gradients pass through its activation and its squeeze-excite."""
    elements = images * layer.cout * layer.size_out**2
    kept = {"none": 0, "h_swish": FLOAT * elements}.get(layer.act, _bits(elements))
    if layer.se:  # its input, its gate, the masks of its two activations
        gates = images * layer.cout
        kept += FLOAT * (elements + gates) + _bits(images * layer.se) + _bits(gates)
    return kept


def read(layer: Layer, channels: int, images: int) -> int:
    """Bytes of the input channels kept for the gradient of the weights."""
    return FLOAT * images * channels * layer.size_in**2


def memory(spec: NetSpec, plan: Plan, *, images: int = 1, momentum: bool = True) -> Memory:
    """What updating a network by a plan needs, `images` at once; raises UserError for a layer that it does not have."""
    known = layers(spec)
    if unknown := sorted(set(plan) - {layer.name for layer in known}):
        raise UserError(f"the network has no layer {unknown[0]!r}; its layers are {', '.join(x.name for x in known)}")
    activations = moved = 0
    live = False
    for layer in known:
        update = plan.get(layer.name, Update(bias=False))
        if update.bias and not layer.bias:
            raise UserError(f"{layer.name} has no batch norm and so no bias to update; update its weights")
        count = parameters(layer, update)
        live = live or count > 0
        activations += read(layer, len(update.channels), images) + (passed(layer, images) if live else 0)
        moved += count
    return Memory(activations, FLOAT * moved, FLOAT * moved, FLOAT * moved * momentum)


def _bits(elements: int) -> int:
    """Bytes of one bit each."""
    return -(-elements // 8)


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {name: {"bias": update.bias, "channels": list(update.channels)} for name, update in plan.items()}

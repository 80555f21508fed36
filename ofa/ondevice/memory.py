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

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ofa.errors import UserError
from ofa.spec import NetSpec, Unit

FLOAT = 4  # bytes
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


def layers(spec: NetSpec) -> list[Layer]:
    """The layers of a network that can be updated, in order; raises UserError for units that are not known here."""
    found, size = [], spec.resolution
    for i, unit in enumerate(spec.units):
        if unit.kind not in KNOWN:
            raise UserError(f"on-device training knows {', '.join(KNOWN)}, not {unit.kind}; choose another space")
        if unit.kind == "pool":
            size = 1
        else:
            found += list(_layers(f"units.{i}", unit, size))
            size = found[-1].size_out
    return found


def _layers(name: str, unit: Unit, size: int) -> Iterator[Layer]:
    after = (size - 1) // unit.stride + 1
    if unit.kind == "linear":
        yield Layer(name, unit.cin, unit.cout, 1, 1, 1, "none")
    elif unit.kind == "conv":
        yield Layer(f"{name}", unit.cin, unit.cout, unit.kernel, size, after, unit.act, bias=unit.bn)
    else:
        if unit.expand:
            yield Layer(f"{name}.expand", unit.cin, unit.mid, 1, size, size, unit.act)
        depthwise = Layer(f"{name}.depthwise", unit.mid, unit.mid, unit.kernel, size, after, unit.act, True, se=unit.se)
        yield depthwise
        yield Layer(f"{name}.project", unit.mid, unit.cout, 1, after, after, "none")


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

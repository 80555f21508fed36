"""Cards: what a model file is, how good it was measured to be, and all that is needed to build the network again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ofa.errors import UserError
from ofa.files import commit, read_json, versions, write_json
from ofa.space import Arch
from ofa.spec import NetSpec
from ofa.static import StaticNet, build_spec
from ofa.weights import load_tensors, load_weights, save_tensors

UNITS = {  # of metrics; those whose names end in _bytes are bytes
    "accuracy": "share of right first classes",
    "accuracy_val": "share of right first classes",
    "latency_ms": "ms",
    "energy_uj": "µJ, an estimate",
    "macs": "MACs",
    "params": "parameters",
    "opset": "ONNX operator set",
    "weight_bits": "bits of quantized weights",
}
RECORDS = ("space", "data", "files", "training", "versions")


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number and its unit."""

    value: float
    unit: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))


@dataclass(frozen=True, slots=True)
class Card:
    """A shipped network.

    arch and space: the architecture it was found as; spec: what it is now, pruned or not.  metrics: by name.  data:
    what it was trained on, as `ImageData.describe` says it.  files: the SHA-256 of each file that the card speaks for,
    by name; one of them, ending in .safetensors, holds the weights.  training: how the weights came to be after the
    supernet's, as JSON values.
    """

    arch: Arch
    space: Mapping[str, Any]
    spec: NetSpec
    metrics: Mapping[str, Metric]
    data: Mapping[str, Any]
    seed: int
    commit: str = field(default_factory=commit)
    versions: Mapping[str, str] = field(default_factory=versions)
    files: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("space", "data", "training"):  # as JSON gives them back: lists for tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"arch": self.arch.to_dict(), "spec": self.spec.to_dict()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Card:
        """From `to_dict`; raises UserError for unknown or missing fields."""
        try:
            metrics = {name: Metric(**metric) for name, metric in values["metrics"].items()}
            spec, arch = NetSpec.from_dict(values["spec"]), Arch.from_dict(values["arch"])
            if wrong := [name for name in RECORDS if not isinstance(values.get(name, {}), Mapping)]:
                raise UserError(f"{wrong[0]} of a card is a record of names and values, not {values[wrong[0]]!r}")
            return Card(**{**values, "metrics": metrics, "spec": spec, "arch": arch})
        except (KeyError, TypeError, AttributeError) as error:
            names = [f.name for f in fields(Card)]
            raise UserError(f"not a card ({error}); its fields are {names}") from None


def metrics_of(values: Mapping[str, Any]) -> dict[str, Metric]:
    """Those of the values that have a unit, as a card's metrics."""
    units = {name: UNITS.get(name, "bytes") for name in values if name in UNITS or name.endswith("_bytes")}
    return {name: Metric(values[name], unit) for name, unit in units.items()}


def save_card(path: str | Path, card: Card, files: Iterable[str | Path]) -> Card:
    """Write a card as JSON with the digests of `files`, which lie in its folder; returns it with them."""
    card = replace(card, files={Path(file).name: _digest(Path(file)) for file in files})
    write_json(path, card.to_dict())
    return card


def save_net(path: str | Path, net: StaticNet, card: Card, files: Iterable[str | Path] = ()) -> Card:
    """Write the weights of `net` to `path` with the suffix .safetensors and the card to `path`; returns the card.

    files: others that the card speaks for too.
    """
    weights = Path(path).with_suffix(".safetensors")
    save_tensors(weights, net.state_dict())
    return save_card(path, replace(card, spec=net.spec), [weights, *files])


def load_card(path: str | Path) -> Card:
    """Read a card; raises UserError, naming the file, where it is absent, broken or no card."""
    try:
        return Card.from_dict(read_json(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def card_of(model: str | Path) -> Path:
    """The card (.json) that `model` is, or the one beside an ONNX file; raises UserError where there is none."""
    if Path(model).suffix not in (".json", ".onnx"):
        raise UserError(f"model={model} is neither a card (.json) nor an ONNX file (.onnx); give one of these")
    card = Path(model).with_suffix(".json")
    if not card.is_file():
        raise UserError(f"{card} does not exist; a model needs the card that ofa-export writes beside it")
    return card


def rebuild(path: str | Path) -> StaticNet:
    """The network of a card, with its weights, in evaluation mode.

    Raises UserError, naming it, for a weights file that is absent, or not byte for byte the one the card was made with.
    """
    card = load_card(path)
    weights = file_of(card, path, ".safetensors")
    net = build_spec(card.spec)
    load_weights(net, load_tensors(weights)[0], weights)
    return net.eval()


def file_of(card: Card, path: str | Path, suffix: str) -> Path:
    """The one file with a suffix that a card, read from `path`, speaks for.

    Raises UserError, naming it, where it is absent, or not byte for byte the one the card was made with.
    """
    names = [name for name in card.files if name.endswith(suffix)]
    if len(names) != 1:
        raise UserError(f"{path} names {len(names)} files ending in {suffix}; give a card that names one")
    file = Path(path).parent / names[0]
    if _digest(file) != card.files[names[0]]:
        raise UserError(f"{file} is not the file that {path} was written with; delete both and run the stage again")
    return file


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the stage that writes it first")
    return hashlib.sha256(path.read_bytes()).hexdigest()

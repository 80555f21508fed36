"""Students and teachers by what a person writes: a card, a block list, an architecture of a space, torchvision's name.

runs/digits/specialize/phone/float.json      a card, with its weights
net.config@net.pth                           a block list of once-for-all or MCUNet, with weights
digits_mbv3/smallest, digits_mbv3/arch.json  an architecture of a space: smallest, largest, or a file
my/space/board.yaml/largest                  the same of a space of one's own
digits_mbv3/arch.json@supernet.safetensors   the same with its weights, or cut out of a supernet with these
resnet18, resnet18@net.pth, resnet18@DEFAULT torchvision's, fresh, with weights, or with those that it publishes;
                                             also written torchvision:resnet18
Weights are a .safetensors file, one of PyTorch, or what ofa-compress has packed (.ofap).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ofa.checkpoint import read_checkpoint
from ofa.compress.packed import load_packed
from ofa.errors import UserError
from ofa.evaluate import specialise
from ofa.files import read_json
from ofa.names import Name, parse
from ofa.space import Arch, Space, load_space
from ofa.static import StaticNet, build, with_classes
from ofa.supernet import Supernet
from ofa.weights import load_tensors, load_weights

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.export.card import Card
    from ofa.spec import NetSpec

FORMS = (
    "a card (.json), a block list, <space>/smallest, <space>/largest, <space>/<arch.json> (a space is a name in "
    "conf/space, or a file, as my/space/mine.yaml), or torchvision's name"
)
HEADS = ("aux1", "aux2", "AuxLogits")  # GoogLeNet's and Inception's further classifiers, of use in training alone


class Named(NamedTuple):
    """A network, whether it has learned weights, and where it comes from: an architecture of a space, if it is one."""

    net: nn.Module
    learned: bool
    arch: Arch | None = None
    space: Space | None = None

    def card(
        self, data: ImageData, seed: int, values: Mapping[str, Any], training: Mapping[str, Any] = MappingProxyType({})
    ) -> Card:
        """The card of a StaticNet; values: what was measured on it."""
        from ofa.export.card import Card, metrics_of

        spec: NetSpec = self.net.spec  # type: ignore[assignment]
        arch, space = self.arch or Arch(spec.resolution), self.space.to_dict() if self.space else {}
        return Card(arch, space, spec, metrics_of(values), data.describe(), seed, training=dict(training))


def load_net(text: str, data: ImageData, *, adapt: bool = False) -> Named:
    """The network that `text` names, in evaluation mode; after an @, a file of weights.

    data: networks that are made anew are for its images, and those cut out of a supernet have their batch norms
    calibrated on them.  adapt: one with weights for other classes gets a fresh classifier for those of the images.
    Raises UserError for a name that is none of the above, for weights that do not fit, and for a torchvision network
    given images that are not in colour.
    """
    name = parse(text)
    found = _unweighted(name, data.channels, len(data.classes))
    if name.weights and not found.learned:
        found = found._replace(net=_weighted(found, name.weights, data), learned=True)
    found = _adapted(found, name, len(data.classes)) if adapt else found
    return found._replace(net=found.net.eval())


@torch.no_grad()
def require_images(net: nn.Module, name: str, data: ImageData, side: int, *, others: bool = False) -> None:
    """Raise UserError where a network in evaluation mode cannot take images of `side` pixels, or has other classes.

    others: it may have other classes.
    """
    weight = next(net.parameters())
    if isinstance(net, StaticNet) and net.spec.in_channels != data.channels:
        takes = f"{name} takes {net.spec.in_channels} channels, the images of {data.name} have {data.channels}"
        raise UserError(f"{takes}; give its own data, or another network")
    try:
        logits = net(weight.new_zeros(1, data.channels, side, side))
    except (RuntimeError, AssertionError) as error:
        images = f"images of {side} x {side} pixels in {data.channels} channel" + "s" * (data.channels > 1)
        raise UserError(f"{name} cannot take {images} ({error}); give larger images, or another network") from error
    found, classes = logits.shape[1], len(data.classes)
    if found != classes and not others:
        remedy = "give its own data, or another network, or let it learn them as student= of ofa-distill"
        raise UserError(f"{name} has {found} classes, {data.name} {classes}; {remedy}")


def _unweighted(name: Name, channels: int, classes: int) -> Named:
    if name.network.endswith(".ofap"):
        raise UserError(
            f"{name.network} holds weights, but not the layers that they are of; give {_beside(name.network)}"
        )
    if name.network.endswith(".yaml"):
        raise UserError(f"{name.network} is a space; give {name.network}/largest, /smallest, or /<arch.json>")
    if Path(name.network).is_file():
        return _of_file(Path(name.network), name.weights)
    space = _space(name.space)
    if space is not None:
        return _of_space(space.adapt(in_channels=channels, classes=classes), name.choice)
    if name.network.endswith(".json"):
        raise UserError(f"{name.network} does not exist; give {FORMS}")
    net = _torchvision(name.network.removeprefix("torchvision:"), name.weights, channels, classes)
    return Named(net, learned=name.weights == "DEFAULT")


def _of_file(path: Path, weights: str) -> Named:
    from ofa.export.card import load_card, rebuild
    from ofa.published import load_network

    content: Any = read_json(path)
    if isinstance(content, dict) and "spec" in content:
        if weights:
            other = f", or give {_beside(weights)}" if weights.endswith(".ofap") else ""
            raise UserError(f"{path} is a card, which has weights of its own; leave out @{weights}{other}")
        card = load_card(path)
        space = load_space(card.space) if card.space else None
        return Named(rebuild(path), True, card.arch if space else None, space)
    return Named(load_network(path, weights or None), learned=bool(weights))


def _of_space(space: Space, choice: str) -> Named:
    if choice in ("smallest", "largest"):
        arch = space.decode(getattr(space, choice)())[0]
    elif not Path(choice).is_file():
        raise UserError(f"{choice} does not exist; give <space>/smallest, <space>/largest, or <space>/<arch.json>")
    else:
        content = read_json(choice)
        arch = Arch.from_dict(content.get("arch", content) if isinstance(content, dict) else content)
    return Named(build(space, arch), False, arch, space)


def _torchvision(name: str, weights: str, channels: int, classes: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(models):
        raise UserError(f"network {name!r} is not known; give {FORMS}, such as resnet18")
    if channels != 3:
        raise UserError(f"{name} takes images in colour, these have {channels} channel; give a network of a space")
    try:
        if weights == "DEFAULT":
            return _single(models.get_model(name, weights=weights))
        net = _single(models.get_model(name, weights=None, num_classes=classes))
        last = list(net.state_dict())[-1]
        learned = _tensors(weights).get(last) if weights else None
        if learned is None or not learned.ndim or len(learned) == classes:
            return net
        return _single(models.get_model(name, weights=None, num_classes=len(learned)))
    except OSError as error:  # URLError is one
        raise UserError(f"weights of {name} cannot be downloaded ({error}); give {name}@<file>") from None


def _adapted(found: Named, name: Name, classes: int) -> Named:
    """The network for so many classes, its classifier fresh where it had others."""
    net, space = found.net, found.space
    if isinstance(net, StaticNet):
        if net.spec.classes == classes:
            return found
        space = space and space.adapt(in_channels=net.spec.in_channels, classes=classes)
        return found._replace(net=with_classes(net, classes), space=space)
    state = net.state_dict()
    last = list(state)[-1]
    if len(state[last]) == classes:
        return found
    fresh = _torchvision(name.network.removeprefix("torchvision:"), "", 3, classes)
    kept = {key: value for key, value in state.items() if key.rpartition(".")[0] != last.rpartition(".")[0]}
    fresh.load_state_dict(kept, strict=False)
    return found._replace(net=fresh)


def _tensors(file: str) -> dict[str, Tensor]:
    read = {".safetensors": load_tensors, ".ofap": load_packed}.get(Path(file).suffix, read_checkpoint)
    return read(file)[0]


def _single(net: nn.Module) -> nn.Module:
    """The network, changed in place to give logits alone in training too."""
    if hasattr(net, "aux_logits"):
        net.aux_logits = False  # type: ignore[assignment]
        for head in HEADS:
            if hasattr(net, head):
                setattr(net, head, None)
    return net


def _weighted(found: Named, file: str, data: ImageData) -> nn.Module:
    """The network with the weights of a file, which are its own or those of its space's supernet."""
    tensors = _tensors(file)
    own = found.net.state_dict()
    if found.space is not None and found.arch is not None:
        supernet = Supernet(found.space)
        if set(tensors) == set(supernet.state_dict()):
            load_weights(supernet, tensors, file)
            return specialise(supernet.eval(), found.arch, data)
    if hasattr(found.net, "aux_logits"):  # published files have the heads
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in HEADS}
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}  # older files have none
    try:
        load_weights(found.net, counters | tensors, file)
    except UserError as error:
        if not file.endswith(".ofap"):
            raise
        raise UserError(f"{error}; where its step changed the layers, give {_beside(file)}") from None
    return found.net


def _beside(file: str) -> str:
    """What holds the layers of a packed file of weights."""
    card = Path(file).with_suffix(".json")
    return str(card) if card.exists() else f"the network that the step began with, as <network>@{file}"


def _space(name: str) -> Space | None:
    """A space by name or file, None where there is none of that name."""
    if name.endswith(".yaml"):
        return load_space(Path(name))
    known = (entry.name.removesuffix(".yaml") for entry in (files("conf") / "space").iterdir())
    return load_space(name) if name in known else None

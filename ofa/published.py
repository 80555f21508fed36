"""Published networks given as block lists: once-for-all's and MCUNet's `net.config`, and tables of their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ofa.arrays import make_divisible, python
from ofa.checkpoint import import_network
from ofa.errors import UserError
from ofa.files import read_json
from ofa.settings import arch_of as arch_of
from ofa.spec import ACTIVATIONS, NetSpec, Unit, check_chain
from ofa.static import StaticNet, build_spec, with_classes

Config = Mapping[str, Any]
Named = list[tuple[str | None, Unit]]  # their name for a unit, and the unit
WRONG = (AttributeError, KeyError, TypeError, ValueError, IndexError)  # what reading something else ends in


def load_network(
    config: str | Path | Config,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    *,
    resolution: int | None = None,
    classes: int | None = None,
) -> StaticNet:
    """The plain network of a block list, with published weights or fresh ones, in evaluation mode.

    config: the file or content of a `net.config` of once-for-all or MCUNet, or an entry of a table of block lists
    (`blocks`: in, out, kernel, stride, expand, mid, se, activation, shortcut; `head`: the other layers).  weights: a
    PyTorch file, URL or state_dict, all keys of which must be used.  resolution: side of the image in pixels, where
    neither the config nor a `run.config` beside it says it.  classes: of other images than the published ones, for
    which the classifier is made anew.  Raises UserError.
    """
    spec, names = read_network(config, resolution=resolution)
    net = build_spec(spec)
    if weights is not None:
        import_network(net, names, weights)
    return (net if classes is None else with_classes(net, classes)).eval()


def read_network(config: str | Path | Config, *, resolution: int | None = None) -> tuple[NetSpec, list[str | None]]:
    """The spec of a block list, and the publisher's name for each unit; arguments as of `load_network`."""
    if not isinstance(config, Mapping | str | Path):
        raise UserError(f"a {type(config).__name__} is no block list with its head; give a net.config, whole")
    given = config if isinstance(config, Mapping) else _read(Path(config))
    if {"spec", "arch"} <= set(given):
        raise UserError("this is a card, which says the whole network; give it to ofa.export.card.rebuild")
    sides = [resolution, given.get("resolution"), given.get("image_size")]
    side = python(next((value for value in sides if value is not None), None))
    if side is None:
        raise UserError("the block list does not say its image size; give resolution=<pixels>")
    if isinstance(side, bool) or not isinstance(side, int | float) or not side >= 1 or side % 1:
        raise UserError(f"the block list has the image size {side!r}; give resolution=<pixels>, one whole number")
    try:
        named = _table_units(given) if "head" in given else _config_units(given)
        bn = {"name": "bn"} | (given.get("bn") or {})
        _only(bn, name="bn", ws_eps=None, gn_channel_per_group=None)
        default = 1e-5 if any(unit.act == "h_swish" or unit.kind == "bottleneck" for _, unit in named) else 1e-3
        eps = default if bn.get("eps") is None else float(bn["eps"])  # the builders' own where the list is silent
        if not 0 < eps < 1:
            raise UserError(f"the block list's batch norm has eps={eps}; give a number between 0 and 1")
    except UserError:
        raise
    except WRONG as error:
        raise UserError(f"not a block list of these networks ({_fault(error)}); give a net.config") from None
    check_chain(named)
    units = tuple(unit for _, unit in named)
    return NetSpec(units, int(side), units[0].cin, units[-1].cout, eps), [name for name, _ in named]


def _read(path: Path) -> dict[str, Any]:
    """A net.config, with the image size of the run.config beside it."""
    own, run = _mapping(path), path.with_name("run.config")
    return ({"image_size": _mapping(run).get("image_size")} if run.exists() else {}) | own


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and no fields; give a net.config")
    return content


# -- net.config --------------------------------------------------------------------------------------------------------


def _config_units(config: Config) -> Named:
    if "input_stem" in config:
        return _resnet_units(config)
    named: Named = [("first_conv", _conv_of(config["first_conv"]))]
    named += [pair for pair in _each("blocks", config["blocks"], _block_of) if pair[1] is not None]
    final, mix = config.get("final_expand_layer"), config.get("feature_mix_layer")
    named += [("final_expand_layer", _conv_of(final))] if final else []
    named += [("feature_mix_layer", _conv_of(mix))] if mix and not final else []
    named += [(None, _pool(named[-1][1].cout))]
    named += [("feature_mix_layer", _conv_of(mix))] if mix and final else []
    return [*named, ("classifier", _linear(config["classifier"]))]


def _resnet_units(config: Config) -> Named:
    named: Named = _each("input_stem", config["input_stem"], _stem_of)
    channels = named[-1][1].cout
    named.append((None, Unit("maxpool", channels, channels, 3, 2)))
    named += _each("blocks", config["blocks"], _bottleneck_of)
    named.append((None, _pool(named[-1][1].cout)))
    return [*named, ("classifier", _linear(config["classifier"]))]


def _each(name: str, layers: Sequence[Any], make: Callable[..., Any]) -> list[Any]:
    """Pairs of a layer's name and what `make` makes of the layer; raises UserError with the name."""
    made = []
    for i, layer in enumerate(layers):
        try:
            made.append((f"{name}.{i}", make(layer)))
        except UserError as error:
            raise UserError(f"{name}.{i}: {error}") from None
        except WRONG as error:
            raise UserError(f"{name}.{i} of the block list is not understood ({_fault(error)}); mend it") from None
    return made


def _fault(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


def _stem_of(layer: Config) -> Unit:
    residual = layer["name"] == "ResidualBlock"
    shortcut = residual and _adds_input(layer.get("shortcut"))
    return _conv_of(layer["conv"] if residual else layer, shortcut=shortcut)


def _conv_of(layer: Config, *, shortcut: bool = False) -> Unit:
    _only(layer, groups=1, dilation=1, bias=False, use_bias=False, use_se=False, ops_order="weight_bn_act")
    kernel, stride = _one(layer.get("kernel_size", 3)), _one(layer.get("stride", 1))
    act, bn = _act(layer.get("act_func", "relu")), bool(layer.get("use_bn", True))
    return Unit("conv", layer["in_channels"], layer["out_channels"], kernel, stride, act=act, bn=bn, shortcut=shortcut)


def _block_of(block: Config) -> Unit | None:
    """An mbconv unit; None for a block that is left out (a ZeroLayer, or no convolution at all)."""
    conv = block.get("conv", block.get("mobile_inverted_conv"))
    if conv is None or conv["name"] == "ZeroLayer":
        return None
    if "MB" not in conv["name"]:
        raise UserError(f"a block of {conv['name']} is not known; MBConvLayer and MBInvertedConvLayer are")
    _only(conv, dilation=1, norm_layer="BatchNorm2d", bias=False, use_bias=False, no_dw=False)
    cin, cout = conv["in_channels"], conv["out_channels"]
    expand, stride = conv["expand_ratio"], _one(conv.get("stride", 1))
    mid = conv.get("mid_channels") or round(cin * expand)
    if conv.get("groups") is not None:
        raise UserError(f"groups {conv['groups']} of a block are not supported; depthwise convolutions are")
    shortcut = _adds_input(block.get("shortcut"))
    se = int(make_divisible(mid // 4)) if conv.get("use_se") else 0
    act = _act(conv.get("act_func", "relu6"))
    kernel = _one(conv.get("kernel_size", 3))
    return Unit("mbconv", cin, cout, kernel, stride, mid, se, act, expand=expand != 1, shortcut=shortcut)


def _bottleneck_of(block: Config) -> Unit:
    cin, cout, stride = block["in_channels"], block["out_channels"], _one(block.get("stride", 1))
    mode = block.get("downsample_mode", "avgpool_conv")
    if block.get("groups", 1) != 1 or (mode != "avgpool_conv" and stride != 1):
        raise UserError(f"a bottleneck with groups or downsample_mode {mode!r} is not supported; avgpool_conv is")
    mid = int(make_divisible(block.get("mid_channels") or round(cout * block["expand_ratio"])))
    act, kernel = _act(block.get("act_func", "relu")), _one(block.get("kernel_size", 3))
    shortcut = stride == 1 and cin == cout
    return Unit("bottleneck", cin, cout, kernel, stride, mid, act=act, expand=True, shortcut=shortcut)


def _adds_input(shortcut: Config | None) -> bool:
    """Whether a block adds its input as it is; raises UserError for a shortcut that would change it."""
    if shortcut is None or shortcut["name"] == "ZeroLayer":
        return False
    _only(shortcut, name="IdentityLayer", use_bn=False, act_func=None)
    return True


def _only(layer: Config, **supported: Any) -> None:
    """Raise UserError where a layer sets a field to what is not supported here."""
    for name, value in supported.items():
        if layer.get(name) not in (None, value):
            raise UserError(f"{layer.get('name')} has {name}={layer[name]!r}; only {name}={value!r} is supported here")


def _linear(layer: Config) -> Unit:
    _only(layer, bias=True, use_bn=False, act_func=None)
    return Unit("linear", layer["in_features"], layer["out_features"])


def _pool(channels: int) -> Unit:
    return Unit("pool", channels, channels)


def _one(size: Any) -> int:
    """A number given once, or twice for height and width; raises UserError where these differ."""
    if isinstance(size, Sequence) and len(set(size)) > 1:
        raise UserError(f"size {size} differs between height and width; only equal ones are supported here")
    number = size[0] if isinstance(size, Sequence) and size else size
    if isinstance(number, bool) or not isinstance(number, int | float) or number < 1 or number % 1:
        raise UserError(f"size {size!r} is no whole number; give a kernel and stride of whole pixels")
    return int(number)


def _act(name: str | None) -> str:
    name = name or "none"
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} of the block list is not known; choose from {', '.join(ACTIVATIONS)}")
    return name


# -- tables of blocks --------------------------------------------------------------------------------------------------


def _table_units(net: Config) -> Named:
    head = net["head"]
    cin, classes, *bias = head["classifier"]
    if bias and not bias[0]:
        raise UserError("the block list's classifier has no bias; those with one are supported")
    mix, final = head.get("feature_mix_layer"), head.get("final_expand_layer")
    named: Named = [("first_conv", _table_conv(*head["first_conv"]))]
    named += _each("blocks", net["blocks"], lambda block: _table_block(*block))
    linear = ("classifier", Unit("linear", cin, classes))
    if final:  # MobileNetV3 mixes after the pool, without batch norm
        named += [("final_expand_layer", _table_conv(*final)), (None, _pool(final[1]))]
        return [*named, ("feature_mix_layer", _table_conv(mix[0], mix[1], mix[2], 1, mix[4], bn=False)), linear]
    named += [("feature_mix_layer", _table_conv(*mix))] if mix else []
    return [*named, (None, _pool(cin)), linear]


def _table_conv(cin: int, cout: int, kernel: int, stride: int, act: str, *, bn: bool = True) -> Unit:
    return Unit("conv", cin, cout, kernel, stride, act=_act(act), bn=bn)


def _table_block(
    cin: int, cout: int, kernel: int, stride: int, expand: float, mid: int, se: int, act: str, shortcut: int
) -> Unit:
    if se not in (0, 1):
        raise UserError(
            f"squeeze-excite {se!r} of a block is neither 0 nor 1; a quarter of the middle channels is known"
        )
    reduced = int(make_divisible(mid // 4)) if se else 0
    return Unit("mbconv", cin, cout, kernel, stride, mid, reduced, _act(act), expand != 1, bool(shortcut))

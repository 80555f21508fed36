"""Block lists and checkpoints that others published, and the errors for those that are none."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ofa.checkpoint import import_supernet, read_checkpoint
from ofa.compress.prune import Pruning, prune
from ofa.compress.quantize import Quantization, quantize
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.onnx import export, verify
from ofa.finetune import Finetuning, finetune
from ofa.layers import ElasticDepthwise
from ofa.liveness import peak_elements
from ofa.published import arch_of, load_network, read_network
from ofa.space import Arch, load_space
from ofa.spec import Unit
from ofa.supernet import Supernet
from predictors.spec import spec_costs
from tests.ofa.nets import small

NET = "weights/proxyless-w0.25-r112_imagenet"


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "in_channels": cin,
        "out_channels": cout,
        "kernel_size": kernel,
        "stride": stride,
    } | more


def block(cin: int, cout: int, stride: int = 1, **more: Any) -> dict[str, Any]:
    layer = {"name": "MBConvLayer", "in_channels": cin, "out_channels": cout, "kernel_size": 5, "stride": stride}
    return {
        "name": "ResidualBlock",
        "conv": layer | {"expand_ratio": 4, "act_func": "h_swish"} | more,
        "shortcut": None,
    }


IDENTITY = {"name": "IdentityLayer"}
MBV3 = {
    "name": "MobileNetV3",
    "bn": {"momentum": 0.1, "eps": 1e-4},
    "image_size": 16,
    "first_conv": conv(1, 16, act_func="h_swish"),
    "blocks": [
        block(16, 16, expand_ratio=1, act_func="relu"),
        {"name": "ResidualBlock", "conv": {"name": "ZeroLayer"}, "shortcut": IDENTITY},
        block(16, 24, stride=2, use_se=True),
        block(24, 24, mid_channels=72) | {"shortcut": IDENTITY},
    ],
    "final_expand_layer": conv(24, 64, 1, act_func="h_swish"),
    "feature_mix_layer": conv(64, 48, 1, act_func="h_swish", use_bn=False),
    "classifier": {"name": "LinearLayer", "in_features": 48, "out_features": 10},
}
UNITS = (
    Unit("conv", 1, 16, 3, 1, act="h_swish"),
    Unit("mbconv", 16, 16, 5, 1, 16, 0, "relu"),
    Unit("mbconv", 16, 24, 5, 2, 64, 16, "h_swish", expand=True),
    Unit("mbconv", 24, 24, 5, 1, 72, 0, "h_swish", expand=True, shortcut=True),
    Unit("conv", 24, 64, act="h_swish"),
    Unit("pool", 64, 64),
    Unit("conv", 64, 48, act="h_swish", bn=False),
    Unit("linear", 48, 10),
)


def test_a_block_list_is_read_as_it_is_meant() -> None:
    spec, names = read_network(MBV3)
    assert spec.units == UNITS
    assert (spec.resolution, spec.in_channels, spec.classes, spec.bn_eps) == (16, 1, 10, 1e-4)
    assert names[2] == "blocks.2"  # block 1 is left out, and keeps its number
    net = load_network(MBV3)
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    assert net.units[0].bn.eps == 1e-4


def test_a_stem_block_without_a_shortcut_adds_nothing() -> None:
    stem = {"name": "ResidualBlock", "conv": conv(16, 16), "shortcut": IDENTITY}
    bottleneck = {"in_channels": 16, "out_channels": 32, "expand_ratio": 0.25}
    rest = {"image_size": 16, "blocks": [bottleneck], "classifier": {"in_features": 32, "out_features": 10}}
    for shortcut, adds in ((IDENTITY, True), (None, False), ({"name": "ZeroLayer"}, False)):
        spec, _ = read_network(rest | {"input_stem": [conv(1, 16), stem | {"shortcut": shortcut}]})
        assert spec.units[1].shortcut == adds


def test_the_image_size_may_stand_in_the_file_beside(tmp_path: Path) -> None:
    (tmp_path / "net.config").write_text(json.dumps({k: v for k, v in MBV3.items() if k != "image_size"}))
    with pytest.raises(UserError, match="give resolution=<pixels>"):
        read_network(tmp_path / "net.config")
    assert read_network(tmp_path / "net.config", resolution=12)[0].resolution == 12
    (tmp_path / "run.config").write_text('{"n_epochs": 3}')
    with pytest.raises(UserError, match="give resolution=<pixels>"):
        read_network(tmp_path / "net.config")
    (tmp_path / "run.config").write_text("[20]")
    with pytest.raises(UserError, match=r"run\.config holds a list and no fields; give a net.config"):
        read_network(tmp_path / "net.config")
    (tmp_path / "run.config").write_text('{"image_size": 20}')
    assert read_network(tmp_path / "net.config")[0].resolution == 20


def test_a_published_network_is_trained_compressed_and_exported_like_ones_own(tmp_path: Path) -> None:
    data, net = digits(), load_network(MBV3)
    tuned = finetune(prune(net, Pruning(0.7)), data, Finetuning(epochs=1, lr=0.1), teacher=net)
    images = next(data.batches("test", 64, 16, rng=None))[0]
    export(tuned, tmp_path / "float.onnx")
    assert verify(tmp_path / "float.onnx", tuned, images).max_relative < 1e-4
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", [images], Quantization())
    assert verify(tmp_path / "int8.onnx", tuned, images).sqnr_db > 10
    costs = spec_costs(tuned.spec, model="liveness")
    assert costs["peak_memory_bytes"] == 4 * peak_elements(tuned, images[:1])
    assert costs["macs"] < spec_costs(net.spec)["macs"]
    assert spec_costs(net.spec)["params"] == sum(p.numel() for p in net.parameters())


def test_the_published_weights_load_with_every_key_used(data_folder: Path) -> None:
    config, weights = data_folder / f"{NET}.json", data_folder / f"{NET}.pth"
    net = load_network(config, weights)
    state, _ = read_checkpoint(weights)
    assert len(state) == len(net.state_dict())
    assert torch.equal(net.units[-1].weight, state["classifier.linear.weight"])
    assert sum(t.double().sum().item() for t in state.values()) == pytest.approx(
        sum(t.double().sum().item() for t in net.state_dict().values())
    )
    other = load_network(config, weights, classes=3)
    assert other(torch.zeros(1, 3, 112, 112)).shape == (1, other.spec.classes) == (1, 3)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in list(other.state_dict().items())[:-2])
    entry = next(n for n in _table(data_folder, "mcunet") if n["name"] in NET)
    assert read_network(entry)[0] == net.spec, "the table of blocks is the same network"
    logits = net(torch.randn(8, 3, 112, 112))
    assert (logits - logits.mean(0)).abs().max() > 0.5, "logits follow the image"
    with pytest.raises(UserError, match=r"missing first_conv.conv.weight, unknown none"):
        load_network(config, {k: v for k, v in state.items() if k != "first_conv.conv.weight"})
    with pytest.raises(UserError, match=r"'blocks.99.conv.weight', which this network has no place for"):
        load_network(config, state | {"blocks.99.conv.weight": torch.zeros(1)})


def _table(folder: Path, source: str) -> list[dict[str, Any]]:
    return json.loads((folder / "tables/published_subnets.json").read_text())[source]["nets"]  # type: ignore[no-any-return]


def _with(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    config: Any = copy.deepcopy(MBV3)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_with(("blocks", 2, "conv", "act_func"), "swish"), "activation 'swish' .*choose from none, relu, relu6"),
        (_with(("blocks", 2, "conv", "kernel_size"), 4), "kernel 4 is even"),
        (_with(("blocks", 2, "conv", "groups"), 4), "groups 4 of a block are not supported"),
        (_with(("first_conv", "dilation"), 2), "dilation"),
        (_with(("blocks", 2, "conv", "dilation"), 2), "dilation=2; only dilation=1"),
        (_with(("blocks", 2, "conv", "name"), "GhostLayer"), "a block of GhostLayer is not known; MBConvLayer and"),
        (
            _with(("blocks",), [{"name": "ResidualBlock", "conv": {"name": "MBConvLayer"}}]),
            r"blocks.0 of the block list is not understood \(it lacks 'in_channels'\)",
        ),
        ({"image_size": 16}, "not a block list .*first_conv"),
        (_with(("blocks",), [None]), "blocks.0 of the block list is not understood .*'NoneType'"),
        (_with(("first_conv", "groups"), 2), "^ConvLayer has groups=2; only groups=1 is supported here"),
        (_with(("first_conv", "use_se"), True), "ConvLayer has use_se=True; only use_se=False"),
        (_with(("first_conv", "ops_order"), "bn_act_weight"), "only ops_order='weight_bn_act'"),
        (_with(("first_conv", "kernel_size"), [3, 5]), r"size \[3, 5\] differs between height and width"),
        (_with(("first_conv", "stride"), (2, 1)), r"size \(2, 1\) differs"),
        (_with(("blocks", 3, "shortcut"), conv(24, 24, 1)), "name='ConvLayer'; only name='IdentityLayer'"),
        (_with(("blocks", 3, "shortcut"), IDENTITY | {"use_bn": True}), "only use_bn=False"),
        (_with(("blocks", 3, "shortcut"), IDENTITY | {"act_func": "relu"}), "only act_func=None"),
        (_with(("classifier", "bias"), False), "LinearLayer has bias=False; only bias=True"),
        (_with(("classifier", "use_bn"), True), "only use_bn=False"),
        (_with(("bn", "ws_eps"), 1e-5), "bn has ws_eps=1e-05; only ws_eps=None"),
        (_with(("bn", "gn_channel_per_group"), 8), "only gn_channel_per_group=None"),
        (_with(("bn",), "none"), "not a block list"),
        (_with(("image_size",), [16, 20]), r"image size \[16, 20\]; give resolution=<pixels>, one whole number"),
        (_with(("image_size",), 16.5), "image size 16.5; give resolution"),
        (_with(("image_size",), 0), "image size 0; give resolution"),
        (_with(("first_conv", "stride"), 1.5), "size 1.5 is no whole number"),
        (_with(("bn",), {"eps": 0}), r"batch norm has eps=0.0; give a number between 0 and 1"),
        (_with(("blocks", 2, "conv", "in_channels"), 20), "blocks.2 reads 20 channels, but gets 16"),
        (_with(("blocks", 2, "conv", "out_channels"), -24), "blocks.2 has -24 channels of 16, .*; give whole"),
        (_with(("blocks", 2, "conv", "out_channels"), 24.5), "blocks.2 has 24.5 channels of 16, .*; give whole"),
        (_with(("blocks", 2, "conv", "mid_channels"), 16.5), "blocks.2 has .*, 16.5 in the middle, .*; give whole"),
        (_with(("blocks", 2, "conv", "mid_channels"), -16), "blocks.2 has .*, -16 in the middle, .*; give whole"),
        (_with(("blocks", 2, "conv", "kernel_size"), None), "blocks.2: size None is no whole number; give a kernel"),
        (_with(("blocks", 2, "conv", "kernel_size"), "3"), "blocks.2: size '3' is no whole number; give a kernel"),
        (_with(("blocks", 2, "conv", "no_dw"), True), "blocks.2: .* has no_dw=True; only no_dw=False is supported"),
        (_with(("bn",), {"eps": float("inf")}), "eps=inf; give a number between 0 and 1"),
        (_with(("bn",), {"eps": "small"}), "not a block list .*'small'"),
        (_with(("blocks", 2, "conv", "stride"), 0), "blocks.2: size 0 is no whole number; give"),
        (_with(("blocks", 0, "conv", "mid_channels"), 32), "blocks.0 has 32 middle channels, but no expansion"),
        (_with(("blocks", 2, "shortcut"), IDENTITY), "blocks.2 adds its input to another shape"),
        (_with(("classifier", "in_features"), 50), "classifier reads 50 channels, but gets 48"),
    ],
)
def test_a_wrong_block_list_is_explained(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_network(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([MBV3["blocks"]], "a list is no block list with its head; give a net.config"),
        (None, "a NoneType is no block list"),
        ("", r"\. cannot be read \(Is a directory\); give the path of a JSON file"),
        (json.dumps(MBV3) * 9, "cannot be read .File name too long"),
    ],
)
def test_what_is_neither_a_block_list_nor_its_file_is_explained(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_network(config)


def test_a_block_list_may_leave_what_batch_norm_adds_open() -> None:
    assert read_network(_with(("bn",), {"eps": None}))[0] == read_network(_with(("bn",), None))[0]


# -- supernets ---------------------------------------------------------------------------------------------------------


FAMILIES = ("ofa_mbv3_w1.0", "ofa_proxyless_w1.3", "ofa_resnet50", "mcunet")


def theirs(supernet: Supernet, *, old: bool) -> dict[str, Tensor]:
    """The weights under once-for-all's names, written a second time and the other way round."""
    bottleneck = any(hasattr(unit, "conv3") for unit in supernet.units)
    found, counts = {}, {"input_stem": -1, "blocks": -1}
    after_pool = False
    last = max(i for i, unit in enumerate(supernet.units) if hasattr(unit, "project") or hasattr(unit, "conv3"))
    mixes = sum(hasattr(unit, "conv") for unit in list(supernet.units)[last:])
    for i, unit in enumerate(supernet.units):
        after_pool |= isinstance(unit, torch.nn.AdaptiveAvgPool2d)
        block = hasattr(unit, "project") or hasattr(unit, "conv3")
        if hasattr(unit, "linear"):
            place = "classifier"
        elif bottleneck and hasattr(unit, "conv"):
            place = "input_stem.{}"
        elif i == 0:
            place = "first_conv"
        elif block or i < last:
            place = "blocks.{}"
        else:
            place = "final_expand_layer" if mixes == 2 and not after_pool else "feature_mix_layer"
        if "{}" in place and dict(unit.named_parameters()):
            counts[place[:-3]] += 1
            place = place.format(counts[place[:-3]])
        for key, tensor in unit.state_dict().items():
            found[f"{place}.{_their_layer(place, key, old=old, bottleneck=bottleneck)}"] = tensor
        for norm in {key.rpartition(".")[0] for key in unit.state_dict() if "running_mean" in key}:
            key = _their_layer(place, f"{norm}.num_batches_tracked", old=old, bottleneck=bottleneck)
            found[f"{place}.{key}"] = torch.tensor(7)
    return found


def _their_layer(place: str, key: str, *, old: bool, bottleneck: bool) -> str:
    for mine, name in (
        ("expand.", "inverted_bottleneck."),
        ("depthwise.", "depth_conv."),
        ("project.", "point_linear."),
    ):
        key = name + key.removeprefix(mine) if key.startswith(mine) else key
    key = key.replace("depth_conv.weight", "depth_conv.conv.conv.weight").replace("se.", "depth_conv.se.fc.")
    for mine, name in (("transforms.3", "conv.5to3_matrix"), ("transforms.5", "conv.7to5_matrix")):
        key = key.replace(mine, name)
    key = key.replace("bn.", "bn.bn.")
    key = key.replace("conv.weight", "conv.conv.weight") if "conv.conv" not in key else key
    if place == "input_stem.1":
        return f"conv.{key}"
    if place.startswith("blocks") and not bottleneck:
        key = f"point_linear.{key}" if key.startswith(("conv.", "bn.")) else key
        return f"{'mobile_inverted_conv' if old else 'conv'}.{key}"
    return key.replace("linear.", "linear.linear.") if place == "classifier" and not old else key


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_in_their_names_gives_the_same_supernet(name: str, old: bool, tmp_path: Path) -> None:
    supernet = Supernet(small(name))
    for module in supernet.modules():
        if isinstance(module, ElasticDepthwise):
            for transform in module.transforms.values():
                torch.nn.init.normal_(transform)
    torch.save({"state_dict": theirs(supernet, old=old)}, tmp_path / "net.pth")
    found, digest = import_supernet(supernet.space, tmp_path / "net.pth")
    assert len(digest) == 64
    for key, tensor in supernet.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    assert {m.eps for m in found.modules() if hasattr(m, "running_var")} == {supernet.space.bn_eps}


def test_a_file_that_is_no_checkpoint_of_the_space_is_explained(tmp_path: Path) -> None:
    space, file = small("ofa_mbv3_w1.0"), tmp_path / "net.pth"
    state = theirs(Supernet(space), old=False)
    torch.save({"state_dict": state}, file)
    with pytest.raises(UserError, match=r"read as space small, does not fit.*other shape"):
        import_supernet(replace(space, classes=7), file)
    with pytest.raises(UserError, match=r"space small, has 'first_conv.*no place for.*give weights of the same"):
        import_supernet(small("ofa_resnet50"), file)
    torch.save(state | {"module.classifier.linear.bias": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"'module.classifier.linear.bias' a second time under another name"):
        import_supernet(space, file)
    with pytest.raises(UserError, match=r"SHA-256 .*, not abc; fetch it again"):
        import_supernet(space, file, sha256="abc")
    with pytest.raises(UserError, match="have no such space; give one of MBConv blocks or bottlenecks"):
        import_supernet(load_space("cifar_conv"), file)
    state.pop("classifier.linear.linear.bias")
    torch.save(state, file)
    with pytest.raises(UserError, match=r"missing classifier\.linear\.bias, unknown none, other shape none"):
        import_supernet(space, file)
    torch.save({"state_dict": Path}, file)
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        import_supernet(space, file)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="holds no state_dict"):
        import_supernet(space, file)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        import_supernet(space, file)
    with pytest.raises(UserError, match="does not exist"):
        import_supernet(space, tmp_path / "none.pth")


@pytest.mark.parametrize("around", [("model",), ("state_dict", "state_dict"), ("state_dict", "model")])
def test_a_state_dict_is_found_in_what_lies_around_it(around: tuple[str, ...], tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(2)}
    for key in around:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "net.pth")
    assert list(read_checkpoint(tmp_path / "net.pth")[0]) == ["a"]


@pytest.mark.parametrize("weights", [{"first_conv.conv.weight": np.ones(1)}, {"first_conv.conv.weight": None}, [1]])
def test_weights_that_are_no_state_dict_are_explained(weights: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"what is given as weights holds no state_dict.*; give the file that torch.save wrote of net.state_dict",
    ):
        load_network(MBV3, weights)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("blocks.1.conv", "unknown blocks.1.conv"),
        ("blocks.1.mobile_inverted_conv", "'blocks.1.mobile_inverted_conv', which this network has no place for"),
        ("classifier.fc", "'classifier.fc', which this network has no place for"),
        (0, "has 0, which this network has no place for"),
    ],
)
def test_a_name_that_ends_too_early_is_explained(key: Any, words: str, tmp_path: Path) -> None:
    supernet = Supernet(small("ofa_mbv3_w1.0"))
    torch.save(theirs(supernet, old=False) | {key: torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=words):
        import_supernet(supernet.space, tmp_path / "net.pth")


def test_a_checkpoint_behind_a_url_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "net.pth")
    url = (tmp_path / "net.pth").as_uri()
    first = read_checkpoint(url)
    (tmp_path / "net.pth").unlink()
    assert read_checkpoint(url)[1] == first[1]
    with pytest.raises(UserError, match=r"other.pth cannot be fetched"):
        read_checkpoint((tmp_path / "other.pth").as_uri())
    with pytest.raises(UserError, match=r"net.pth has the SHA-256 .*; delete it to fetch it again, or correct sha256"):
        read_checkpoint(url, sha256="abc")


def test_a_download_that_breaks_off_is_explained_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Half) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match=r"net.pth cannot be fetched \(IncompleteRead.*download it yourself"):
            read_checkpoint(f"http://127.0.0.1:{server.server_port}/net.pth")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_their_settings_become_architectures() -> None:
    space = load_space("ofa_resnet50")
    config = {"d": [1, 0, 1, 2, 0], "e": [0.2, 0.25, 0.35] * 6, "w": [0, 1, 2, 0, 1, 2], "image_size": 128}
    arch = arch_of(space, config)
    assert arch.width == (0.65, 0.8, 1.0, 0.65, 0.8, 1.0)
    assert arch.resolution == 128
    genes = space.encode([arch])
    assert space.decode(genes)[0].depth == (0, 0, 1, 2, 0), "their stem skips its block at depth 1 as at 0"
    mcunet = load_space("mcunet")
    full = {"d": [0, 1, 2, 0, 1, 1], "ks": [3] * 20, "e": [4] * 20, "wid": 1, "image_size": 96}
    assert arch_of(mcunet, full).width == (0.75,)
    np.testing.assert_array_equal(mcunet.depths(mcunet.encode([arch_of(mcunet, full)]))[0], [1, 3, 4, 2, 3, 1])
    with pytest.raises(UserError, match=r"setting .*'k'.* not known; choose from"):
        arch_of(space, {"k": 3})


def test_lists_of_once_for_all_as_it_draws_them_are_taken() -> None:
    """What `sample_active_subnet` gives: a depth of every stage, in ResNet also of its stem."""
    proxyless, resnet, mcunet = map(load_space, ("ofa_proxyless_w1.3", "ofa_resnet50", "mcunet"))
    genes = proxyless.encode([Arch(224, (4, 4, 3, 2, 3, 1), (3,) * 21, (6,) * 21)])
    assert proxyless.decode(genes) == [Arch(224, (4, 4, 3, 2, 3), (3,) * 17, (6,) * 17)]
    genes = resnet.encode([Arch(224, (1, 1, 0, 2, 0), expand=(0.2,) * 18)])
    assert resnet.decode(genes)[0].depth == (0, 1, 0, 2, 0)
    kept = mcunet.depths(mcunet.encode([Arch(160, (0, 1, 2, 0, 1, 1), (3,) * 20, (6,) * 20)]))
    np.testing.assert_array_equal(kept, [[1, 3, 4, 2, 3, 1]])


MBV3_SETTING: dict[str, Any] = {"d": [2, 3, 4, 2, 3], "ks": [3, 5, 7, 3] * 5, "e": [3, 4, 6, 6] * 5, "r": 160}


@pytest.mark.parametrize(
    "change",
    [
        {"ks": np.array(MBV3_SETTING["ks"]), "e": np.array(MBV3_SETTING["e"]), "d": np.array(MBV3_SETTING["d"])},
        {"d": tuple(map(np.int64, MBV3_SETTING["d"])), "r": np.array([160])},
        {"r": (160.0,), "wid": None, "w": None},
        {"w": np.float32(1)},
    ],
)
def test_numbers_of_any_library_are_the_same_setting(change: dict[str, Any]) -> None:
    space = load_space("ofa_mbv3_w1.0")
    expected = space.encode([arch_of(space, MBV3_SETTING)])
    assert np.array_equal(space.encode([arch_of(space, MBV3_SETTING | change)]), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": "224"}, "setting r='224' is not understood; give a number or a list of numbers"),
        ({"r": []}, r"setting r=\[\] is not understood"),
        ({"r": 160.5}, "resolution 160.5 .* is not in space"),
        ({"d": [[2, 2, 2, 2, 2]]}, r"setting d=\[\[2, .* is not understood"),
        ({"w": float("nan")}, "setting w=nan is not understood"),
        ({"d": 9}, "depth 9 .* choose from"),
        ({"d": [2] * 7}, "depth .* has 7 entries; ofa_mbv3_w1.0 has 5"),
        ({"d": None}, "depth .* has 0 entries; ofa_mbv3_w1.0 has 5"),
    ],
)
def test_a_setting_that_is_not_of_the_space_is_explained(change: dict[str, Any], words: str) -> None:
    space = load_space("ofa_mbv3_w1.0")
    with pytest.raises(UserError, match=words):
        space.encode([arch_of(space, MBV3_SETTING | change)])


def test_a_depth_of_another_network_is_not_taken_for_a_smaller_one() -> None:
    space = load_space("ofa_mbv3_w1.0").restrict(depth=[2, 4])
    with pytest.raises(UserError, match=r"depth 3 .* choose from"):
        space.encode([arch_of(space, MBV3_SETTING)])


def test_depths_of_all_stages_go_to_those_that_choose_theirs() -> None:
    space = load_space("digits_mbv3")
    space = replace(space, stages=(replace(space.stages[0], depth=2, blocks=()), *space.stages[1:]))
    for depths in ([2, 1, 2], [1, 2]):
        genes = space.encode([arch_of(space, {"d": depths, "ks": 3, "e": 3})])
        assert space.decode(genes)[0].depth == (1, 2)


def test_a_card_is_no_block_list() -> None:
    with pytest.raises(UserError, match=r"this is a card, .*; give it to ofa\.export\.card\.rebuild"):
        load_network({"arch": {}, "spec": {}, "metrics": {}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_conv": {"use_bias": True}}, "has use_bias=True; only use_bias=False is supported here"),
        ({"bn": {"name": "gn"}}, "gn has name='gn'; only name='bn' is supported here"),
    ],
)
def test_fields_that_would_make_another_network_are_refused(change: dict[str, Any], words: str) -> None:
    config = copy.deepcopy(MBV3)
    for name, fields in change.items():
        config[name] = config.get(name, {}) | fields
    with pytest.raises(UserError, match=words):
        read_network(config)


def test_entries_of_a_table_that_would_make_another_network_are_refused(data_folder: Path) -> None:
    net = _table(data_folder, "mcunet")[0]
    without = net | {"head": net["head"] | {"classifier": [*net["head"]["classifier"][:2], 0]}}
    with pytest.raises(UserError, match="classifier has no bias"):
        read_network(without)
    block = list(net["blocks"][1])
    block[6] = 16
    with pytest.raises(UserError, match="squeeze-excite 16 of a block is neither 0 nor 1"):
        read_network(net | {"blocks": [net["blocks"][0], block, *net["blocks"][2:]]})

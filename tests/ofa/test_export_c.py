"""Exported C against the numpy reference, bit for bit, and what its objects take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from ofa.data import digits
from ofa.data.images import resize
from ofa.errors import UserError
from ofa.export.c import Pixels, export_c
from ofa.export.c.build import ARM, SANITIZERS, compile_c, has_compiler, measure, run_c
from ofa.export.runtime import run as run_runtime
from ofa.export.runtimes.c import PlainC
from ofa.files import read_json
from ofa.integer.convert import from_net
from ofa.integer.net import Conv, Int8, IntegerNet
from ofa.integer.plan import plan
from ofa.integer.run import quantize_images, run, run_float
from ofa.published import read_network
from ofa.space import load_space
from ofa.spec import NetSpec, Unit
from ofa.static import build, build_spec
from predictors.spec import spec_costs
from tests.ofa.nets import RESNET, SPEC, random_net

pytestmark = pytest.mark.skipif(not has_compiler("gcc"), reason="there is no gcc")
SPECS = {"mbconv": SPEC, "bottleneck": RESNET}


@pytest.fixture(scope="module", params=SPECS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[IntegerNet, Path, Int8, Int8]:
    """A network, its C, 1,000 real images and its logits of them."""
    images = torch.cat([images for images, _ in digits().batches("train", 250, 16, rng=None, limit=1000)])
    net = from_net(random_net(SPECS[request.param]), images.split(250))
    folder = tmp_path_factory.mktemp(request.param)
    export_c(net, folder)
    q = quantize_images(net, images.numpy())
    assert len(q) == 1000
    return net, folder, q, run(net, q)


@pytest.mark.parametrize("flags", [("-O2",), ("-O1", *SANITIZERS)], ids=["optimized", "sanitized"])
def test_c_gives_the_references_bits(exported: tuple[IntegerNet, Path, Int8, Int8], flags: tuple[str, ...]) -> None:
    _, folder, images, want = exported
    n = len(images) if "-O2" in flags else 50
    got = run_c(compile_c(folder, flags=flags), images[:n], want.shape[1])
    assert np.array_equal(got, want[:n]) and len(np.unique(got)) > 50


def test_another_weight_gives_other_bits(exported: tuple[IntegerNet, Path, Int8, Int8], tmp_path: Path) -> None:
    net, _, images, want = exported
    last = next(op for op in reversed(net.ops) if isinstance(op, Conv))
    changed = replace(last, weight=last.weight + (last.weight == 127 * -1).astype(np.int8))
    assert (changed.weight != last.weight).sum() < 20
    other = replace(net, ops=tuple(changed if op is last else op for op in net.ops))
    export_c(other, tmp_path)
    got = run_c(compile_c(tmp_path), images[:100], want.shape[1])
    assert np.array_equal(got, run(other, images[:100])) and not np.array_equal(got, want[:100])


def test_the_makefile_builds_the_example(exported: tuple[IntegerNet, Path, Int8, Int8]) -> None:
    if not shutil.which("make"):
        pytest.skip("there is no make")
    _, folder, images, want = exported
    subprocess.run(["make", "-s", "-C", str(folder), "clean", "main"], check=True, capture_output=True)
    assert np.array_equal(run_c(folder / "main", images[:20], want.shape[1]), want[:20])


def test_a_map_is_written_over_in_place_whatever_kernel_and_stride(tmp_path: Path) -> None:
    """Depthwise convolutions over their own input, of odd sides, the last kernels larger than the map."""

    def block(cin: int, kernel: int, stride: int) -> Unit:
        return Unit("mbconv", cin, 8, kernel, stride, 24, 8, "h_swish", expand=True, shortcut=stride == 1)

    blocks = (block(8, 3, 2), block(8, 5, 1), block(8, 7, 2), block(8, 7, 1))
    ends = Unit("conv", 3, 8, 3, 1, act="relu6"), Unit("pool", 8, 8), Unit("linear", 8, 10)
    images = torch.randn(50, 3, 11, 11)
    net = from_net(random_net(NetSpec((ends[0], *blocks, *ends[1:]), 11, 3, 10)), [images])
    export_c(net, tmp_path)
    q = quantize_images(net, images.numpy())
    assert np.array_equal(run_c(compile_c(tmp_path, flags=SANITIZERS), q, 10), run(net, q))


@pytest.mark.skipif(not has_compiler(ARM), reason=f"there is no {ARM}")
def test_flash_and_sram_of_a_cortex_m7(exported: tuple[IntegerNet, Path, Int8, Int8]) -> None:
    net, folder, *_ = exported
    sizes = measure(folder)
    assert sizes.data == 0, "nothing but the arena is written"
    assert net.weight_bytes <= sizes.text < net.weight_bytes + 8000
    assert sizes.bss == export_c(net, folder).arena_bytes
    assert sizes.sram_bytes - sizes.bss == sizes.stack < 1000
    assert sizes.flash_bytes == sizes.text


@pytest.mark.skipif(not has_compiler(ARM), reason=f"there is no {ARM}")
def test_every_device_that_runs_c_names_a_core_that_is_compiled_for(
    exported: tuple[IntegerNet, Path, Int8, Int8],
) -> None:
    folder, seen = exported[1], {}
    for entry in (files("conf") / "device").iterdir():
        board = yaml.safe_load(entry.read_text())
        if "c" in board.get("runtimes", []):
            seen[board["name"]] = measure(folder, core=board["core"])
    assert {"STM32L073", "STM32F746", "STM32H743"} <= set(seen)
    small, large = seen["STM32L073"], seen["STM32F746"]
    assert small.bss == large.bss and small.text != large.text
    with pytest.raises(UserError, match="core 'cortex-q9' is not one that arm-none-eabi-gcc builds for"):
        measure(folder, core="cortex-q9")


def test_as_a_runtime_it_gives_the_references_logits(tmp_path: Path) -> None:
    images = torch.cat([images for images, _ in digits().batches("test", 50, 16, rng=None, limit=100)])
    net, file, runtime = random_net(), tmp_path / f"net{PlainC().suffix}", PlainC()
    runtime.export(net, file, images)
    want = run_float(from_net(net, images.split(64)), images.numpy())
    assert np.array_equal(run_runtime(runtime, file, images, batch=30), want)
    assert runtime.describe(file)["arena_bytes"] == plan(from_net(net, images.split(64))).arena
    content = file.read_bytes()
    for damaged in (b"", content[:-1], content[:5000], b"no library" * 10):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="export it again"):
            runtime.load(file)
    with pytest.raises(UserError, match="threads 0 must be at least 1"):
        runtime.load(file, 0)


@pytest.mark.parametrize("name", ["digits_mbv3", "mcunet", "cifar_pool"])
def test_the_arena_is_what_the_inplace_model_predicts(name: str) -> None:
    space = load_space(name)
    for arch in space.decode(space.sample(2, np.random.default_rng(0))):
        net = build(space, arch).eval()
        side = net.spec.resolution
        found = plan(from_net(net, [torch.randn(1, net.spec.in_channels, side, side)]))
        predicted = spec_costs(net.spec, bits=8, model="inplace")["peak_memory_bytes"]
        assert found.arena == found.bound and abs(found.arena / predicted - 1) < 0.01


def test_the_published_networks_fit_where_tinyengine_puts_them(data_folder: Path, tmp_path: Path) -> None:
    """The smallest of MCUNet's: the plan meets its bound, the model that predicts it, and TinyEngine's figure."""
    nets = read_json(data_folder / "tables/published_subnets.json")["mcunet"]["nets"]
    entry = next(net for net in nets if net["name"] == "mcunet-10fps_imagenet")
    spec, _ = read_network(entry)
    image = torch.randn(2, 3, spec.resolution, spec.resolution)
    report = export_c(from_net(build_spec(spec).eval(), [image]), tmp_path)
    assert report.arena_bytes == report.bound_bytes == spec_costs(spec, bits=8, model="inplace")["peak_memory_bytes"]
    assert report.arena_bytes <= 1024 * entry["published"]["tinyengine"]["sram_kB"]
    assert report.weight_bytes <= 1024 * entry["published"]["tinyengine"]["flash_kB"]


def test_the_header_says_how_bytes_become_what_the_network_takes(tmp_path: Path) -> None:
    """From the header alone: the bytes of real images, as a board has them, give the numbers of the reference."""
    data = digits()
    net = from_net(random_net(), list(data.calibration("val", 64, 16)))
    export_c(net, tmp_path, pixels=Pixels(data.mean, data.std))
    text = (tmp_path / "net.h").read_text()
    mean, std = (float(re.search(rf"#define NET_{name} {{(.*)f}}", text)[1]) for name in ("MEAN", "STD"))  # type: ignore[index]
    scale = float(re.search(r"INPUT_SCALE (.*)f ", text)[1])  # type: ignore[index]
    zero = int(re.search(r"INPUT_ZERO \((.*)\)", text)[1])  # type: ignore[index]
    stored = resize(data.test.images[:100], 16).numpy()
    own = np.clip(np.rint((stored / 255 - mean) / std / scale + zero), -128, 127).astype(np.int8)
    want = quantize_images(net, next(data.batches("test", len(data.test), 16, rng=None))[0][:100].numpy())
    assert np.mean(own.transpose(0, 2, 3, 1) == want) > 0.999 and np.abs(own.transpose(0, 2, 3, 1) - want).max() <= 1
    compile_c(tmp_path)
    export_c(net, tmp_path)
    assert "which the network's card has" in (tmp_path / "net.h").read_text()


def test_a_compiler_without_the_librarys_headers_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ARM
    program.write_text("#!/bin/sh\ngrep -q string.h && exit 1\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not has_compiler(ARM)
    program.write_text("#!/bin/sh\nexit 0\n")
    assert has_compiler(ARM)


def test_mistakes_are_explained(tmp_path: Path) -> None:
    net = from_net(nn.Sequential(nn.Conv2d(1, 2, 1)).eval(), [torch.rand(2, 1, 3, 3)])
    export_c(net, tmp_path)
    with pytest.raises(UserError, match=r"there is no no-such-gcc on this machine; install it"):
        compile_c(tmp_path, compiler="no-such-gcc")
    with pytest.raises(UserError, match="would end the comment"):
        export_c(net, tmp_path, name="*/ int x;")
    with pytest.raises(RuntimeError, match="failed"):
        run_c(compile_c(tmp_path), np.zeros((3, 3, 3, 1), np.int8), 7)
    (tmp_path / "net.c").write_text("broken")
    with pytest.raises(RuntimeError, match=r"net\.c.* failed"):
        compile_c(tmp_path)

"""The integer-only reference on 1,000 real images, beside LiteRT's three sets of kernels and TensorFlow Lite Micro.

    pip install "ofa-nas[tflite]"
    python scripts/benchmarks/integer_reference.py [--images 1000] [--nets digits proxyless] [--card <card>]

digits: a small MobileNetV3-like net (squeeze-excite, hard-swish), trained here for `--epochs` epochs, on scikit-learn's
digits.  proxyless: MCUNet's published ImageNet weights, on CIFAR-10's test images at 112 px (folder of real data,
OFA_DATA).  --card: a trained network of this project instead, on its own test images.  Each goes through LiteRT's
converter and quantizer (per channel, `--ranges` over 128 training images) to one int8 file, which everything runs.
Printed: differences of 8-bit logits, the largest, the share that is not 0 and that above 1, and of the first class;
then how well the file, and the network quantized by `from_net`, follow PyTorch; last the C files of both, built with
-Wall -Wextra -Werror under address and undefined-behaviour sanitizers and run on the same images, and their `.text`,
`.data`, `.bss` on two cores (where arm-none-eabi-gcc is installed).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.data import ImageData, cifar10, digits
from ofa.export.c import export_c
from ofa.export.c.build import SANITIZERS, compile_c, has_compiler, measure, run_c
from ofa.export.card import load_card, rebuild
from ofa.export.onnx import compare, run_torch
from ofa.export.runtimes.litert import CALIBRATIONS, LiteRT
from ofa.export.runtimes.tflm import open_micro
from ofa.files import write_json
from ofa.finetune import Finetuning, finetune
from ofa.integer.convert import from_net
from ofa.integer.net import Int8, IntegerNet
from ofa.integer.run import quantize_images, run, run_float
from ofa.integer.tflite import read_tflite
from ofa.published import load_network
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec
from scripts.benchmarks.about import about
from scripts.benchmarks.runtimes import data_of

DATA = Path(os.environ.get("OFA_DATA", Path(__file__).parents[3] / "shared/data"))
KERNELS = {
    "LiteRT reference": "BUILTIN_REF",
    "LiteRT optimized": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "LiteRT XNNPACK": "BUILTIN",
}
MICRO = "TFLite Micro"
CORES = ("cortex-m7", "cortex-m0plus")
SMALL = (
    Unit("conv", 1, 16, 3, 1, act="h_swish"),
    Unit("mbconv", 16, 16, 3, 1, 16, 0, "relu", expand=False, shortcut=True),
    Unit("mbconv", 16, 24, 5, 2, 64, 16, "relu", expand=True),
    Unit("mbconv", 24, 24, 3, 1, 76, 24, "h_swish", expand=True, shortcut=True),
    Unit("mbconv", 24, 40, 3, 2, 96, 0, "relu6", expand=True),
    Unit("conv", 40, 64, act="h_swish"),
    Unit("pool", 64, 64),
    Unit("linear", 64, 10),
)


def small_net(epochs: int) -> tuple[StaticNet, ImageData]:
    """Trained on digits."""
    data = digits()
    torch.manual_seed(0)
    net = build_spec(NetSpec(SMALL, 16, 1, 10))
    return finetune(net, data, Finetuning(epochs=epochs, lr=0.1), resolution=16).eval(), data


def published_net(epochs: int) -> tuple[StaticNet, ImageData]:
    """With its ImageNet weights."""
    name = f"{DATA}/weights/proxyless-w0.25-r112_imagenet"
    return load_network(f"{name}.json", f"{name}.pth"), cifar10(DATA / "cifar10")


NETS: dict[str, Callable[[int], tuple[StaticNet, ImageData]]] = {"digits": small_net, "proxyless": published_net}


def carded_net(card: Path) -> tuple[StaticNet, ImageData]:
    """A trained network of this project, and what it was trained on."""
    return rebuild(card), data_of(load_card(card))


def images_of(data: ImageData, split: str, resolution: int, n: int) -> torch.Tensor:
    """n normalised images; the test split, and what lacks of another."""
    found: list[torch.Tensor] = []
    for part in (split, "val", "train"):
        left = n - sum(map(len, found))
        if left > 0:
            found += [images for images, _ in data.batches(part, 100, resolution, rng=None, limit=left)]
    return torch.cat(found)[:n]


def run_lite(path: Path, images: Int8, kernels: str) -> Int8:
    """8-bit logits (N, K) of quantized images (N, H, W, C) from LiteRT."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = getattr(OpResolverType, KERNELS[kernels])
    lite = Interpreter(str(path), experimental_op_resolver_type=resolver, num_threads=1)
    lite.allocate_tensors()
    given, made = lite.get_input_details()[0], lite.get_output_details()[0]
    found = []
    for image in images[:, None]:
        lite.set_tensor(given["index"], image)
        lite.invoke()
        found.append(lite.get_tensor(made["index"])[0].copy())
    return np.stack(found)


def run_micro(path: Path, images: Int8) -> Int8:
    """The same from TensorFlow Lite Micro."""
    micro, found = open_micro(path), []
    for image in images[:, None]:
        micro.set_input(image, 0)
        micro.invoke()
        found.append(micro.get_output(0)[0].copy())
    return np.stack(found)


def report(name: str, net: StaticNet, data: ImageData, n: int, ranges: str) -> dict[str, Any]:
    """All comparisons of one network."""
    side = net.spec.resolution
    calibration, images = images_of(data, "train", side, 128), images_of(data, "test", side, n)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tflite"
        LiteRT(8, ranges).export(net, path, calibration)
        integer = read_tflite(path)
        q = quantize_images(integer, images.numpy())
        start = time.perf_counter()
        mine = run(integer, q)
        seconds = time.perf_counter() - start
        logits = {"numpy reference": mine} | {kernels: run_lite(path, q, kernels) for kernels in KERNELS}
        logits[MICRO] = run_micro(path, q)
    pairs = [("numpy reference", other) for other in (*KERNELS, MICRO)]
    pairs += [(a, b) for i, a in enumerate(KERNELS) for b in list(KERNELS)[i + 1 :]]
    found: dict[str, Any] = {"net": name, "ranges": ranges, "n": n, "seconds": seconds}
    found["pairs"] = {f"{a} - {b}": _difference(logits[a], logits[b]) for a, b in pairs}
    reference, own = run_torch(net, images), from_net(net, calibration.split(32))
    y = integer.tensors[integer.output]
    floats = {kernels: (values.astype(np.float32) - y.zero) * np.float32(y.scale) for kernels, values in logits.items()}
    floats["from_net, numpy"] = run_float(own, images.numpy())
    found["parity"] = {kernels: _parity(compare(values, reference)) for kernels, values in floats.items()}
    again = quantize_images(own, images.numpy())
    found["c"] = {"from the .tflite": in_c(integer, q, mine), "from_net": in_c(own, again, run(own, again))}
    return found


def in_c(net: IntegerNet, q: Int8, wanted: Int8) -> dict[str, Any]:
    """Whether sanitized C gives the reference's bits on quantized images, arena and sections by core."""
    with tempfile.TemporaryDirectory() as folder:
        arena = export_c(net, folder).arena_bytes
        given = run_c(compile_c(folder, flags=("-O1", *SANITIZERS)), q, wanted.shape[1])
        sizes = {core: asdict(measure(folder, core=core)) for core in CORES} if has_compiler() else {}
    return {"equal": bool((given == wanted).all()), "n": len(q), "arena": arena, "sizes": sizes}


def _difference(a: Int8, b: Int8) -> dict[str, float]:
    units = np.abs(a.astype(int) - b)
    return {
        "largest": int(units.max()),
        "unequal": float((units > 0).mean()),
        "over_one": float((units > 1).mean()),
        "same_class": float((a.argmax(1) == b.argmax(1)).mean()),
    }


def _parity(parity: Any) -> dict[str, float]:
    return {"sqnr_db": parity.sqnr_db, "agreement": parity.agreement}


def main() -> None:
    """Print one block for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5, help="of the digits net")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--ranges", default="minmax", choices=CALIBRATIONS, help="of LiteRT's quantizer")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument("--card", type=Path, help="card of a trained network, in place of --nets")
    args = parser.parse_args()
    results = []
    for name in ["card"] if args.card else args.nets:
        net, data = carded_net(args.card) if args.card else NETS[name](args.epochs)
        results.append(report(name, net, data, args.images, args.ranges))
        print(f"{name}, {args.images} images, {args.ranges}, reference {results[-1]['seconds']:.1f} s", flush=True)
        for pair, row in results[-1]["pairs"].items():
            print(
                f"  {pair:40} largest {row['largest']:3} unequal {row['unequal']:.4%} over one {row['over_one']:.4%}"
                f" same class {row['same_class']:.2%}"
            )
        for kernels, row in results[-1]["parity"].items():
            print(f"  {kernels:40} against PyTorch {row['sqnr_db']:.2f} dB, same class {row['agreement']:.2%}")
        for source, row in results[-1]["c"].items():
            answer = "equal" if row["equal"] else "DIFFERENT"
            print(f"  C {source:38} {answer} bits on {row['n']} images, sanitized; arena {row['arena']}")
            for core, s in row["sizes"].items():
                print(f"    {core}: .text {s['text']}, .data {s['data']}, .bss {s['bss']}, stack {s['stack']}")
    print(json.dumps(about()))
    if args.out:
        write_json(args.out, {"results": results, "about": about()})


if __name__ == "__main__":
    main()

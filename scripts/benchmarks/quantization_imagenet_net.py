"""A published ImageNet network in int8, simulated, against itself in float: calibration, equalization, bias correction.

    OFA_DATA=../shared/data python scripts/benchmarks/quantization_imagenet_net.py

`weights/proxyless-w0.25-r112_imagenet.pth` (MCUNet's release, 0.57 M parameters, ReLU6) on CIFAR-10 images resized to
112 x 112 pixels: the logits of its 1,000 ImageNet classes, top-1 agreement with float and signal to quantization noise
(SQNR).  Calibrated on training images, measured on test images.  One thread.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.compress.equalize import Equalization, equalize
from ofa.compress.fidelity import agreement, logits, sqnr
from ofa.compress.linear import Linear, quantize_linear
from ofa.compress.ranges import METHODS
from ofa.data.sources import cifar10
from ofa.files import write_json
from ofa.published import load_network
from scripts.benchmarks.about import about

RESOLUTION, BATCH = 112, 50
NET = "weights/proxyless-w0.25-r112_imagenet"


def variants() -> Iterator[tuple[str, Linear]]:
    """Settings by name: weights per channel and per tensor, each method, and fewer bits with each rounding."""
    for per_channel, method in product((True, False), METHODS):
        yield ("channel" if per_channel else "tensor"), Linear(per_channel=per_channel, calibration=method)
    yield "channel", Linear(rounding="adaptive", calibration="mse")
    for bits, rounding in product((6, 4), ("nearest", "adaptive")):
        yield "channel", Linear(weight_bits=bits, rounding=rounding, calibration="mse", weight_range="mse")


def main() -> None:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=100, help="training images")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, folder = perf_counter(), Path(os.environ.get("OFA_DATA", "../shared/data"))
    net = load_network(folder / f"{NET}.json", folder / f"{NET}.pth", resolution=RESOLUTION)
    data = cifar10(folder / "cifar10")
    seen = list(data.calibration("train", args.calibration, RESOLUTION, batch_size=BATCH))
    tested = list(data.calibration("test", args.images, RESOLUTION, batch_size=BATCH))
    exact = logits(net, tested)
    nets = {"none": net, "cap": equalize(net, Equalization()), "relu": equalize(net, Equalization(relu6="relu"))}
    print(f"{args.calibration} calibration images, {len(exact)} test images; equalized in float:")
    rows = [{"equalized": key, "method": "float"} | _close(exact, logits(n, tested)) for key, n in nets.items()]
    for first in rows:
        print(
            f"  {first['equalized']:5} agreement {first['agreement']:.3f}, SQNR {first['sqnr_db']:.1f} dB", flush=True
        )
    print(
        f"{'weights':9} {'bits':4} {'rounding':9} {'range':10} {'equalized':9} {'bias':5} {'top-1':>6} {'SQNR dB':>8}"
    )
    for (scale, settings), key, corrected in product(variants(), nets, (False, True)):
        if key == "relu" and (settings.per_channel or settings.calibration != "minmax"):
            continue
        if corrected and (settings.weight_bits < 8 or settings.rounding == "adaptive"):
            continue
        settings = replace(settings, bias_correction=corrected)
        quantized = quantize_linear(nets[key], settings, seen)
        row: dict[str, Any] = {"weights": scale, "bits": settings.weight_bits, "rounding": settings.rounding}
        row |= {"method": settings.calibration, "equalized": key, "bias_correction": corrected}
        row |= _close(exact, logits(quantized, tested))
        rows.append(row)
        print(
            f"{scale:9} {settings.weight_bits:4} {settings.rounding:9} {settings.calibration:10} {key:9} "
            f"{corrected!s:5} {row['agreement']:6.3f} {row['sqnr_db']:8.2f}",
            flush=True,
        )
    print(f"{perf_counter() - start:.0f} s, {about()}")
    if args.out:
        write_json(args.out, {"rows": rows, "about": about()})


def _close(exact: Tensor, found: Tensor) -> dict[str, float]:
    return {"agreement": agreement(exact, found), "sqnr_db": sqnr(exact, found)}


if __name__ == "__main__":
    main()

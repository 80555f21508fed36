"""One trained network through every runtime: parity on real images, accuracy, file size, latency or arena.

    python scripts/benchmarks/runtimes.py --card runs/cifar10/export/phone/pruned.json --torch-threads 1 2

Beside them, in the same run on the same images: PyTorch eager, and torchvision's MobileNetV3-small at the same side
with random weights (--mobilenet gives trained ones), whose latencies are ratios to the network's in the same runtime.
A runtime whose extra is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.data import ImageData, cifar10, digits
from ofa.errors import UserError
from ofa.export.card import Card, load_card, rebuild
from ofa.export.latency import device_card
from ofa.export.onnx import compare
from ofa.export.runtime import Runtime, latencies
from ofa.export.runtimes.aoti import Aoti
from ofa.export.runtimes.executorch import ExecuTorch
from ofa.export.runtimes.litert import LiteRT
from ofa.export.runtimes.onnx import Onnx
from ofa.export.runtimes.tflm import Tflm, units_apart
from ofa.files import versions, write_json

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime float": Onnx(32),
    "onnxruntime int8": Onnx(8),
    "litert float": LiteRT(32),
    "litert int8": LiteRT(8),
    "executorch float": ExecuTorch(32),
    "executorch int8": ExecuTorch(8),
    "aotinductor float": Aoti(),
    "tflm int8": Tflm(),
}
SIMULATED = ("tflm int8",)  # portable kernels on this machine say nothing of a microcontroller's time


def main() -> None:
    """Print one row for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, required=True, help="card of a trained network")
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--images", type=int, default=1000, help="test images on which logits are compared")
    parser.add_argument("--calibration", type=int, default=256, help="validation images")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runtimes"), help="where the files go")
    parser.add_argument("--no-mobilenet", action="store_true", help="leave MobileNetV3-small out")
    args = parser.parse_args()
    net, data = rebuild(args.card), data_of(load_card(args.card))
    side = net.spec.resolution
    images, labels = next(data.batches("test", args.images, side, rng=None))
    ranges = torch.cat(list(data.calibration("val", args.calibration, side)))
    found: dict[str, Any] = {"card": str(args.card), "side": side, "device": device_card(), "versions": versions()}
    nets: dict[str, nn.Module] = {"net": net}
    if not args.no_mobilenet:
        nets["mobilenet_v3_small"] = mobilenet(data, ranges)
    for name, module in nets.items():
        print(name, flush=True)
        folder = args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        found[name] = measure(module, args, images, labels.numpy(), ranges, folder)
    if len(nets) == 2:
        ratios(found["net"], found["mobilenet_v3_small"])
    write_json(args.folder / "runtimes.json", found)


def measure(
    net: nn.Module, args: argparse.Namespace, images: Tensor, labels: np.ndarray, ranges: Tensor, folder: Path
) -> dict[str, dict[str, Any]]:
    """What every runtime made of one network."""
    with torch.inference_mode():
        expected = torch.cat([net(part) for part in images.split(100)]).numpy()
    rows: dict[str, dict[str, Any]] = {"pytorch eager": {"accuracy": float((expected.argmax(1) == labels).mean())}}
    files: dict[str, Path] = {}
    for name in args.only:
        runtime = RUNTIMES[name]
        file = folder / f"net{runtime.suffix}"
        try:
            runtime.export(net, file, ranges)
            call = runtime.load(file)
        except UserError as error:
            print(f"  {name:20} left out: {error}", flush=True)
            continue
        logits = np.concatenate([call(part.contiguous().numpy()) for part in images.split(50)])
        rows[name] = asdict(compare(logits, expected)) | {"accuracy": float((logits.argmax(1) == labels).mean())}
        rows[name] |= {"file_bytes": file.stat().st_size} | runtime.describe(file)
        if name in SIMULATED:
            rows[name]["units_from_litert"] = units_apart(file, images[:100])
        else:
            files[name] = file
        print(f"  {name:20} {line(rows[name])}", flush=True)
    for threads in args.threads:
        time_all(rows, files, net, images[:1].contiguous().numpy(), threads, args.repeats)
    return rows


def time_all(
    rows: dict[str, dict[str, Any]],
    files: Mapping[str, Path],
    net: nn.Module,
    image: np.ndarray,
    threads: int,
    repeats: int,
) -> None:
    """Latency of every file and of PyTorch eager, in turns; written into the rows and printed."""
    torch.set_num_threads(threads)
    calls = {name: RUNTIMES[name].load(file, threads) for name, file in files.items()}

    def eager(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(x)).numpy()

    for name, timed in latencies(calls | {"pytorch eager": eager}, image, threads=threads, repeats=repeats).items():
        rows[name][f"latency_{threads}"] = asdict(timed)
        print(
            f"  {name:20} {threads} threads: {timed.median_ms:8.3f} ms "
            f"({timed.p10_ms:.3f} to {timed.p90_ms:.3f}, n {timed.n})",
            flush=True,
        )


def ratios(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """Print how many times the network's latency, size or arena MobileNetV3-small takes in the same runtime."""
    print("mobilenet_v3_small / net")
    for name in ours:
        if name not in theirs:
            continue
        keys = [key for key in ours[name] if key.startswith("latency_")]
        parts = [f"{theirs[name][key]['median_ms'] / ours[name][key]['median_ms']:.2f} x {key}" for key in keys]
        for key in ("file_bytes", "arena_bytes"):
            if key in ours[name] and key in theirs[name]:
                parts.append(f"{theirs[name][key] / ours[name][key]:.2f} x {key}")
        print(f"  {name:20} {', '.join(parts)}")


def line(row: Mapping[str, Any]) -> str:
    """Parity, accuracy, size of one row."""
    text = f"{row['sqnr_db']:6.1f} dB, agreement {row['agreement']:.4f}, accuracy {row['accuracy']:.4f}, "
    text += f"{row['file_bytes']} bytes"
    shown = ("arena_bytes", "arena_tensors_bytes", "planned_bytes", "opset")
    return text + "".join(f", {key} {row[key]}" for key in shown if key in row)


def mobilenet(data: ImageData, ranges: Tensor) -> nn.Module:
    """torchvision's MobileNetV3-small for these classes and channels, batch norm calibrated, weights random."""
    from torchvision.models import mobilenet_v3_small

    from ofa.extraction import recalibrate

    torch.manual_seed(0)
    net = mobilenet_v3_small(num_classes=len(data.classes))
    if data.channels == 1:
        net.features[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
    recalibrate(net, [ranges])
    return net.eval()


def data_of(card: Card) -> ImageData:
    """The data set that a card was trained on: digits, or CIFAR-10 from $OFA_DATA/cifar10."""
    if card.data["name"] == "digits":
        return digits()
    if card.data["name"] == "cifar10":
        return cifar10(path=f"{os.environ.get('OFA_DATA', '../shared/data')}/cifar10")
    raise UserError(f"this benchmark reads digits and cifar10, not {card.data['name']!r}; give such a network's card")


if __name__ == "__main__":
    main()

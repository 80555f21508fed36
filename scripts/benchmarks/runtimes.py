"""One trained network through every runtime: parity on real images, accuracy, file size, latency or arena.

    python scripts/benchmarks/runtimes.py --card runs/cifar10/specialize/stm32f746/float.json

Beside them, in the same run on the same images: PyTorch eager, and torchvision's MobileNetV3-small, trained here on
images of the same side for --epochs, whose latency and size are ratios to the network's in the same runtime.  Each
number of threads is timed in a process of its own; what runs on one thread alone is not timed with two.  A runtime
whose extra is not installed is left out, and said so.  Everything is kept in --folder; --again times what lies there.
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
from ofa.export.runtime import Runtime
from ofa.export.runtimes.aoti import Aoti
from ofa.export.runtimes.c import PlainC
from ofa.export.runtimes.executorch import ExecuTorch
from ofa.export.runtimes.litert import LiteRT
from ofa.export.runtimes.onnx import Onnx
from ofa.export.runtimes.tflm import Tflm, units_apart
from ofa.files import read_json, write_json
from ofa.finetune import Finetuning, finetune
from scripts.benchmarks.about import about
from scripts.benchmarks.runtimes_time import CPP, EAGER, PACKAGE, build_cpp, run_cpp, timed

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime float": Onnx(32),
    "onnxruntime int8": Onnx(8),
    "litert float": LiteRT(32),
    "litert int8": LiteRT(8),
    "executorch float": ExecuTorch(32),
    "executorch int8": ExecuTorch(8),
    PACKAGE: Aoti(),
    "tflm int8": Tflm(),
    "plain C int8": PlainC(),
}
SIMULATED = ("tflm int8",)  # portable kernels on this machine say nothing of a microcontroller's time
SINGLE = ("plain C int8",)  # has one thread
OTHER = "mobilenet_v3_small"
Rows = dict[str, dict[str, Any]]


def main() -> None:
    """Print one row for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, required=True, help="card of a trained network")
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--images", type=int, default=1000, help="test images on which logits are compared")
    parser.add_argument("--calibration", type=int, default=256, help="validation images")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="none: nothing is timed")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=4, help="of MobileNetV3-small (0: it is left out)")
    parser.add_argument("--folder", type=Path, default=Path("runtimes"), help="where the files go")
    parser.add_argument("--again", action="store_true", help="time the files of an earlier run, and make none")
    args = parser.parse_args()
    net, data = rebuild(args.card), data_of(load_card(args.card))
    side = net.spec.resolution
    images, labels = next(data.batches("test", args.images, side, rng=None))
    ranges = torch.cat(list(data.calibration("val", args.calibration, side)))
    nets: dict[str, nn.Module] = {"net": net}
    if args.epochs:
        nets[OTHER] = mobilenet(data, side, args.epochs, args.folder / f"{OTHER}.pth")
    file = args.folder / "runtimes.json"
    found: dict[str, Any] = {"card": str(args.card), "side": side, "device": device_card(), "about": about()}
    if args.again:
        found = read_json(file) | {"timed": found}
    for name, module in nets.items():
        if not args.again:
            print(name, flush=True)
            found[name] = measure(module, args.only, images, labels.numpy(), ranges, args.folder / name)
            write_json(file, found)
    for name, module in nets.items():
        for threads in args.threads:
            print(f"{name}, {threads} threads", flush=True)
            image = images[:1].contiguous().numpy()
            time_all(found[name], args.folder / name, module, image, threads, args.repeats)
    print(found["about"])
    write_json(file, found)
    if len(nets) == 2:
        ratios(found["net"], found[OTHER])


def measure(net: nn.Module, names: list[str], images: Tensor, labels: np.ndarray, ranges: Tensor, folder: Path) -> Rows:
    """What every runtime made of one network, without times."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        expected = torch.cat([net(part) for part in images.split(100)]).numpy()
    rows: Rows = {EAGER: {"accuracy": float((expected.argmax(1) == labels).mean())}}
    print(f"  {EAGER:20} accuracy {rows[EAGER]['accuracy']:.4f}", flush=True)
    for name in names:
        runtime, file = RUNTIMES[name], path_of(name, folder)
        try:
            runtime.export(net, file, ranges)
            call = runtime.load(file)
        except UserError as error:
            print(f"  {name:20} left out: {error}", flush=True)
            continue
        logits = np.concatenate([call(part.contiguous().numpy()) for part in images.split(50)])
        rows[name] = _row(logits, expected, labels) | {"file_bytes": file.stat().st_size} | runtime.describe(file)
        if name in SIMULATED:
            rows[name]["units_from_litert"] = units_apart(file, images[:100])
        print(f"  {name:20} {line(rows[name])}", flush=True)
        if name == PACKAGE:
            logits, _ = run_cpp(build_cpp(folder / "cpp"), file, images.numpy())
            rows[CPP] = _row(logits, expected, labels) | {"file_bytes": file.stat().st_size}
            print(f"  {CPP:20} {line(rows[CPP])}", flush=True)
    return rows


def path_of(name: str, folder: Path) -> Path:
    """Where a runtime's file lies."""
    return folder / "cpp/build/run" if name == CPP else folder / f"net{RUNTIMES[name].suffix}"


def _row(logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return asdict(compare(logits, expected)) | {"accuracy": float((logits.argmax(1) == labels).mean())}


def time_all(rows: Rows, folder: Path, net: nn.Module, image: np.ndarray, threads: int, repeats: int) -> None:
    """Latency of every file and of PyTorch eager, written into the rows and printed."""
    names = [name for name in rows if name != EAGER and name not in SIMULATED and (threads == 1 or name not in SINGLE)]
    files = {name: path_of(name, folder) for name in names}
    runtimes = {name: RUNTIMES[name] for name in names if name != CPP}
    for name, row in timed(runtimes, files, net, image, threads, repeats).items():
        rows[name][f"latency_{threads}"] = row
        spread = f"{row['p10_ms']:.3f} to {row['p90_ms']:.3f}"
        print(f"  {name:20} {row['median_ms']:8.3f} ms ({spread}, n {row['n']})", flush=True)


def ratios(ours: Rows, theirs: Rows) -> None:
    """Print how many times the network's latency, size or arena MobileNetV3-small takes in the same runtime."""
    print(f"{OTHER} / net")
    for name in [name for name in ours if name in theirs]:
        keys = [key for key in ours[name] if key.startswith("latency_") and key in theirs[name]]
        parts = [f"{theirs[name][key]['median_ms'] / ours[name][key]['median_ms']:.2f} x {key}" for key in keys]
        for key in ("file_bytes", "arena_bytes"):
            if key in ours[name] and key in theirs[name]:
                parts.append(f"{theirs[name][key] / ours[name][key]:.2f} x {key}")
        print(f"  {name:20} {', '.join(parts)}")


def line(row: Mapping[str, Any]) -> str:
    """Parity, accuracy, size of one row."""
    text = f"{row['sqnr_db']:6.1f} dB, agreement {row['agreement']:.4f}, accuracy {row['accuracy']:.4f}, "
    text += f"{row['file_bytes']} bytes"
    shown = (
        "arena_bytes",
        "arena_tensors_bytes",
        "planned_bytes",
        "opset",
        "units_from_litert",
        "flash_bytes_cortex-m7",
    )
    return text + "".join(f", {key} {row[key]}" for key in shown if key in row)


def mobilenet(data: ImageData, side: int, epochs: float, weights: Path) -> nn.Module:
    """torchvision's MobileNetV3-small for these classes and channels, trained, or with the weights of a run before."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    net = mobilenet_v3_small(num_classes=len(data.classes))
    if data.channels == 1:
        net.features[0][0] = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
    if weights.exists():
        net.load_state_dict(torch.load(weights, weights_only=True))
        return net.eval()
    net = finetune(net, data, Finetuning(epochs=epochs, lr=0.1, batch_size=128), resolution=side)
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), weights)
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

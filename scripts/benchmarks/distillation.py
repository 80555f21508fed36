"""Every way to distil, side by side on one student: top-1 on test images, mean and standard deviation over seeds.

    python scripts/benchmarks/distillation.py --path <folder of CIFAR-10's Parquet files> [--seeds 3] [--out table.json]

Teachers are trained once on the training images; each student starts anew with each seed and learns for the same epochs
with the same settings: from labels alone, or as a file of conf/distill says.  `ensemble` has a second teacher, `mutual`
a fresh peer in place of a trained teacher.  Weights are those of the files: none was tuned on these images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from ofa.data import ImageData, parquet
from ofa.data.images import Split
from ofa.distill import Distillation
from ofa.evaluate import accuracy
from ofa.files import write_json
from ofa.finetune import Finetuning, finetune
from ofa.kernels import keep_memory
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec
from scripts.benchmarks.about import about

SIDE = 16  # pixels, a quarter of the work of CIFAR-10's 32
CONF = Path(__file__).parents[2] / "conf/distill"


def network(widths: Sequence[int], depth: int) -> StaticNet:
    """Plain 3x3 convolutions: each width has one of stride 2, then `depth` residual ones."""
    units = []
    for cin, cout in zip((3, *widths), widths):  # noqa: B905 (the last width is nobody's input)
        units += [Unit("conv", cin, cout, 3, 2, act="relu")]
        units += [Unit("conv", cout, cout, 3, act="relu", shortcut=True)] * depth
    units += [Unit("pool", widths[-1], widths[-1]), Unit("linear", widths[-1], 10)]
    return build_spec(NetSpec(tuple(units), SIDE, 3, 10))


def fresh(seed: int, widths: Sequence[int] = (16, 24, 40), depth: int = 0) -> StaticNet:
    """A network with the weights of a seed; a student where nothing else is said."""
    torch.manual_seed(seed)
    return network(widths, depth)


def load(path: str, images: int) -> ImageData:
    """CIFAR-10 with its first training images, which are in random order, and 5,000 others for batch norm."""
    data = parquet(path, val_size=5000, shift=4, flip=True)
    return replace(data, train=Split(data.train.images[:images], data.train.labels[:images]))  # type: ignore[index, arg-type]


def methods() -> dict[str, Distillation | None]:
    """Labels alone, each file of conf/distill, and the divergence from two teachers."""
    found: dict[str, Distillation | None] = {"labels": None}
    for path in sorted(CONF.glob("*.yaml")):
        options = yaml.safe_load(path.read_text())
        found[path.stem] = Distillation(**{name: value for name, value in options.items() if name != "_target_"})
    return found | {"ensemble": found["kl"]}


def top1(net: nn.Module, data: ImageData) -> float:
    """Top-1 (%) on the test images."""
    return 100 * accuracy(net, data, "test", resolution=SIDE)


def row(name: str, scores: Sequence[float], base: Sequence[float], seconds: float) -> str:
    """Mean, standard deviation, the mean gain over labels alone with its standard error, seconds of one training."""
    gain = np.subtract(scores, base)
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    values = f"{np.mean(scores):6.2f} ± {np.std(scores, ddof=1):.2f}   {gain.mean():+6.2f} ± {error:.2f}"
    return f"{name:14} {values}   {seconds:6.1f}"


def main() -> None:
    """Train the teachers, then each student; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--epochs", type=float, default=5, help="of each student")
    parser.add_argument("--teacher-epochs", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="students of each method, at least 2")
    parser.add_argument("--methods", nargs="*", default=list(methods()), help="labels and others (without: all)")
    parser.add_argument("--out", help="a JSON file of all scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    data = load(options.path, options.images)
    settings = Finetuning(options.teacher_epochs, lr=0.1, batch_size=128, weight_decay=5e-4, clip_norm=5.0)
    nets: list[nn.Module] = [
        finetune(fresh(100 + seed, (32, 64, 128), 1), data, settings, seed=100 + seed) for seed in range(2)
    ]
    taught = ", ".join(f"{top1(net, data):.2f} %" for net in nets)
    print(f"{options.images} images of {SIDE} pixels; teachers: {taught}", flush=True)
    print("method         top-1, %         gain over labels   CPU s")
    results: dict[str, list[float]] = {}
    for name in dict.fromkeys(["labels", *options.methods]):
        learn = replace(settings, epochs=options.epochs, distill=methods()[name])
        start, scores = time.process_time(), []
        for seed in range(options.seeds):
            peer: list[nn.Module] = [fresh(50 + seed)]
            teachers = {"labels": [], "ensemble": nets, "mutual": peer}.get(name, nets[:1])
            scores.append(top1(finetune(fresh(seed), data, learn, teacher=teachers, seed=seed), data))
        results[name] = scores
        seconds = (time.process_time() - start) / options.seeds
        print(row(name, scores, results["labels"], seconds), flush=True)
    print(json.dumps(about()))
    if options.out:
        write_json(options.out, {"options": vars(options), "top1": results, "about": about()})


if __name__ == "__main__":
    main()

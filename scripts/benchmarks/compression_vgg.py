"""The VGG-like network of the compression benchmarks, trained once on CIFAR-10, kept as a file that they all read.

    python scripts/benchmarks/compression_vgg.py --folder runs/vgg

The eight convolutions of the VGG of MIT 6.5940's labs 1 and 2 at a quarter of their widths (16 to 128 channels, 0.58 M
parameters), each pool one convolution earlier, so that one CPU thread trains it in about a quarter of an hour: 9.9 M
multiply-adds.  The lab's has 9.23 M parameters and 606 M multiply-adds, and reaches 92.95 %.
SGD with Nesterov momentum, one epoch of warm-up, then a cosine to 0, for `--epochs` epochs; a kill costs one epoch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.data import ImageData
from ofa.data.sources import cifar10
from ofa.distill import label_loss
from ofa.evaluate import accuracy
from ofa.spec import NetSpec, Unit
from ofa.static import StaticNet, build_spec
from ofa.weights import load_tensors, save_tensors
from scripts.benchmarks.about import about

PLAN = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128)
BATCH, LR, MOMENTUM, DECAY, SMOOTHING = 128, 0.1, 0.9, 5e-4, 0.1
RESOLUTION = 32


def vgg_spec() -> NetSpec:
    """3x3 convolutions with batch norm and ReLU, 3x3 max pools of stride 2, a global average pool, a linear layer."""
    units, channels = [], 3
    for width in PLAN:
        if isinstance(width, str):
            units.append(Unit("maxpool", channels, channels, 3, 2))
        else:
            units.append(Unit("conv", channels, width, 3, act="relu"))
            channels = width
    return NetSpec((*units, Unit("pool", channels, channels), Unit("linear", channels, 10)), RESOLUTION, 3, 10)


def images() -> ImageData:
    """CIFAR-10 from OFA_DATA: 45,000 training images, 5,000 for validation, 10,000 for the test."""
    return cifar10(Path(os.environ.get("OFA_DATA", "../shared/data"), "cifar10"))


def trained_vgg(folder: Path, data: ImageData, *, epochs: int = 10, seed: int = 0) -> StaticNet:
    """The trained network in evaluation mode, from `folder`/vgg.safetensors, trained first where that is not there."""
    path = folder / "vgg.safetensors"
    net = build_spec(vgg_spec())
    if not path.exists():
        train(net, data, folder, epochs=epochs, seed=seed)
    net.load_state_dict(load_tensors(path)[0])
    return net.eval()


def train(net: StaticNet, data: ImageData, folder: Path, *, epochs: int, seed: int) -> None:
    """Train from the last epoch in `folder`/training.safetensors on, and write `folder`/vgg.safetensors."""
    torch.manual_seed(seed)
    net.load_state_dict(build_spec(net.spec).state_dict())
    names = [name for name, _ in net.named_parameters()]
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    first, state = 0, folder / "training.safetensors"
    if state.exists():
        tensors, metadata = load_tensors(state)
        net.load_state_dict({name: tensors[name] for name in net.state_dict()})
        for name, parameter in net.named_parameters():
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
        first = metadata["epoch"]
    steps = data.size("train") // BATCH
    for epoch in range(first, epochs):
        start, loss = perf_counter(), _epoch(net, data, optimizer, epoch * steps, epochs * steps, seed)
        score = accuracy(net.eval(), data, "val", resolution=RESOLUTION)
        print(
            f"epoch {epoch + 1}/{epochs}: loss {loss:.3f}, val {score:.4f}, {perf_counter() - start:.0f} s", flush=True
        )
        momentum = {
            f"momentum.{n}": optimizer.state[p]["momentum_buffer"] for n, p in zip(names, net.parameters(), strict=True)
        }
        save_tensors(state, dict(net.state_dict()) | momentum, {"epoch": epoch + 1})
    scores: dict[str, Any] = {
        split: accuracy(net.eval(), data, split, resolution=RESOLUTION) for split in ("val", "test")
    }
    facts = scores | {"epochs": epochs, "seed": seed, "spec": net.spec.to_dict(), "about": about()}
    save_tensors(folder / "vgg.safetensors", net.state_dict(), facts)


def _epoch(net: StaticNet, data: ImageData, optimizer: torch.optim.SGD, step: int, steps: int, seed: int) -> float:
    """One pass over the training images; the mean loss."""
    net.train()
    per_epoch, total, n = data.size("train") // BATCH, 0.0, 0
    rng = np.random.default_rng((seed, step))
    for x, y in data.batches("train", BATCH, RESOLUTION, rng=rng, drop_last=True):
        warm = min(1.0, (step + 1) / per_epoch)
        rest = max(0.0, (step - per_epoch) / (steps - per_epoch))
        optimizer.param_groups[0]["lr"] = LR * warm * (1 + math.cos(math.pi * rest)) / 2
        loss = label_loss(net(x), y, SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, n, step = total + loss.item(), n + 1, step + 1
    return total / n


def main() -> None:
    """Train the network, or read it, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vgg"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained_vgg(args.folder, images(), epochs=args.epochs, seed=args.seed)
    facts = load_tensors(args.folder / "vgg.safetensors")[1]
    print(f"val {facts['val']:.4f} (n=5000), test {facts['test']:.4f} (n=10000)")
    print(about())


if __name__ == "__main__":
    main()

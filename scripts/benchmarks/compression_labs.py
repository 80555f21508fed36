"""The questions of MIT 6.5940's lab 1 (pruning), answered on a VGG-like network on CIFAR-10.

    python scripts/benchmarks/compression_labs.py --folder runs/vgg --only sensitivity sizes channels low_rank

sensitivity: accuracy with one layer pruned at a time.  sizes: a quarter of the size by each way of sharing the zeros
among the layers, before and after fine-tuning.  channels: channels removed from the network as it is and with its
channels sorted by importance, before and after fine-tuning, and the speedup in ONNX Runtime (one thread, batch 1,
measured in turns), beside that of 75 % zeros.  low_rank: half the multiply-adds by each factorization.  The network is
that of compression_vgg.py, trained first where `--folder` has none.  Choices are made on validation images; test
accuracy (10,000 images) is only printed.  The lab's own network, 16 times as large, goes from 92.95 to 92.5 % at a
quarter of its size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.compress.allocation import LEVELS, sensitivity
from ofa.compress.chain import Work
from ofa.compress.channels import Channels
from ofa.compress.criteria import channel_scores
from ofa.compress.layers import count, image_of
from ofa.compress.low_rank import METHODS, LowRank
from ofa.compress.magnitude import ALLOCATIONS, Magnitude
from ofa.compress.prune import sort_channels
from ofa.evaluate import accuracy
from ofa.export.graph import onnx_model
from ofa.export.latency import measure_models
from ofa.files import write_json
from ofa.finetune import Finetuning
from ofa.static import StaticNet
from scripts.benchmarks.about import about
from scripts.benchmarks.compression_vgg import RESOLUTION, images, trained_vgg

TUNING = Finetuning(lr=0.02, batch_size=128, weight_decay=5e-4)
BARE = replace(TUNING, epochs=0)
Rows = list[dict[str, Any]]


def percent(net: nn.Module, work: Work, args: argparse.Namespace, split: str = "test") -> float:
    """Top-1 in percent on `--limit` images of a split."""
    return 100 * accuracy(net, work.data, split, resolution=RESOLUTION, limit=args.limit)


def sensitivities(net: StaticNet, work: Work, args: argparse.Namespace) -> Rows:
    """Each layer's curve on all validation images."""
    rows = sensitivity(net, work, images=args.limit)
    whole = percent(net, work, args, "val")
    print(f"validation accuracy (n={args.limit or 5000}) with one layer pruned; none pruned: {whole:.2f}", flush=True)
    print("layer            weights " + " ".join(f"{level:>6.0%}" for level in LEVELS))
    for start in range(0, len(rows), len(LEVELS)):
        part = rows[start : start + len(LEVELS)]
        scores = " ".join(f"{100 * row.accuracy:6.2f}" for row in part)
        print(f"{part[0].layer:14} {part[0].weights:9} {scores}")
    return [asdict(row) for row in rows]


def sizes(net: StaticNet, work: Work, args: argparse.Namespace) -> Rows:
    """A quarter of the size by each allocation, and by the gradual and the iterative schedule."""
    steps = {name: Magnitude(args.size, name) for name in ALLOCATIONS}
    steps |= {"gradual": Magnitude(args.size, gradual=0.6), "3 rounds": Magnitude(args.size, rounds=3)}
    return [_tuned(net, work, args, name, step) for name, step in steps.items()]


def _tuned(net: StaticNet, work: Work, args: argparse.Namespace, name: str, step: Any) -> dict[str, Any]:
    """One step without and, over seeds, with fine-tuning, of the same length in all."""
    start, before = perf_counter(), percent(net, work, args)
    pruned = replace(step, finetuning=BARE)(net, work)
    tuned = [pruned]
    if args.epochs:
        tuning = replace(TUNING, epochs=args.epochs / getattr(step, "rounds", 1))
        tuned = [replace(step, finetuning=tuning)(net, replace(work, seed=seed)) for seed in range(args.seeds)]
    after = [percent(one, work, args) for one in tuned]
    counts, val = count(tuned[0], image_of(net, work)), [percent(one, work, args, "val") for one in tuned]
    row = {"name": name, "before": before, "pruned": percent(pruned, work, args), "tuned": after, "val": val}
    row |= asdict(counts) | {"epochs": args.epochs, "seconds": perf_counter() - start}
    share = counts.nonzeros / sum(p.numel() for p in net.parameters())
    print(
        f"{name:14} test {before:.2f} -> {row['pruned']:.2f} -> {np.mean(after):.2f} ± {np.std(after):.2f} "
        f"(n={len(after)}, {args.epochs:g} epochs; val {np.mean(val):.2f}); size {share:.3f}, "
        f"{counts.macs / 1e6:.2f} M MACs, {counts.sparse_macs / 1e6:.2f} M not by zero; {row['seconds']:.0f} s",
        flush=True,
    )
    return row


def channels(net: StaticNet, work: Work, args: argparse.Namespace) -> Rows:
    """The last channels of each group removed, as they come and sorted by L2 norm; then by other criteria; speedup."""
    target, rows = args.macs, []
    in_order = sort_channels(net, channel_scores(net, "l2", streams=True))
    assert abs(percent(in_order, work, args, "val") - percent(net, work, args, "val")) < 0.05, "sorting changes nothing"
    for name, start, criterion in (
        ("not sorted", net, "first"),
        ("sorted", in_order, "first"),
        ("l2, global", net, "l2"),
        ("taylor, global", net, "taylor"),
    ):
        step = Channels(macs=target, criterion=criterion)
        rows.append(_tuned(start, work, args, name, step))
    small = Channels(macs=target, criterion="first", finetuning=replace(TUNING, epochs=0))(in_order, work)
    models = {
        name: onnx_model(one, (3, RESOLUTION, RESOLUTION)).SerializeToString()
        for name, one in {"dense": net, "half": small, "zeros": Magnitude(0.25, finetuning=BARE)(net, work)}.items()
    }
    times = measure_models(models, repeats=201)
    for name, row in times.items():
        print(
            f"ONNX Runtime, {name}: {row['median_ms']:.3f} ms ({row['p10_ms']:.3f}-{row['p90_ms']:.3f}), n={row['n']}"
        )
    dense, half, zeros = (times[name]["median_ms"] for name in models)
    print(f"speedup of channels at {target:.0%} of the MACs {dense / half:.2f}, of 75 % zeros {dense / zeros:.2f}")
    return [*rows, {"latency": times}]


def low_rank(net: StaticNet, work: Work, args: argparse.Namespace) -> Rows:
    """As many multiply-adds by each factorization."""
    return [_tuned(net, work, args, method, LowRank(args.macs, method)) for method in METHODS]


SECTIONS: dict[str, Callable[[StaticNet, Work, argparse.Namespace], Rows]] = {
    "sensitivity": sensitivities,
    "sizes": sizes,
    "channels": channels,
    "low_rank": low_rank,
}


def main() -> None:
    """Print the answers, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vgg"))
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--size", type=float, default=0.25)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=3, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="images that accuracy is measured on (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = images()
    net = trained_vgg(args.folder, data)
    work = Work(data, RESOLUTION, teacher=net)
    found = {name: SECTIONS[name](net, work, args) for name in args.only}
    print(about())
    if args.out:
        write_json(args.out, found | {"about": about()})


if __name__ == "__main__":
    main()

"""Each compression technique alone, and a chain of three, on two networks for CIFAR-10, in one table.

    python scripts/benchmarks/compression_table.py --card <run>/specialize/<device>/float.json

subnet: the network of `--card`, found in a supernet trained on CIFAR-10.  published: MCUNet's proxyless-w0.25-r112 of
`tables/published_subnets.json`, from its ImageNet weights, trained on CIFAR-10 at 48 pixels for `--train-images` images
first.  A technique that trains sees `--images` training images with the uncompressed network as teacher, a chain, and
channels after soft filters, as many in each of two trainings; "before" is the same without training (pruned networks
recalibrated).  "nothing" is the network itself trained as long: what training alone gives.  Layers and bits are chosen
on validation images; what is printed is accuracy on the 10,000 test images.

Every finished row is a line of <folder>/rows.jsonl, so that the command goes on where it was stopped.  `--latency`
only measures the networks that are there in ONNX Runtime, in turns (one thread, batch 1; int8: quantized, QDQ), and
prints the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.compress.binary import Binary
from ofa.compress.chain import Step, Work, compress
from ofa.compress.channels import Channels
from ofa.compress.equalize import Equalization
from ofa.compress.gating import Gating
from ofa.compress.kmeans import KMeans, sensitive_layers
from ofa.compress.linear import Linear
from ofa.compress.low_rank import LowRank
from ofa.compress.magnitude import Magnitude, NOfM
from ofa.compress.movement import Movement, SoftFilter
from ofa.compress.norms import Norms
from ofa.compress.numbers import measure
from ofa.compress.pt2e import Pt2e
from ofa.compress.quantize import Quantization, quantize
from ofa.compress.scales import Scales
from ofa.data import ImageData
from ofa.evaluate import accuracy
from ofa.export.card import rebuild
from ofa.export.graph import onnx_model
from ofa.export.latency import measure_models
from ofa.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json
from ofa.finetune import Finetuning, finetune
from ofa.published import load_network
from ofa.static import StaticNet, build_spec
from ofa.weights import load_tensors, save_tensors
from scripts.benchmarks.about import about
from scripts.benchmarks.compression_vgg import images
from scripts.mixed import Mixed

DATA = Path(os.environ.get("OFA_DATA", "../shared/data"))
PUBLISHED, SIDE = "proxyless-w0.25-r112_imagenet", 48
TUNING = Finetuning(lr=0.02)
CODEBOOKS = replace(TUNING, lr=0.002)
LEVELS = replace(TUNING, lr=0.01)
Chain = dict[str, Step]


def techniques(net: nn.Module, work: Work) -> dict[str, Chain]:
    """Each technique alone, by name, then the chain; with as much training as the settings' epochs say."""
    mixed = dict.fromkeys(sensitive_layers(net, work, 2), 4)
    print(f"4 bits beside 2: {len(mixed)} layers, {', '.join(mixed)}", flush=True)
    four = KMeans(4, finetuning=CODEBOOKS)
    eighth = sum(parameter.numel() for parameter in net.parameters()) * 4 / 8
    by_mse: dict[str, Any] = {"weight_range": "mse", "calibration": "mse"}
    return {
        "float": {},
        "nothing": {"train": Magnitude(1.0, finetuning=TUNING)},
        "25 % by magnitude": {"magnitude": Magnitude(0.25, gradual=0.6, finetuning=TUNING)},
        "25 % by Fisher": {"fisher": Magnitude(0.25, criterion="fisher", gradual=0.6, finetuning=TUNING)},
        "half the MACs by channels": {"channels": Channels(0.5, finetuning=TUNING)},
        "half the MACs by low rank": {"low_rank": LowRank(0.5, finetuning=TUNING)},
        "int8": {"int8": Linear()},
        "k-means, 4 bits": {"kmeans": four},
        "k-means, 2 bits": {"kmeans": KMeans(2, finetuning=LEVELS)},
        "scales, k-means, 2 bits": {"scales": Scales(), "kmeans": KMeans(2, finetuning=LEVELS)},
        "k-means, 2 and 4 bits": {"kmeans": KMeans(2, mixed, finetuning=CODEBOOKS)},
        "2:4": {"nm": NOfM(finetuning=TUNING)},
        "25 % in 3 rounds": {"iterative": Magnitude(0.25, rounds=3, finetuning=TUNING)},
        "25 % by movement": {"movement": Movement(0.25, finetuning=TUNING)},
        "half the MACs by channels, L2": {"channels": Channels(0.5, criterion="l2", finetuning=TUNING)},
        "channels after soft filters": {
            "soft_filter": SoftFilter(0.3, finetuning=TUNING),
            "channels": Channels(0.5, criterion="l2", finetuning=TUNING),
        },
        "gates for half the channels": {"gating": Gating(0.5, finetuning=TUNING)},
        "int8, a scale a layer": {"int8": Linear(per_channel=False)},
        "the same, equalized": {"equalize": Equalization(), "int8": Linear(per_channel=False)},
        "the same, biases corrected": {"bias_correction": Linear(per_channel=False, bias_correction=True)},
        "int8 by PT2E, trained": {"pt2e": Pt2e("qat", finetuning=replace(TUNING, lr=0.005))},
        "4-bit weights": {"nearest": Linear(4, 8, **by_mse)},
        "4-bit weights, adaptive rounding": {"adaround": Linear(4, 8, rounding="adaptive", **by_mse)},
        "4 bits, inputs too": {"qat": Linear(4, 4, **by_mse, learned_steps=True, finetuning=LEVELS)},
        "bits by search, an eighth": {"mixed": Mixed({"weight_bytes": eighth})},
        "binary weights": {"binary": Binary("scaled", finetuning=LEVELS)},
        "ternary weights": {"ternary": Binary("ternary", finetuning=LEVELS)},
        "XNOR": {"xnor": Binary("xnor", finetuning=LEVELS)},
        "batch norms in 4 bytes": {"norms": Norms()},
        "35 %, 4 bits, Huffman": {
            "fisher": Magnitude(0.35, criterion="fisher", gradual=0.6, finetuning=TUNING),
            "kmeans": four,
            "norms": Norms(),
        },
    }


def lasting(step: Any, epochs: float) -> Any:
    """The step with so much training, 0: none at all."""
    settings = getattr(step, "finetuning", None)
    if settings is None:
        return step
    if isinstance(step, KMeans | Linear) and not epochs:
        return replace(step, finetuning=None)
    return replace(step, finetuning=replace(settings, epochs=epochs / getattr(step, "rounds", 1)))


def chained(net: nn.Module, steps: Mapping[str, Step], work: Work, epochs: float) -> nn.Module:
    """The network after the last step."""
    for _, made in compress(net, {name: lasting(step, epochs) for name, step in steps.items()}, work):
        net = made
    return net


def found_subnet(args: argparse.Namespace, data: ImageData) -> tuple[StaticNet, int]:
    """The network of the card, and the side of its images."""
    net = rebuild(args.card)
    return net, net.spec.resolution


def published_net(args: argparse.Namespace, data: ImageData) -> tuple[StaticNet, int]:
    """The published network with ten classes, trained on CIFAR-10 where the folder has no weights of it yet."""
    file = DATA / f"weights/{PUBLISHED}.json"  # the block list of the table, with the authors' names of the weights
    pretrained = load_network(file, file.with_suffix(".pth"), resolution=SIDE)
    spec = replace(pretrained.spec, units=(*pretrained.spec.units[:-1], replace(pretrained.spec.units[-1], cout=10)))
    torch.manual_seed(0)
    net, path = build_spec(replace(spec, classes=10)), args.folder / "published.safetensors"
    if path.exists():
        net.load_state_dict(load_tensors(path)[0])
        return net.eval(), SIDE
    own = net.state_dict()
    net.load_state_dict({k: v if v.shape == own[k].shape else own[k] for k, v in pretrained.state_dict().items()})
    settings = Finetuning(epochs=args.train_images / data.size("train"), lr=0.05)
    state = args.folder / "published.training.safetensors"
    trained = finetune(net, data, settings, resolution=SIDE, checkpoint=state)
    save_tensors(path, trained.state_dict(), {"images": args.train_images, "about": about()})
    return trained, SIDE


NETS = {"subnet": found_subnet, "published": published_net}


def run(name: str, args: argparse.Namespace, data: ImageData) -> None:
    """Every row of a network that the folder lacks, one seed of all techniques after the other."""
    net, side = NETS[name](args, data)
    rows = args.folder / "rows.jsonl"
    done = {(row["net"], row["technique"], row["seed"]) for row in read_jsonl(rows)}
    epochs, work = args.images / data.size("train"), Work(data, side)
    chains = techniques(net, work)
    for seed in range(args.seeds):
        for technique, steps in chains.items():
            left_out = args.techniques and technique not in (*args.techniques, "float")
            trained = any(getattr(step, "finetuning", None) for step in steps.values())
            if left_out or (name, technique, seed) in done or (seed and not trained):
                continue
            before = None
            if not seed and trained and "movement" not in steps:  # which has nothing to go by but training
                before = accuracy(chained(net, steps, work, 0), data, "test", resolution=side)
            made = chained(net, steps, replace(work, seed=seed), epochs)
            file = args.folder / f"{name}-{technique}-{seed}.ofap".replace(" ", "-").replace("%", "percent")
            numbers = asdict(measure(technique, made, work, file))
            if not seed and numbers["latency_ms"] is not None:  # which tells whether ONNX can say it
                save_onnx(made, technique, file.with_suffix(".onnx"), work)
            row = {"net": name, "technique": technique, "seed": seed, "before": before, "images": args.images}
            append_jsonl(rows, row | numbers | {"about": about()})
            print(f"{name}, {technique}, seed {seed}: {100 * numbers['accuracy']:.2f}", flush=True)


def save_onnx(net: nn.Module, technique: str, path: Path, work: Work) -> None:
    """What latency is measured on: int8 as ONNX Runtime's own int8, the others in float32."""
    if technique == "int8":
        float32 = Path(str(path).replace("-int8-", "-float-"))
        quantize(float32, path, work.data.calibration("val", 256, work.resolution), Quantization())
    else:
        atomic_write(path, onnx_model(net, (3, work.resolution, work.resolution)).SerializeToString())


def latencies(folder: Path) -> None:
    """Measure all networks of the folder in turns; writes latency.json."""
    paths = sorted(folder.glob("*-0.onnx"))
    found = measure_models({path.stem: path for path in paths}, repeats=101, seconds=120)
    write_json(folder / "latency.json", found)


def table(folder: Path) -> str:
    """The rows as Markdown: mean and standard deviation over seeds."""
    rows = read_jsonl(folder / "rows.jsonl")
    times = read_json(folder / "latency.json") if (folder / "latency.json").exists() else {}
    lines = ["| network, technique | top-1 (%) before, after | n | file (kB) | smaller | MACs (M) | Gbit-op | ms |"]
    lines.append("|---" * 8 + "|")
    for net, technique in dict.fromkeys((row["net"], row["technique"]) for row in rows):
        own = [row for row in rows if (row["net"], row["technique"]) == (net, technique)]
        first = next(row for row in rows if row["net"] == net)
        lines.append(_line(own, first, times))
    return "\n".join(lines)


def _line(own: list[dict[str, Any]], first: dict[str, Any], times: dict[str, Any]) -> str:
    row, scores = own[0], [100 * row["accuracy"] for row in own]
    spread = f" ± {np.std(scores, ddof=1):.2f}" if len(own) > 1 else ""
    before = "" if row["before"] is None else f"{100 * row['before']:.2f} → "
    size = np.mean([row["file_bytes"] for row in own])
    stem = f"{row['net']}-{row['technique']}-0".replace(" ", "-").replace("%", "percent")
    time = times.get(stem)
    ms = f"{time['median_ms']:.3f} [{time['p10_ms']:.3f}, {time['p90_ms']:.3f}]" if time else ""
    cells = (
        f"{row['net']}, {row['technique']}",
        f"{before}{np.mean(scores):.2f}{spread}",
        str(len(own)),
        f"{size / 1e3:.1f}",
        f"{first['file_bytes'] / size:.1f}x",
        f"{row['macs'] / 1e6:.2f}",
        f"{row['bit_operations'] / 1e9:.2f}",
        ms,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Make the rows that are not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, default=Path("runs/cifar10/specialize/stm32f746/float.json"))
    parser.add_argument("--folder", type=Path, default=Path("runs/table"))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--techniques", nargs="+", help="these alone, by the names in the table (default: all)")
    parser.add_argument("--images", type=int, default=10_000, help="that one training sees")
    parser.add_argument("--train-images", type=int, default=90_000, help="that train the published network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--latency", action="store_true", help="only measure what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.latency:
        latencies(args.folder)
    else:
        data = images()
        for name in args.nets:
            run(name, args, data)
    print(table(args.folder))
    print(about())


if __name__ == "__main__":
    main()

"""The questions of MIT 6.5940's lab 2 (quantization), answered on a VGG-like network on CIFAR-10.

    python scripts/benchmarks/compression_codebooks.py --folder runs/vgg --only codebooks linear

codebooks: k-means at 8, 4 and 2 bits, before and after training the codebooks, and behind `Scales`; mixed: 4 bits for
the layers that 2 bits alone cost more than a point on 1,000 validation images, chosen before the training.  linear:
8-bit weights and activations, and 4-bit weights rounded to the nearest and adaptively.  chain: prune gradually by what
the loss feels, for twice as long, share by k-means, code (Han et al. 2016), batch norms and biases in half precision.
Bytes are those of the packed file written.  The network is that of compression_vgg.py, trained first where `--folder`
has none; what is printed is accuracy on the 10,000 test images.  The lab's own network, 16 times as large, goes from
92.95 % to 92.76 (8 bits), 79.07 (4) and 10.00 (2) by k-means, to 92.47 and 91.23 after training at 4 and 2 bits; Deep
Compression makes VGG-16 49 times smaller.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.compress.chain import Step, Work
from ofa.compress.kmeans import KMeans, sensitive_layers
from ofa.compress.layers import image_of
from ofa.compress.linear import Linear
from ofa.compress.magnitude import Magnitude
from ofa.compress.norms import Norms
from ofa.compress.operations import bit_operations
from ofa.compress.packed import packed_sizes, save_packed, size_table
from ofa.compress.scales import Scales
from ofa.evaluate import accuracy
from ofa.files import write_json
from ofa.finetune import Finetuning
from scripts.benchmarks.about import about
from scripts.benchmarks.compression_vgg import RESOLUTION, images, trained_vgg

TUNING = Finetuning(epochs=2, lr=0.002, batch_size=128, weight_decay=5e-4)
PRUNING = replace(TUNING, lr=0.05)
LAB = {
    "kmeans 8": "92.76",
    "kmeans 4": "79.07",
    "kmeans 2": "10.00",
    "kmeans 4 trained": "92.47",
    "kmeans 2 trained": "91.23",
}


Chains = dict[str, tuple[Step, ...]]


def codebooks(net: nn.Module, work: Work, tuning: Finetuning) -> Chains:
    """Chains of one step each, by name."""
    found: Chains = {f"kmeans {bits}": (KMeans(bits),) for bits in (8, 4, 2)}
    faster = replace(tuning, lr=0.01)
    found["kmeans 4 trained"] = (KMeans(4, finetuning=tuning),)
    found["kmeans 2 trained"] = (KMeans(2, finetuning=faster),)
    sensitive = sensitive_layers(net, work, 2)
    mixed = KMeans(2, dict.fromkeys(sensitive, 4))
    print(f"4 bits for {', '.join(sensitive)}", flush=True)
    found |= {"kmeans 2 mixed": (mixed,), "kmeans 2 mixed trained": (replace(mixed, finetuning=tuning),)}
    found["scales, kmeans 2 trained"] = Scales(), KMeans(2, finetuning=faster)
    return found | {"kmeans 2 trained, assigned once": (KMeans(2, reassign=False, finetuning=faster),)}


def linear(net: nn.Module, work: Work, tuning: Finetuning) -> Chains:
    """Eight bits, and four without and with thought or training."""
    four = Linear(weight_bits=4, weight_range="mse", calibration="mse")
    return {
        "int8": (Linear(),),
        "int4 weights": (four,),
        "int4 weights, adaptive": (replace(four, rounding="adaptive"),),
        "int4 weights, trained": (replace(four, finetuning=tuning),),
    }


def chain(net: nn.Module, work: Work, tuning: Finetuning) -> Chains:
    """Pruned to a fifth and to an eighth, then codebooks of four bits."""
    slow = replace(PRUNING, epochs=2 * tuning.epochs)
    return {
        f"pruned to {size:.0%}, kmeans {bits} trained": (
            Magnitude(size, criterion="fisher", gradual=0.6, finetuning=slow),
            KMeans(bits, finetuning=tuning),
            Norms(),
        )
        for size, bits in ((0.2, 4), (0.13, 4))
    }


PARTS = {"codebooks": codebooks, "linear": linear, "chain": chain}


def chains(args: argparse.Namespace, part: str, net: nn.Module, work: Work) -> Chains:
    """The chains of one part, or those of them that `--chains` names."""
    found = PARTS[part](net, work, replace(TUNING, epochs=args.epochs))
    return {name: steps for name, steps in found.items() if not args.chains or name in args.chains}


def measured(name: str, net: nn.Module, work: Work, folder: Path) -> dict[str, Any]:
    """Test accuracy, bytes of the packed file, bit-operations."""
    path = folder / f"{name.replace(' ', '-').replace('%', '')}.ofap"
    size = save_packed(path, net.state_dict())
    score = 100 * accuracy(net, work.data, "test", resolution=RESOLUTION)
    return {"name": name, "accuracy": score, "bytes": size, "bit_operations": bit_operations(net, image_of(net, work))}


def main() -> None:
    """Print a line for each chain, then the bytes of the last one's tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/vgg"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chains", nargs="+", help="only these, by the names that are printed")
    parser.add_argument("--epochs", type=float, default=TUNING.epochs, help="of training codebooks or steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = images()
    net: nn.Module = trained_vgg(args.folder, data)
    work = Work(data, RESOLUTION, args.seed, teacher=net)
    rows = [measured("float32", net, work, args.folder)]
    print(f"{'':36} {'top-1':>6} {'lab':>6} {'bytes':>9} {'smaller':>8} {'Gbit-op':>8} {'s':>5}   seed {args.seed}")
    _print(rows[0], rows[0], 0.0)
    for part in args.only:
        for name, steps in chains(args, part, net, work).items():
            start, made = perf_counter(), net
            for step in steps:
                made = step(made, work)
            rows.append(measured(name, made, work, args.folder))
            _print(rows[-1], rows[0], perf_counter() - start)
    print(size_table(packed_sizes(args.folder / f"{rows[-1]['name'].replace(' ', '-').replace('%', '')}.ofap")))
    print(about())
    if args.out:
        write_json(args.out, {"rows": rows, "seed": args.seed, "epochs": args.epochs, "about": about()})


def _print(row: dict[str, Any], first: dict[str, Any], seconds: float) -> None:
    print(
        f"{row['name']:36} {row['accuracy']:6.2f} {LAB.get(row['name'], ''):>6} {row['bytes']:9,} "
        f"{first['bytes'] / row['bytes']:7.2f}x {row['bit_operations'] / 1e9:8.3f} {seconds:5.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

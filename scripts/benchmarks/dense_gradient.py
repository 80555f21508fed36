"""Gradients of a dense convolution's weights in bfloat16: PyTorch's own against the compiled kernel, in turns.

    python scripts/benchmarks/dense_gradient.py [--rounds 15] [--batch 128] [--layers 384:384:8:3] [--out dense.json]

A layer is its channels in and out, pixels of a side and kernel size.  One thread; a row is the median of the rounds'
ratios of CPU times, PyTorch's over the kernel's, with quartiles.  Needs a processor with AMX.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.dense import dense, usable
from ofa.errors import UserError
from ofa.files import versions, write_json
from ofa.kernels import keep_memory
from scripts.benchmarks.train_step import Row, alternate, line, machine, timed

LAYERS = ("64:64:32:3", "128:128:16:3", "96:384:16:3", "256:256:8:3", "384:384:8:3", "384:384:4:3", "512:512:4:3")


def row(layer: str, batch: int, rounds: int) -> Row:
    """PyTorch's time over the kernel's for one layer."""
    cin, cout, side, kernel = map(int, layer.split(":"))
    weight = torch.randn(cout, cin, kernel, kernel).to(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(batch, cin, side, side).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        if not usable(x, weight, cout):
            raise UserError(f"the kernel does not take layer {layer} here; it needs AMX and 64 channels on both sides")
        outputs = F.conv2d(x, weight, None, 1, kernel // 2), dense(x, weight)
    gy = torch.randn_like(outputs[0])
    stock, ours = (timed(partial(torch.autograd.grad, y, weight, gy, retain_graph=True)) for y in outputs)
    return Row(layer, alternate(stock, ours, rounds), 0)


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="channels in, out, pixels and kernel after colons")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "batch": args.batch}
    print(about, flush=True)
    rows = [row(layer, args.batch, args.rounds) for layer in args.layers]
    print("\n".join(line(found.record()) for found in rows))
    if args.out:
        write_json(args.out, {"rows": [found.record() for found in rows]} | about)


if __name__ == "__main__":
    main()

"""Ways of averaging the gradients of a sandwich step over processes.

    torchrun --nproc-per-node 2 -m scripts.benchmarks.distributed_step [--space digits_mbv3] [--rounds 9] [--batch 32]

Prints for each way the median and the spread of the CPU time and the wall time of a step, whether it runs at all with
elastic depth, and the largest difference of its gradients from those of one process summed over all shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as Ddp

from ofa.parallel import Averaging, Parallel, World, processes
from ofa.space import Arch, Space, load_space
from ofa.supernet import Supernet
from scripts.benchmarks.about import about

Step = Callable[[Tensor, Tensor, list[Arch]], None]


def flat(net: Supernet, world: World, method: str) -> Step:
    """The project's own way."""
    average = Averaging(net.parameters(), world, Parallel(method, start=2))

    def step(x: Tensor, y: Tensor, archs: list[Arch]) -> None:
        run(net, x, y, archs)
        average()

    return step


def run(net: torch.nn.Module, x: Tensor, y: Tensor, archs: list[Arch], quiet: int = 0) -> None:
    """Sandwich with in-place distillation; the first `quiet` networks do not talk, where `net` is DDP's."""
    soft = None
    for i, arch in enumerate(archs):
        silent = net.no_sync() if i < quiet and isinstance(net, Ddp) else nullcontext()
        with silent:
            logits = net(x, arch)
            loss = F.cross_entropy(logits, y) if soft is None else F.cross_entropy(logits, soft)
            (loss / len(archs)).backward()
        soft = logits.detach().softmax(1) if soft is None else soft


def ddp(net: Supernet, *, silent: bool = False, **options: bool) -> Step:
    """DistributedDataParallel, with every backward pass talking or only the last."""
    wrapped = Ddp(net, **options)  # type: ignore[arg-type]
    return lambda x, y, archs: run(wrapped, x, y, archs, quiet=len(archs) - 1 if silent else 0)


def full_last(net: Supernet) -> Step:
    """The largest net runs once without gradients, to teach, and again at the end, when DDP talks."""
    wrapped = Ddp(net)

    def step(x: Tensor, y: Tensor, archs: list[Arch]) -> None:
        with torch.no_grad():
            soft = net(x, archs[0]).softmax(1)
        for i, arch in enumerate([*archs[1:], archs[0]], 1):
            with wrapped.no_sync() if i < len(archs) else nullcontext():
                loss = F.cross_entropy(wrapped(x, arch), soft if i < len(archs) else y)
                (loss / len(archs)).backward()

    return step


WAYS: dict[str, Callable[[Supernet, World], Step]] = {
    "no averaging": lambda net, world: flat(net, World(), "none"),
    "flat": lambda net, world: flat(net, world, "none"),
    "flat, fp16": lambda net, world: flat(net, world, "fp16"),
    "flat, powersgd": lambda net, world: flat(net, world, "powersgd"),
    "DDP find_unused": lambda net, world: ddp(net, find_unused_parameters=True),
    "DDP find_unused, no_sync": lambda net, world: ddp(net, silent=True, find_unused_parameters=True),
    "DDP full last": lambda net, world: full_last(net),
    "DDP": lambda net, world: ddp(net),
    "DDP static_graph": lambda net, world: ddp(net, static_graph=True),
    "DDP no_sync, small last": lambda net, world: ddp(net, silent=True),
}


def steps(space: Space, world: World, batch: int, rounds: int) -> Iterator[tuple[Tensor, Tensor, list[Arch]]]:
    """This process's images of each step, and the networks, which are the same in all."""
    for round_ in range(rounds):
        rng = np.random.default_rng(round_)
        ends = [space.decode(genes)[0] for genes in (space.largest(), space.smallest())]
        archs = [*ends, *space.decode(space.sample(2, rng))]
        torch.manual_seed(1000 * round_ + world.rank)
        side = max(space.resolution)
        x = torch.randn(batch, space.in_channels, side, side).contiguous(memory_format=torch.channels_last)
        yield x, torch.randint(space.classes, (batch,)), archs


def truth(net: Supernet, space: Space, world: World, batch: int) -> list[Tensor | None]:
    """The mean over all shares of their gradients at the first step, computed here alone."""
    net.zero_grad()
    for rank in range(world.size):
        run(net, *next(steps(space, World(rank, world.size), batch, 1)))
    return [None if p.grad is None else p.grad / world.size for p in net.parameters()]


def measure(way: str, space: Space, world: World, batch: int, rounds: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    net = Supernet(space).train()
    expected = truth(net, space, world, batch)
    net.zero_grad()
    cpu, wall, error = [], [], 0.0
    try:
        step = WAYS[way](net, world)
        for i, (x, y, archs) in enumerate(steps(space, world, batch, rounds + 2)):
            dist.barrier()
            began, began_cpu = time.perf_counter(), time.process_time()
            step(x, y, archs)
            cpu.append(1e3 * (time.process_time() - began_cpu))
            wall.append(1e3 * (time.perf_counter() - began))
            if i == 0:
                pairs = [(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True) if g is not None]
                scale = max(float(g.abs().max()) for _, g in pairs)
                error = max(float((p - g).abs().max()) for p, g in pairs if p is not None) / scale
            net.zero_grad()
    except RuntimeError as raised:
        return f"| {way} | raises: {str(raised).split('.')[0].split(chr(10))[0]} | | |"
    return f"| {way} | {_spread(cpu[2:])} | {_spread(wall[2:])} | {error:.1e} |"


def _spread(values: list[float]) -> str:
    """Median, and half the range."""
    return f"{statistics.median(values):.0f} ± {(max(values) - min(values)) / 2:.0f}"


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", default="digits_mbv3")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32, help="images of each process")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    space = load_space(args.space)
    with processes("cpu") as (world, _):
        head = f"{args.space}, {world.size} processes, gloo, batch {args.batch} each, n = {args.rounds}"
        lines = [measure(way, space, world, args.batch, args.rounds) for way in args.ways]
        if world.first:
            print(f"{head}\n{json.dumps(about())}\n\n| way | CPU ms | wall ms | largest difference |")
            print("\n".join(["|---|---|---|---|", *lines]))


if __name__ == "__main__":
    main()

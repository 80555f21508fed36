"""Training, evaluating and extracting subnets, side by side with once-for-all's own code, in turns, as ratios.

    python scripts/benchmarks/train_step.py [--ofa build/once-for-all] [--rounds 9] [--out step.json]

The space is `ofa_mbv3_w1.0` at 32 and 96 pixels.  Both sides get the same architectures, images, labels and loss, one
thread and SGD with Nesterov momentum and weight decay; each otherwise works as its own trainer does.  Every round runs
both sides, the first of them in turns; a row is the median of the rounds' ratios of CPU times, with quartiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.depthwise import depthwise
from ofa.distill import label_loss
from ofa.extraction import extract, recalibrate
from ofa.files import write_json
from ofa.inference import fast
from ofa.kernels import keep_memory
from ofa.layers import convolve, crop_kernel, linear, squeeze_excite
from ofa.modules import ConvBN, SqueezeExcite
from ofa.norm import batch_norm_act
from ofa.schedule import Phase, Schedule
from ofa.space import Arch, Genes, Space, load_space
from ofa.static import StaticNet
from ofa.supernet import Supernet
from ofa.training.optimizer import make_optimizer
from scripts.benchmarks.about import about
from scripts.benchmarks.once_for_all import OnceForAll, add_option, arch_dict
from scripts.benchmarks.once_for_all_worker import pictures

Timer = Callable[[], tuple[float, float]]  # wall and CPU seconds of one run
BATCH = 64
PASSES = 4  # batches of one evaluation
SCHEDULE = Schedule((Phase("only", 1, 0.01),), batch_size=BATCH)
TARGETS = {
    ("step", 32, "largest"): 5.0,
    ("step", 32, "random"): 4.0,
    ("step", 32, "smallest"): 1.6,
    ("step", 96, "largest"): 2.4,
    ("step", 96, "random"): 2.3,
    ("step", 96, "smallest"): 1.7,
}


def timed(work: Callable[[], Any]) -> Timer:
    """A timer of work in this process."""

    def run() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def asked(rival: OnceForAll, command: str, **arguments: Any) -> Timer:
    """A timer of a command in once-for-all's process."""

    def run() -> tuple[float, float]:
        answer = rival(command, **arguments)
        return answer.wall_s, answer.cpu_s

    return run


def alternate(first: Timer, second: Timer, rounds: int) -> NDArray[np.float64]:
    """Seconds (rounds, side, wall or CPU) of two sides in turns, after a round that warms up."""
    found = np.empty((rounds + 1, 2, 2))
    for i, row in enumerate(found):
        for side in (0, 1) if i % 2 else (1, 0):
            row[side] = (first, second)[side]()
    return found[1:]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: how often `ours` fits into `theirs`, by CPU time, and what is to be reached."""

    what: str
    seconds: NDArray[np.float64]  # (rounds, theirs or ours, wall or CPU)
    target: float
    at_most: bool = False

    def record(self) -> dict[str, Any]:
        """The line as JSON values."""
        wall, cpu = np.moveaxis(self.seconds[:, 0] / self.seconds[:, 1], 1, 0)
        low, middle, high = np.quantile(cpu, (0.25, 0.5, 0.75))
        numerator_ms, denominator_ms = 1e3 * np.median(self.seconds[:, :, 1], axis=0)
        return {
            "what": self.what,
            "ratio": middle,
            "quartiles": [low, high],
            "wall_ratio": float(np.median(wall)),
            "target": self.target,
            "reached": bool(middle <= self.target if self.at_most else middle >= self.target),
            "at_most": self.at_most,
            "cpu_ms": [numerator_ms, denominator_ms],
            "n": len(cpu),
        }


class Ours:
    """This project's supernet and one batch."""

    def __init__(self, space: Space, images: NDArray[np.float32], labels: NDArray[np.int64]):
        self.space, self.x, self.y = space, torch.from_numpy(images), torch.from_numpy(labels)
        torch.manual_seed(0)
        self.supernet = Supernet(space)
        self.optimizer = make_optimizer(self.supernet, SCHEDULE)

    def step(self, arch: Arch) -> None:
        """One training step, as Trainer takes it."""
        self.supernet.train()
        _update(self.supernet(self.x, arch), self.y, self.optimizer)

    @torch.inference_mode()
    def evaluate(self, net: nn.Module, passes: int = 1) -> None:
        """Passes of a plain net."""
        for _ in range(passes):
            net(self.x)


def _update(logits: Tensor, y: Tensor, optimizer: torch.optim.SGD) -> None:
    loss = label_loss(logits, y, 0.1)
    loss.backward()
    float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()


def step_rows(ours: Ours, rival: OnceForAll, genes: dict[str, Genes], rounds: int) -> list[Row]:
    """Training steps of each architecture; the random ones make one row."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    side = ours.space.resolution[0]
    for name, row in genes.items():
        arch = ours.space.decode(row)[0]
        theirs = asked(rival, "step", arch=arch_dict(ours.space, row))
        seconds = alternate(theirs, timed(lambda arch=arch: ours.step(arch)), rounds)  # type: ignore[misc]
        found.setdefault(name.partition("_")[0], []).append(seconds)
    return [
        Row(f"training step, {side} px, {name}", np.concatenate(seconds), TARGETS["step", side, name])
        for name, seconds in found.items()
    ]


def elastic_rows(ours: Ours, genes: dict[str, Genes], rounds: int) -> list[Row]:
    """Training steps in the supernet against the same net as a plain one, which runs on the same kernels."""
    seconds = []
    for arch in ours.space.decode(np.concatenate([row for name, row in genes.items() if name.startswith("random")])):
        net = on_same_kernels(extract(ours.supernet, arch)).train()
        optimizer = make_optimizer(net, SCHEDULE)
        plain = timed(lambda net=net, optimizer=optimizer: _update(net(ours.x), ours.y, optimizer))  # type: ignore[misc]
        seconds.append(alternate(timed(lambda arch=arch: ours.step(arch)), plain, rounds))  # type: ignore[misc]
    what = f"training step in the supernet / extracted, {ours.space.resolution[0]} px"
    return [Row(what, np.concatenate(seconds), 1.05, at_most=True)]


def on_same_kernels(net: StaticNet) -> StaticNet:
    """A plain net whose layers call what elastic layers call, kernels cropped as there."""
    for module in net.modules():
        if isinstance(module, ConvBN):
            module.forward = partial(_conv, module)  # type: ignore[method-assign]
        elif isinstance(module, SqueezeExcite):
            module.forward = partial(_gate, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Linear):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
    return net


def _conv(module: ConvBN, x: Tensor) -> Tensor:
    conv, bn = module.conv, module.bn
    if conv.groups > 1:
        y = depthwise(x, crop_kernel(conv.weight, max(x.shape[-2:]), conv.stride[0]), conv.stride[0])
    else:
        y = convolve(x, conv.weight, stride=conv.stride[0])
    act = {nn.Identity: "none", nn.ReLU: "relu", nn.Hardswish: "h_swish"}[type(module.act)]
    return batch_norm_act(y, bn.weight, bn.bias, act) if isinstance(bn, nn.BatchNorm2d) else module.act(y)


def _gate(module: SqueezeExcite, x: Tensor) -> Tensor:
    return squeeze_excite(x, module.reduce, module.expand)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def other_rows(ours: Ours, rival: OnceForAll, genes: Genes, rounds: int) -> list[Row]:
    """What is done with one subnet besides training it in the supernet."""
    arch, named = ours.space.decode(genes)[0], arch_dict(ours.space, genes)
    side = ours.space.resolution[0]
    rival("extract", arch=named)
    net = extract(ours.supernet, arch)
    evaluate = timed(lambda: ours.evaluate(fast(net), PASSES))
    own = timed(lambda: ours.evaluate(net))
    state = timed(lambda: {name: tensor.clone() for name, tensor in net.state_dict().items()})
    extracting = timed(lambda: extract(ours.supernet, arch))
    cases: list[tuple[str, Timer, Timer, float, bool]] = [
        (f"evaluating, {side} px", asked(rival, "forward", passes=PASSES), evaluate, 5.5 if side == 32 else 0, False),
        ("extracting", asked(rival, "extract", arch=named), extracting, 5, False),
        ("extracting / plain copy of the state", extracting, state, 0, False),
        ("  the same of once-for-all", asked(rival, "extract", arch=named), asked(rival, "copy_state"), 0, False),
        (f"recalibrating / own forward pass, {side} px", timed(lambda: recalibrate(net, [ours.x])), own, 1.2, True),
        (f"  the same of once-for-all, {side} px", asked(rival, "recalibrate"), asked(rival, "forward"), 0, False),
    ]
    return [Row(what, alternate(a, b, rounds), target, at_most) for what, a, b, target, at_most in cases]


def architectures(space: Space, n: int, seed: int) -> dict[str, Genes]:
    """The largest, n random and the smallest."""
    drawn = space.sample(n, np.random.default_rng(seed))
    random = {f"random_{i}": drawn[i : i + 1] for i in range(n)}
    return {"largest": space.largest()} | random | {"smallest": space.smallest()}


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = found["quartiles"]
    target = f"{'<=' if found['at_most'] else '>='} {found['target']:4.2f}" if found["target"] else ""
    theirs, mine = found["cpu_ms"]
    return (
        f"{found['what']:48} {found['ratio']:6.2f} [{low:5.2f}, {high:5.2f}]  wall {found['wall_ratio']:6.2f}  "
        f"{target:7}  {theirs:8.1f} / {mine:8.1f} ms  n={found['n']:3} {'' if found['reached'] else 'MISSED'}"
    )


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--random", type=int, default=3, help="random architectures")
    parser.add_argument("--seed", type=int, default=0, help="of the random architectures")
    parser.add_argument("--resolution", type=int, nargs="+", default=[32, 96], help="pixels")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows: list[Row] = []
    with OnceForAll(args.ofa) as rival:
        rival("build", net="ofa_mbv3_w1.0", random_values=False)
        for side in args.resolution:
            images, labels = pictures(BATCH, side, seed=0), np.random.default_rng(0).integers(0, 1000, BATCH)
            rival("given", images=images, labels=labels)
            space = replace(load_space("ofa_mbv3_w1.0"), resolution=(side,))
            genes = architectures(space, args.random, args.seed)
            ours = Ours(space, images, labels)
            for part in (
                partial(step_rows, ours, rival, genes),
                partial(elastic_rows, ours, genes),
                partial(other_rows, ours, rival, genes["random_0"]),
            ):
                rows += (done := part(args.rounds))
                print("\n".join(line(row.record()) for row in done), flush=True)
    options = about() | {"rounds": args.rounds, "seed": args.seed}
    print(options)
    if args.out:
        write_json(args.out, {"rows": [row.record() for row in rows]} | options)


if __name__ == "__main__":
    main()

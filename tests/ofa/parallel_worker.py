"""What torchrun starts for tests/ofa/test_parallel.py: each process writes what it saw to <folder>/<rank>.json."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.data import digits
from ofa.finetune import Finetuning, finetune
from ofa.layers import ElasticBatchNorm
from ofa.parallel import ERROR, Parallel, World, processes
from ofa.schedule import Phase, Schedule
from ofa.space import load_space
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.gradients import Add, Gradients, Scale
from ofa.training.muon import orthogonal
from ofa.training.optimizer import make_optimizer
from ofa.training.watch import Watch
from tests.ofa.nets import RESNET, random_net

SPACE = load_space("digits_mbv3")
ENDS = [SPACE.decode(genes)[0] for genes in (SPACE.largest(), SPACE.smallest())]
WATCH = Watch(random_nets=1, images=60, calibration=60)
FULL = Phase("full", 0.1, 0.05, rule="largest", keep={"kernel": 1, "depth": 1, "expand": 1, "width": 1})
SCHEDULE = Schedule((FULL, Phase("rest", 0.15, 0.05, sort_channels=True)), batch_size=17)  # no multiple of 2
POWERSGD = Parallel("powersgd", rank=1, start=2)
BATCH, STEPS = 9, 6
TUNING = Finetuning(epochs=2, batch_size=125, muon=0.1, views=1)  # 9 steps an epoch, whose batches come twice


class Killed(BaseException):
    """Stands for a signal."""


def net() -> Supernet:
    """With stored statistics, so that each image's loss is its own; they are of `images`, so that signals pass."""
    torch.manual_seed(0)
    module = Supernet(SPACE).eval()

    def settle(norm: Any, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms = [part for part in module.modules() if isinstance(part, ElasticBatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with torch.no_grad():
        module(images()[0], ENDS[0])
    for hook in hooks:
        hook.remove()
    return module


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 1, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (BATCH,), generator=generator)


def flat(module: Supernet) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def truth() -> Tensor:
    """The gradient of the whole batch, by plain autograd in one process."""
    module, (x, y) = net(), images()
    for arch in ENDS:
        (F.cross_entropy(module(x, arch), y) / 2).backward()
    return flat(module)


def averaged(world: World, parallel: Parallel, steps: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The sum of what `steps` steps gave, the mean error that is still held, and which parameters have a gradient."""
    module, (x, y) = net(), images()
    gradients = Gradients(module, BATCH, Scale(world, parallel))

    def losses(x: Tensor, y: Tensor, add: Add) -> Tensor:
        for arch in ENDS:
            add(F.cross_entropy(module(x, arch), y) / 2)
        return x.new_zeros(())

    total = torch.zeros_like(flat(module))
    for _ in range(steps):
        module.zero_grad()
        gradients.of(losses, x[world.rank :: world.size], y[world.rank :: world.size])
        gradients.average()
        total += flat(module)
    held = gradients.average.memory().get(f"{ERROR}{world.rank}", torch.zeros_like(total)).clone()
    dist.all_reduce(held)
    return total, held / world.size, [p.grad is not None for p in module.parameters()]


def overflowed(world: World) -> tuple[bool, bool, bool]:
    """Are gradients finite in a step that overflows in the first process, and after it?  Does recall keep anything?"""
    module, (x, y) = net(), images()
    gradients, finite = Gradients(module, BATCH, Scale(world, POWERSGD)), list[bool]()

    def losses(x: Tensor, y: Tensor, add: Add) -> Tensor:
        loss = F.cross_entropy(module(x, ENDS[0]), y)
        add(loss * (float("inf") if world.first and len(finite) == 3 else 1.0))
        return loss.new_zeros(())

    for _ in range(5):
        gradients.of(losses, x[world.rank :: world.size], y[world.rank :: world.size])
        gradients.average()
        finite.append(bool(flat(module).isfinite().all()))
    assert gradients.memory()[0]
    gradients.recall({}, {}, 1)
    return finite[3], finite[4], bool(gradients.memory()[0])


def turned(world: World) -> tuple[Tensor, int]:
    """Weights after two of Muon's steps on the same gradients, and how many of them this process turned."""
    module, matrices = net(), list[int]()
    optimizer = make_optimizer(module, replace(SCHEDULE, muon=0.1), world)
    generator = torch.Generator().manual_seed(2)

    def counted(given: Tensor) -> Tensor:
        matrices.append(len(given))
        return orthogonal(given)

    with patch("ofa.training.muon.orthogonal", counted):
        for _ in range(2):
            for weight in module.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in module.parameters()]), sum(matrices)


def train(world: World, folder: Path, parallel: Parallel, stop: int | None = None) -> Tensor:
    run = Trainer(SPACE, digits(), SCHEDULE, folder, watch=WATCH, save_seconds=0.0, scale=Scale(world, parallel))

    def report(values: dict[str, Any]) -> None:
        if values["step"] == stop:
            raise Killed

    run.report = report
    with suppress(Killed):
        run.run()
    return torch.cat([tensor.flatten() for tensor in run.supernet.state_dict().values()])


def tune(world: World, net: nn.Module, file: Path, stop: int | None = None) -> Tensor:
    """Weights of a student of a fixed teacher after TUNING, or those of its copy when it was killed."""

    def report(values: dict[str, Any]) -> None:
        if values["step"] == stop:
            raise Killed

    options: dict[str, Any] = {"teacher": random_net(RESNET), "resolution": 16, "report": report, "checkpoint": file}
    with suppress(Killed), patch("ofa.finetune.SAVE_SECONDS", -1.0):
        net = finetune(net, digits(), TUNING, world=world, **options)
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])


def perceptron() -> nn.Module:
    """No batch norm, so that shares of a batch give what the whole gives."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return float((found - expected).norm() / expected.norm())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with processes("cpu") as (world, _):
        found: dict[str, Any] = {"world": [world.rank, world.size]}
        expected = truth()
        for method in ("none", "fp16"):
            got, _, used = averaged(world, Parallel(method), 1)
            found[method] = apart(got, expected)
        found["used"] = used
        sent, held, _ = averaged(world, POWERSGD, STEPS)
        found["powersgd sent"] = apart(sent, STEPS * expected)
        found["powersgd sent and held"] = apart(sent + held, STEPS * expected)
        whole = train(world, folder / "whole", POWERSGD)
        found["resumed"] = []
        for stop in (5, 9):  # before and after the channels are sorted
            train(world, folder / f"killed {stop}", POWERSGD, stop)
            found["resumed"].append(apart(train(world, folder / f"killed {stop}", POWERSGD), whole))
        found["overflowed"] = overflowed(world)
        others = [torch.empty_like(whole) for _ in range(world.size)]
        dist.all_gather(others, whole)
        found["ranks"] = apart(*others)
        (together, own), (alone, every) = turned(world), turned(World())
        found["turned"] = [own, every, apart(together, alone)]
        train(world, folder / "half", Parallel(), 10)
        found["tuned"] = apart(
            tune(world, perceptron(), folder / "tuned.safetensors"),
            tune(World(), perceptron(), folder / f"alone-{world.rank}.safetensors"),
        )
        tuned = tune(world, random_net(), folder / "tuned whole.safetensors")
        found["tuned again"] = []
        for stop in (4, 13):  # while the teacher is asked, and while its answers are read
            file = folder / f"tuned {stop}.safetensors"
            tune(world, random_net(), file, stop)
            found["tuned again"].append(apart(tune(world, random_net(), file), tuned))
        others = [torch.empty_like(tuned) for _ in range(world.size)]
        dist.all_gather(others, tuned)
        found["tuned ranks"] = apart(*others)
        tune(world, random_net(), folder / "tuned half.safetensors", 4)
        part = folder / "tuned part.safetensors"
        if world.first:
            tune(World(), random_net(), part, 4)
        world.wait()
        copies = [folder / f"tuned {name}.safetensors" for name in ("once", "twice")]
        for copy in copies:
            if world.first:
                copy.write_bytes(part.read_bytes())
                copy.with_suffix(".answers").write_bytes(part.with_suffix(".answers").read_bytes())
            world.wait()
            if copy == copies[1]:
                tune(world, random_net(), copy, 6)
        found["tuned twice"] = apart(*(tune(world, random_net(), copy) for copy in copies))
        found["told"] = world.told(world.rank)
        found["merged"] = list(world.merged({str(world.rank): 1}, ("1", "0")))
        found["sum"] = world.sum(world.rank + 1.0)
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

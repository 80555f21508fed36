"""One process or many: who this one is, and how gradients are averaged over all.  W processes.

Each process trains on its share of every batch with the same architectures; its batch norm normalises by the share's
own statistics, which is fine in training: every subnet is recalibrated before it is used.

Gradients are summed over all networks of a step first and then averaged by one all-reduce of one flat buffer.
DistributedDataParallel was measured beside it (`scripts/benchmarks/distributed_step.py`, two gloo processes): plain,
with `static_graph`, with `no_sync` and a small net last it raises with elastic depth; with the largest net last it
raises too, as smaller kernels' transforms are in no largest net; with `find_unused_parameters` and `no_sync` its
gradients and its time are those of the flat buffer, which needs no wrapper, leaves a parameter that no net used without
a gradient, and lets the largest net teach first.  DDP's communication hooks, which compress, work on the flat buffer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ofa.errors import UserError
from ofa.kinds import check_fields

COMPRESSIONS = ("none", "fp16", "powersgd")
PATIENCE = timedelta(hours=2)  # one process may unpack data while the others wait; torchrun notices a death at once
ERROR, FACTORS = "powersgd.error.", ("powersgd.p", "powersgd.q")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of this run: this one's number `rank` of `size`, and `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a batch is this process's, as `ImageData.batches` takes it."""
        return self.rank, self.size

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            self.sum(0.0)

    def told(self, value: Value) -> Value:
        """The first process's value, in all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def merged(self, values: Mapping[str, Value], order: Iterable[str]) -> dict[str, Value]:
        """The entries of all processes' mappings, in `order`."""
        found: list[Any] = [values]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, dict(values))
        every = {name: value for part in found for name, value in part.items()}
        return {name: every[name] for name in order}

    def sum(self, value: float, device: torch.device | str = "cpu") -> float:
        """The sum of all processes' values, the same in all."""
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(box)
        return box.item()

    @torch.no_grad()
    def align(self, module: nn.Module) -> None:
        """Give every process the first one's weights and buffers, in place."""
        state = module.state_dict().values()
        self.spread(state, [0] * len(state))

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor], owners: Iterable[int]) -> None:
        """Give every process each tensor as its owner, a rank, has it, in place."""
        if self.size > 1:
            sent: list[Any] = [
                dist.broadcast(t, owner, async_op=True) for t, owner in zip(tensors, owners, strict=True)
            ]
            for work in sent:
                work.wait()


@contextmanager
def processes(device: str | None) -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started, if it did; which one this is, and its device.

    device: "cpu", "cuda", or None for CUDA where there is one.  Backends: gloo on CPUs, NCCL beside it on GPUs.
    """
    device = found_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(f"{world.local_rank + 1} processes on {gpus} GPUs; start torchrun --nproc-per-node {gpus}")
        device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store(world), rank=world.rank, world_size=size, timeout=PATIENCE)
    try:
        yield world, device
    finally:
        dist.destroy_process_group()


def found_device(device: str | None, process: int | None = None) -> str:
    """`device`, or for None "cuda" where there is one and else "cpu"; UserError for one that is not there.

    process: the number of this one among several on this machine, which share out its GPUs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not known; give cpu, cuda, or null for cuda where there is one")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"PyTorch finds no GPU for device {device!r}; give cpu or null, or install PyTorch for CUDA")
    if device == "cuda" and process is not None:
        return f"cuda:{process % torch.cuda.device_count()}"
    return device


def _store(world: World) -> dist.Store:
    """Where the processes find one another: torchrun's store, a part of it for each start.

    torchrun keeps one store over its restarts: in one part a process would take a dead peer's address for the new one.
    """
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=PATIENCE))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start {start} of {world.size}", store)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The flat buffer as DDP's hooks want it: they know a `torch.distributed.GradBucket`, which only DDP can make."""

    flat: Tensor
    views: list[Tensor]

    def buffer(self) -> Tensor:
        """All gradients, one after the other."""
        return self.flat

    def gradients(self) -> list[Tensor]:
        """Each gradient, a view of the buffer."""
        return self.views

    def index(self) -> int:
        """Its number: there is but one."""
        return 0

    def is_last(self) -> bool:
        """Whether it is the last of a step."""
        return True


@dataclass(frozen=True, slots=True)
class Parallel:
    """What processes send one another of their gradients.

    compression: "none" all; "fp16" half the bytes; "powersgd" two thin matrices for each weight (Vogels et al. 2019,
    algorithm 1), of `rank` columns, from step `start` on.
    """

    compression: str = "none"
    rank: int = 2
    start: int = 100

    def __post_init__(self) -> None:
        check_fields(self)
        if self.compression not in COMPRESSIONS:
            raise UserError(f"compression {self.compression!r} is not known; choose from {', '.join(COMPRESSIONS)}")
        if self.rank < 1 or self.start < 2:
            raise UserError(f"PowerSGD has rank {self.rank}, start {self.start}; give at least rank 1 and start 2")


class Averaging:
    """Averages the gradients of parameters over all processes, in place.

    Parameters without a gradient (of layers that none of the step's networks has) stay without one, in every process
    alike; what PowerSGD remembers of them waits for their next gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, settings: Parallel | None = None) -> None:
        self.parameters, self.world = list(parameters), world
        self.settings = settings or Parallel()
        self.state: Any = None
        if world.size == 1:
            return
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = torch.zeros(sum(sizes), device=self.parameters[0].device)
        parts = zip(flat.split(sizes), self.parameters, strict=True)
        self.bucket = Bucket(flat, [part.view(parameter.shape) for part, parameter in parts])
        if self.settings.compression == "powersgd":
            self.state = _powersgd(self.settings)

    def __call__(self) -> None:
        """Replace each gradient by its mean over all processes."""
        if self.world.size == 1:
            return
        pairs = list(zip(self.parameters, self.bucket.views, strict=True))
        used = [(parameter.grad, view) for parameter, view in pairs if parameter.grad is not None]
        idle = [view for parameter, view in pairs if parameter.grad is None]
        gradients, views = [gradient for gradient, _ in used], [view for _, view in used]
        if idle:
            torch._foreach_zero_(idle)
        torch._foreach_copy_(views, gradients)
        mean = _hook(self.settings.compression)(self.state, self.bucket).wait()
        if mean.data_ptr() != self.bucket.flat.data_ptr():
            self.bucket.flat.copy_(mean)
        torch._foreach_copy_(gradients, views)
        if self.state is None or not self.state.error_dict:
            return
        if self.bucket.flat.isfinite().all():
            self._remember(idle)
        else:  # the step will be left out or undone, and what is remembered of it would spoil all that follow
            self.forget()

    def _remember(self, idle: list[Tensor]) -> None:
        """Keep what PowerSGD sent for parameters that no step will use, and let factors of no gradient start anew.

        A factor of zeros would otherwise stay zero for ever: that of a kernel transform before its phase, for one.
        """
        error, factors = self.state.error_dict[0], self.state.q_memory_dict[0]
        for view in idle:
            error[view.storage_offset() : view.storage_offset() + view.numel()] += view.flatten()
        noise = torch.randn(factors.shape, generator=torch.Generator().manual_seed(self.state.iter))
        factors.copy_(torch.where(factors == 0, noise.to(factors.device), factors))

    def forget(self) -> None:
        """Drop what PowerSGD remembers, as when the channels of weights change their order."""
        if self.state is not None:
            for held in (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict):
                held.clear()
            self.state.rng.seed(0)  # as in a run that goes on from here: it begins with the same factors

    def memory(self) -> dict[str, Tensor]:
        """What PowerSGD goes on from: each process's own errors, and the factors, the same in all."""
        if self.state is None or not self.state.error_dict:
            return {}
        errors, p, q = self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict
        return {f"{ERROR}{self.world.rank}": errors[0], FACTORS[0]: p[0], FACTORS[1]: q[0]}

    def recall(self, memory: Mapping[str, Tensor], step: int) -> None:
        """Go on from the `memory` of all processes after `step` steps.

        Another number of processes than then: each takes the mean of all errors, so that nothing is lost.
        """
        if self.state is None:
            return
        self.forget()
        self.state.iter = step
        errors = [tensor for name, tensor in memory.items() if name.startswith(ERROR)]
        if not errors:
            return
        same = len(errors) == self.world.size
        error = memory[f"{ERROR}{self.world.rank}"] if same else torch.stack(errors).mean(0)
        held = (self.state.error_dict, self.state.p_memory_dict, self.state.q_memory_dict)
        for place, tensor in zip(held, (error, memory[FACTORS[0]], memory[FACTORS[1]]), strict=True):
            place[0] = tensor.to(self.bucket.flat.device)


def _powersgd(settings: Parallel) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    return PowerSGDState(
        None,
        matrix_approximation_rank=settings.rank,
        start_powerSGD_iter=settings.start,
        orthogonalization_epsilon=1e-8,  # a kernel transform before its phase has a gradient of zeros
    )


def _hook(method: str) -> Callable[[Any, Any], torch.futures.Future[Tensor]]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    hooks: dict[str, Any] = {
        "none": default_hooks.allreduce_hook,
        "fp16": default_hooks.fp16_compress_hook,
        "powersgd": powerSGD_hook.powerSGD_hook,
    }
    found: Callable[[Any, Any], torch.futures.Future[Tensor]] = hooks[method]
    return found

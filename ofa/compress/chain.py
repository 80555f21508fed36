"""Compression as a chain of steps, each from a network to a smaller one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ofa.compress.order import check_order
from ofa.errors import UserError
from ofa.modules import evaluating

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.finetune import Finetuning

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Work:
    """What every step may use besides the network.

    resolution: of the images, in pixels.  teacher: the network before the first step, for distillation (None: no
    teacher).  report: gets a dict of values after every optimizer step.
    """

    data: ImageData
    resolution: int
    seed: int = 0
    teacher: nn.Module | None = None
    report: Callable[[dict[str, Any]], None] = lambda values: None

    def finetune(self, net: Net, settings: Finetuning, after_step: Callable[[Net], None] = lambda net: None) -> Net:
        """A trained copy of `net`, as `ofa.finetune.finetune` makes it, with this work's data, teacher and seed."""
        from ofa.finetune import finetune

        return finetune(
            net,
            self.data,
            settings,
            resolution=self.resolution,
            teacher=self.teacher,
            after_step=after_step,
            seed=self.seed,
            report=self.report,
        )


class Step(Protocol):
    """One technique with its options, a record of the configuration."""

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A new network in evaluation mode; `net` is left as it is."""


def compress(net: nn.Module, steps: Mapping[str, Step], work: Work) -> Iterator[tuple[str, nn.Module]]:
    """Each step's name and network, in order; the first network is the teacher where `work` names none.

    Raises UserError, before the first step, where one cannot follow another (`check_order`), and for what
    `check_network` refuses.
    """
    check_order(steps)
    check_network(net)
    work = replace(work, teacher=work.teacher or net)
    for name, step in steps.items():
        net = run_step(name, step, net, work)
        yield name, net


def run_step(name: str, step: Step, net: nn.Module, work: Work) -> nn.Module:
    """What a step makes of a network; raises UserError where that has no finite logits of the same classes."""
    image = next(iter(work.data.calibration("val", 2, work.resolution))).to(next(net.parameters()).device)
    made = step(net, work)
    if not isinstance(made, nn.Module):
        raise UserError(f"step {name} gave {type(made).__name__}; it must return the network")
    with evaluating(net, made), torch.no_grad():
        before, logits = net(image), made(image)
    if logits.shape != before.shape or not logits.isfinite().all():
        given = f"logits {tuple(logits.shape)}, of which {int(logits.isfinite().sum())} are finite"
        raise UserError(f"step {name} gave a network with {given}; it must keep {tuple(before.shape)} finite ones")
    return made


def check_network(net: nn.Module) -> None:
    """Raise UserError for weights that are no plain parameters of one layer each, finite and of single precision."""
    for place, module in net.named_modules():
        if is_parametrized(module) or hasattr(module, "weight_orig"):  # a step would change a copy
            raise UserError(
                f"layer {place} computes its weight from others; make it a plain one with torch.nn.utils.parametrize."
                "remove_parametrizations, or torch.nn.utils.prune.remove"
            )
    owners: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if (first := owners.setdefault(id(parameter), name)) != name:
            raise UserError(f"{first} and {name} are one parameter; make one of them a copy: nn.Parameter(w.clone())")
        if parameter.dtype != torch.float32:
            raise UserError(f"{name} is of {parameter.dtype}; steps work in single precision, give net.float()")
    if wrong := [name for name, p in net.named_parameters() if not p.isfinite().all()]:
        raise UserError(f"{wrong[0]} has values that are not finite; give a network whose training went well")

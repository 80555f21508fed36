"""What ofa-specialize does with ondevice.memory: a plan of what a device can update, and fine-tuning by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ofa.limits import parse_limit, show
from scripts.progress import Progress

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.finetune import Finetuning
    from ofa.ondevice.plan import OnDevice
    from ofa.spec import NetSpec
    from ofa.static import StaticNet


def require_room(spec: NetSpec, options: dict[str, Any]) -> None:
    """Raise UserError where `options` are not understood, or leave no memory for any plan of the network."""
    from ofa.ondevice.plan import smallest

    smallest(spec, read_options(options)[0])


def adapt(net: StaticNet, data: ImageData, options: dict[str, Any], *, seed: int) -> tuple[StaticNet, dict[str, Any]]:
    """The network fine-tuned within a memory limit; the plan and its memory as JSON values.

    Raises UserError, with the least that any plan needs, where the limit is too low.
    """
    from ofa.finetune import finetune
    from ofa.ondevice.memory import as_json
    from ofa.ondevice.modules import Updating
    from ofa.ondevice.plan import choose

    settings, tuning = read_options(options)
    plan = choose(net, data, settings, seed=seed)
    needed = settings.needed(net.spec, plan)
    with Progress("fine-tune on the device") as progress:
        updating = Updating(net, plan)
        tuned = finetune(updating, data, tuning, resolution=net.spec.resolution, seed=seed, report=progress)
        progress.print(f"on-device plan: {len(plan)} layers, {show(needed.total)} of {show(settings.limit)} bytes")
    return tuned.write_to(net), {"limit": settings.limit, "memory": needed.to_dict(), "plan": as_json(plan)}


def read_options(options: dict[str, Any]) -> tuple[OnDevice, Finetuning]:
    """What the device can spend, and how it fine-tunes; raises UserError for options that are not understood."""
    from ofa.finetune import Finetuning
    from ofa.ondevice.plan import OnDevice

    tuning = Finetuning(**options["finetuning"], soft_labels=0.0)
    limit = parse_limit("ondevice.memory", options["memory"], unit="bytes")
    return OnDevice(limit, options["method"], options["images"], tuning.momentum > 0, options["batches"]), tuning

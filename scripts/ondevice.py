"""What ofa-specialize does with ondevice.memory: a plan of what a device can update, and fine-tuning by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ofa.limits import parse_limit, show
from scripts.progress import Progress

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.static import StaticNet


def adapt(net: StaticNet, data: ImageData, options: dict[str, Any], *, seed: int) -> tuple[StaticNet, dict[str, Any]]:
    """The network fine-tuned within a memory limit; the plan and its memory as JSON values.

    Raises UserError, with the least that any plan needs, where the limit is too low.
    """
    from ofa.finetune import Finetuning, finetune
    from ofa.ondevice.memory import as_json
    from ofa.ondevice.modules import Updating
    from ofa.ondevice.plan import OnDevice, choose

    tuning = Finetuning(**options["finetuning"], soft_labels=0.0)
    limit = parse_limit("ondevice.memory_bytes", options["memory"])
    settings = OnDevice(limit, options["method"], options["images"], tuning.momentum > 0, options["batches"])
    plan = choose(net, data, settings, seed=seed)
    needed = settings.needed(net, plan)
    with Progress("fine-tune on the device") as progress:
        updating = Updating(net, plan)
        tuned = finetune(updating, data, tuning, resolution=net.spec.resolution, seed=seed, report=progress)
        progress.print(f"on-device plan: {len(plan)} layers, {show(needed.total)} of {show(limit)} bytes")
    return tuned.write_to(net), {"limit": limit, "memory": needed.to_dict(), "plan": as_json(plan)}

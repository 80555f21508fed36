"""Which steps of compression cannot follow which others, known before any of them begins."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from ofa.errors import UserError

if TYPE_CHECKING:
    from ofa.compress.chain import Step

QUANTIZED = ("Linear", "Mixed", "Pt2e")
FOLDED = (*QUANTIZED, "Equalization")
# Steps that train all weights at a high rate
LOOSE = ("Magnitude", "NOfM", "Movement", "SoftFilter", "binary", "ternary", "scaled")
AFTER = {  # a step, by its class or its kind of levels, and those that take away what it needs
    "Channels": (*QUANTIZED, "Gating", "scaled", "xnor"),  # layers with nothing more in them than weight and bias
    "Gating": (*FOLDED, "Gating"),  # batch norms
    "Scales": FOLDED,  # batch norms
    "xnor": (*QUANTIZED, "scaled", "xnor"),  # layers with nothing more in them than weight and bias
    "Pt2e": ("xnor",),  # convolutions of numbers, where xnor's are of signs
}


def check_order(steps: Mapping[str, Step]) -> None:
    """Raise UserError where a step cannot follow an earlier one, whatever the network.

    Orders that depend on the network or on `keep` are left to the steps, which answer when it is their turn.
    """
    for (earlier, first), (later, second) in combinations(steps.items(), 2):
        finetuning = getattr(second, "finetuning", None)
        trains = finetuning is not None and getattr(second, "mode", "") != "ptq"
        if _kind(first) == "Norms" and trains:
            raise UserError(
                f"step {later} trains or recalibrates, which {earlier} leaves no statistics for; put {later} before it"
            )
        if _kind(first) in FOLDED and _kind(second) in LOOSE and finetuning is not None and finetuning.epochs:
            raise UserError(
                f"step {later} trains all weights, for which {earlier} leaves no batch norms; put {later} before it"
            )
        if _kind(first) not in AFTER.get(_kind(second), ()) or getattr(second, "keep", False):
            continue
        swapped = _kind(second) not in AFTER.get(_kind(first), ())
        remedy = f"put {later} before it" if swapped else "leave one of them out"
        raise UserError(f"step {later} cannot follow {earlier}, which changes the layers that it needs; {remedy}")


def _kind(step: Step) -> str:
    """Which of this project's steps it is; one of somebody else's may follow and precede them all."""
    kind = type(step)
    return getattr(step, "kind", kind.__name__ if kind.__module__.startswith(("ofa.", "scripts.")) else "")

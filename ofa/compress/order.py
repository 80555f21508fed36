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
CODED = ("KMeans", "binary", "ternary", "scaled", "xnor")  # a few values in each layer or channel
SPARSE = ("Magnitude", "NOfM", "Movement")
# Steps that train all weights at a high rate
LOOSE = (*SPARSE, "SoftFilter", "binary", "ternary", "scaled")
AFTER = {  # a step, by its class or its kind of levels, and those that take away what it needs
    "Channels": (*QUANTIZED, "Gating", "scaled", "xnor"),  # layers with nothing more in them than weight and bias
    "Gating": (*FOLDED, "Gating"),  # batch norms
    "Scales": FOLDED,  # batch norms
    "xnor": (*QUANTIZED, "scaled", "xnor"),  # layers with nothing more in them than weight and bias
    "Pt2e": ("xnor",),  # convolutions of numbers, where xnor's are of signs
}
UNDONE = {  # a step, and those whose weights it would change back
    "Scales": CODED,  # by a factor for each channel
    "Equalization": (*QUANTIZED, *CODED),  # the same
    "LowRank": (*QUANTIZED, *CODED),  # new layers
    **dict.fromkeys(("binary", "scaled", "xnor"), SPARSE),  # a sign for each weight, and none for zero
}


def check_order(steps: Mapping[str, Step]) -> None:
    """Raise UserError where a step cannot follow an earlier one, whatever the network.

    Orders that depend on the network or on `keep` are left to the steps, which answer when it is their turn.
    """
    for (earlier, first), (later, second) in combinations(steps.items(), 2):
        if said := _conflict(first, second):
            remedy = "leave one of them out" if _conflict(second, first) else f"put {later} before it"
            raise UserError(f"step {later} {said.format(earlier)}; {remedy}")


def _conflict(first: Step, second: Step) -> str | None:
    """What speaks against the second step after the first, {} standing for its name; None where nothing does."""
    earlier, later = _kind(first), _kind(second)
    finetuning = getattr(second, "finetuning", None) if getattr(second, "mode", "") != "ptq" else None
    trains = finetuning is not None and finetuning.epochs > 0
    keeps = getattr(second, "keep", False)
    if earlier in AFTER.get(later, ()) and not keeps:
        return "cannot follow {}, which changes the layers that it needs"
    if earlier == "Norms" and finetuning is not None:
        return "trains or recalibrates, which {} leaves no statistics for"
    if earlier in FOLDED and later in LOOSE and trains:
        return "trains all weights, for which {} leaves no batch norms"
    if earlier in CODED and later not in ("", "KMeans") and trains:
        return "trains all weights, which would undo {}"
    return "would undo {}" if earlier in UNDONE.get(later, ()) and not keeps else None


def _kind(step: Step) -> str:
    """Which of this project's steps it is; one of somebody else's may follow and precede them all."""
    kind = type(step)
    return getattr(step, "kind", kind.__name__ if kind.__module__.startswith(("ofa.", "scripts.")) else "")

"""The loss of one net of a training step.  N images, K classes."""

from __future__ import annotations

from torch import Tensor

from ofa.distill import Distillation, Outputs, label_loss
from ofa.distill.elastic import widened
from ofa.errors import UserError
from ofa.schedule import Phase, Schedule

SOFT_LABELS = Distillation({"soft_labels": 1.0}, labels=0.0)  # Yu et al. 2020, BigNAS, sec. 3.1


def teaching(schedule: Schedule, *, compiled: bool) -> Distillation:
    """How the nets of a schedule learn from their teachers; raises UserError for what a supernet cannot do."""
    found = schedule.distill or SOFT_LABELS
    if not isinstance(found, Distillation):
        raise UserError(f"schedule.distill is {found}, no way to distil; choose one as in distill@schedule.distill=kl")
    if found.mutual or found.layers:
        raise UserError("distill: nets of a supernet share their weights and stages; leave mutual and layers out")
    if compiled and reads_features(found):
        raise UserError(f"distill: {', '.join(found.losses)} reads what compiled blocks hide; use a loss on logits")
    return found


def reads_features(distill: Distillation) -> bool:
    """Whether a loss compares more than logits."""
    return distill.reads_maps or distill.reads_embedding


def net_loss(distill: Distillation, own: Outputs, labels: Tensor, teacher: Outputs | None, smoothing: float) -> Tensor:
    """Mean loss of a net's outputs: of the labels alone, or of its teacher's outputs, labels beside them.

    labels: classes (N,) or shares of each class (N, K).
    """
    if teacher is None:
        return label_loss(own.logits, labels, smoothing)
    taught = distill(widened(own, teacher), teacher)
    return taught + distill.labels * label_loss(own.logits, labels, smoothing) if distill.labels else taught


def regularized(schedule: Schedule, phase: Phase, i: int) -> bool:
    """Whether net i of a step gets dropout, drop path and label smoothing; the first of a sandwich is the largest."""
    return schedule.regularize == "all" or (i == 0 and phase.rule in ("largest", "sandwich"))

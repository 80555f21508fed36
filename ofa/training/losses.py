"""The loss of one net of a training step.  N images, K classes."""

from __future__ import annotations

from torch import Tensor

from ofa.distill import alpha_divergence, label_loss, soft_label_loss
from ofa.schedule import Phase, Schedule


def net_loss(phase: Phase, logits: Tensor, labels: Tensor, soft: Tensor | None, smoothing: float) -> Tensor:
    """Mean loss of logits (N, K): of the labels alone, or of a teacher's logits `soft` (N, K), labels beside them.

    labels: classes (N,) or shares of each class (N, K).
    """
    if soft is None:
        return label_loss(logits, labels, smoothing)
    taught = alpha_divergence(logits, soft) if phase.loss == "alpha" else soft_label_loss(logits, soft)
    return taught + phase.labels * label_loss(logits, labels, smoothing) if phase.labels else taught


def regularized(schedule: Schedule, phase: Phase, i: int) -> bool:
    """Whether net i of a step gets dropout, drop path and label smoothing; the first of a sandwich is the largest."""
    return schedule.regularize == "all" or (i == 0 and phase.rule in ("largest", "sandwich"))

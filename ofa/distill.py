"""Losses: labels with smoothing and soft labels from a teacher.  N images, K classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def label_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (N, K) with labels (N,), smoothed (Szegedy et al. 2016, sec. 7)."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy with the teacher's softened probabilities, times temperature squared (Hinton et al. 2015).

    `logits` and `teacher`: (N, K).  No gradient flows into the teacher.
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return F.cross_entropy(logits / temperature, target) * temperature**2

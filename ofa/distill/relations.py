"""Losses between the relations of images in a batch.  N images, features (N, D); the networks' D may differ.

No gradient flows into a teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relation_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances (Park et al. 2019, RKD-D, sec. 3.2): mean Huber loss of psi_s and psi_t.

    psi_ij = |f_i - f_j| / mean of all of them, i and j two images of the batch; features (N, D) each; 0 for one image.
    """
    return _mean(F.smooth_l1_loss(_distances(student), _distances(teacher.detach()), reduction="none"))


def relation_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of angles (Park et al. 2019, RKD-A, sec. 3.2): mean Huber loss of the cosines.

    cos_ijk = e_ij . e_kj, e_ij = (f_i - f_j) / |f_i - f_j|, over all i, j, k that are three images; (N, D) each; 0 for
    fewer than three.
    """
    loss = F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()), reduction="none")
    n = len(student)
    same = torch.eye(n, dtype=torch.bool, device=student.device)
    return _mean(loss[~(same[:, :, None] | same[:, None, :] | same[None, :, :])])


def _mean(losses: Tensor) -> Tensor:
    """Their mean; 0 of none, as in a small batch."""
    return losses.sum() / max(1, losses.numel())


def _distances(features: Tensor) -> Tensor:
    """Of all pairs, (N (N - 1) / 2,), relative to their mean."""
    i, j = torch.triu_indices(len(features), len(features), 1, device=features.device)
    distances = (features[i] - features[j]).square().sum(1).add(1e-12).sqrt()
    return distances / distances.mean()


def _cosines(features: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, (N, N, N) in the order j, i, k."""
    unit = F.normalize(features[None] - features[:, None], dim=2)
    return unit @ unit.mT

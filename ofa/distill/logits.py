"""Losses on logits: labels, and what teachers say about every class.  N images, K classes.

No gradient flows into a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.errors import UserError


def label_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (N, K) with labels (N,), smoothed (Szegedy et al. 2016, sec. 7)."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy with the teacher's softened probabilities, times temperature squared (Hinton et al. 2015).

    -T^2 mean_n sum_k p_k log q_k, p = softmax(teacher / T), q = softmax(logits / T); both (N, K).  Its gradient is
    `kl_loss`'s; its least value is T^2 times the entropy of the teacher.
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return F.cross_entropy(logits / temperature, target) * temperature**2


def kl_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened probabilities, times T squared (Hinton et al. 2015, sec. 2).

    T^2 mean_n sum_k p_k log(p_k / q_k), p = softmax(teacher / T), q = softmax(logits / T); both (N, K).
    """
    log_p, log_q = (F.log_softmax(values / temperature, dim=1) for values in (teacher.detach(), logits))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def logit_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Regression of the logits themselves (Ba & Caruana 2014, eq. 1): mean_n 1/2 |z_n - t_n|^2; both (N, K)."""
    return (logits - teacher.detach()).square().sum(1).mean() / 2


def ensemble(teachers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Logits of several teachers as one: T times the log of their mean softened probabilities (Hinton et al. 2015).

    teachers: (N, K) each.  Softened with the same T again, the result (N, K) is the mean of their probabilities.
    """
    logs = torch.stack([F.log_softmax(logits / temperature, dim=1) for logits in teachers])
    return (torch.logsumexp(logs, 0) - math.log(len(teachers))) * temperature


def alpha_divergence(
    logits: Tensor, teacher: Tensor, alpha_min: float = -1.0, alpha_max: float = 1.0, clip: float = 5.0
) -> Tensor:
    """The larger of two alpha-divergences for each image, with clipped importance weights (Wang et al. 2021, AlphaNet).

    D_a(p || q) = sum_k q_k ((p_k / q_k)^a - 1) / (a (a - 1)), p the teacher's, q the student's probabilities, of logits
    (N, K); a = 1 is KL(p || q), a = 0 KL(q || p).  A small a punishes a student that is sure where its teacher
    is not, a large one a student that misses what its teacher sees (sec. 3: the larger of both).  Weights (p / q)^a are
    at most `clip`, in the value as in the gradient -1/a sum_k q_k (p_k / q_k)^a grad log q_k, but for a = 1,
    where q cancels.  Returns the mean over images.  The authors clip each entry of the gradient at 1 besides.
    """
    if clip < 1 or not alpha_min < alpha_max:
        given = f"alpha_min {alpha_min}, alpha_max {alpha_max}, clip {clip}"
        raise UserError(f"{given}: alpha_min must be below alpha_max, clip at least 1; -1, 1 and 5 are AlphaNet's")
    log_q, log_p = F.log_softmax(logits, dim=1), F.log_softmax(teacher.detach(), dim=1)
    (low, low_slope), (high, high_slope) = (_divergence(log_q, log_p, a, clip) for a in (alpha_min, alpha_max))
    value, slope = torch.where(low > high, low, high), torch.where(low > high, low_slope, high_slope)
    return (value + slope - slope.detach()).mean()


def _divergence(log_q: Tensor, log_p: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Of each image, (N,): the divergence, without gradient, and a quantity with the divergence's clipped gradient."""
    constant = log_q.detach()
    q, log_ratio = constant.exp(), log_p - constant
    if abs(alpha - 1) < 1e-3:
        value, weight = (log_p.exp() * log_ratio).sum(1), log_p.exp()
    elif abs(alpha) < 1e-3:
        log_ratio = log_ratio.clamp(max=math.log(clip))
        value, weight = -(q * log_ratio).sum(1), q * log_ratio
    else:
        importance = (alpha * log_ratio).exp().clamp(max=clip)
        value, weight = (q * (importance - 1)).sum(1) / (alpha * (alpha - 1)), q * importance / alpha
    return value, -(weight * log_q).sum(1)

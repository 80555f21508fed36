"""Losses between feature maps of a student and of its teacher.  N images, C channels, H x W pixels, P = H W.

Maps are (N, C, H, W), of one size; where a loss compares channel with channel, the student's went through a learned 1x1
convolution first (`ofa.distill.distiller`).  Sums over elements became means, so that a weight suits every size of map.
No gradient flows into a teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.errors import UserError

KERNELS = ("linear", "poly", "gaussian")


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hints (Romero et al. 2015, FitNets, eq. 3): 1/2 mean (s - t)^2; (N, C, H, W) each.

    s is the student's map after a learned regressor; here it learns together with the labels, not in a stage before.
    """
    return F.mse_loss(student, teacher.detach()) / 2


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis 2017, eq. 2): 1/2 mean_n |q_s - q_t|^2, q = Q / |Q|_2.

    Q (N, P) is the sum over channels of squared activations; the numbers of channels may differ.  The norm is squared,
    as in the authors' code.
    """
    s, t = (F.normalize(maps.square().sum(1).flatten(1), dim=1) for maps in (student, teacher.detach()))
    return (s - t).square().sum(1).mean() / 2


def neuron_loss(student: Tensor, teacher: Tensor, kernel: str = "poly") -> Tensor:
    """Neuron selectivity (Huang & Wang 2017, NST, sec. 4): squared maximum mean discrepancy of the channels' maps.

    mean_ii' k(t_i, t_i') + mean_jj' k(s_j, s_j') - 2 mean_ij k(t_i, s_j) over the channels of an image, mean over
    images; s and t are the maps of one channel, of P pixels and norm 1.  Numbers of channels may differ.
    kernel: linear x.y; poly (x.y)^2; gaussian exp(-|x - y|^2 / (2 v)), v the mean |t_i - s_j|^2 of the image.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel {kernel!r} is not known; choose from {', '.join(KERNELS)}")
    s, t = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher.detach()))
    variance = (2 - 2 * t @ s.mT).mean((1, 2), keepdim=True).detach().clamp_min(1e-6)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        dot = x @ y.mT
        if kernel == "gaussian":
            dot = ((dot - 1) / variance).exp()  # |x - y|^2 is 2 - 2 x.y
        return (dot.square() if kernel == "poly" else dot).mean((1, 2))

    return (mean(t, t) + mean(s, s) - 2 * mean(t, s)).mean()


def flow_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Flow of the solution procedure (Yim et al. 2017, FSP, eq. 1-2): mean (G_s - G_t)^2.

    G[i, j] = mean over pixels of first[i] last[j] (N, C1, C2), first and last two maps of one network; the larger map
    is max-pooled to the smaller.  Both networks have the same numbers of channels.
    """
    return F.mse_loss(_flow(*student), _flow(*teacher).detach())


def _flow(first: Tensor, last: Tensor) -> Tensor:
    size = tuple(map(min, first.shape[2:], last.shape[2:]))
    first, last = (F.adaptive_max_pool2d(maps, size).flatten(2) for maps in (first, last))
    return first @ last.mT / first.shape[2]


def boundary_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Activation boundaries (Heo et al. 2019, AB, sec. 3): mean relu(m - s)^2 where t > 0, relu(m + s)^2 elsewhere.

    m: margin.  Each neuron of the student, after a learned regressor and before an activation, is to be on the side of
    zero that the teacher's is on, whatever the magnitude; (N, C, H, W) each.
    """
    active = teacher.detach() > 0
    return torch.where(active, F.relu(margin - student), F.relu(margin + student)).square().mean()


def channel_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Channel distillation (Zhou et al. 2020, sec. 3): mean over images and channels of (w_s - w_t)^2.

    w (N, C) is each channel's average over the pixels, its attention.
    """
    return F.mse_loss(student.mean((2, 3)), teacher.detach().mean((2, 3)))


def channel_map_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation (Shu et al. 2021, CWD, sec. 3): T^2 mean over channels of KL(p_t || p_s).

    p is the softmax over the P pixels of one channel divided by T; (N, C, H, W) each; mean over images.
    """
    s, t = (F.log_softmax(maps.flatten(2) / temperature, dim=2) for maps in (student, teacher.detach()))
    return (t.exp() * (t - s)).sum(2).mean() * temperature**2


def normalized_feature_loss(student: Tensor, teacher: Tensor, beta: float = 2.0) -> Tensor:
    """Feature distillation (Wei et al. 2022, sec. 3): mean smooth L1 between s and the teacher's whitened features.

    Whitening: layer norm without weights over the channels of each pixel.  Smooth L1: d^2 / (2 beta) up to beta, then
    |d| - beta / 2.  s is the student's map after a learned regressor; (N, C, H, W) each.
    """
    target = F.layer_norm(teacher.detach().movedim(1, -1), teacher.shape[1:2]).movedim(-1, 1)
    return F.smooth_l1_loss(student, target, beta=beta)

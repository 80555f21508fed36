"""A first convolution that whitens what it sees: its filters decorrelate the patches of the training images.

Neighbouring pixels are alike, so a fresh first layer mostly sees brightness, and learns the rest slowly.  After Jordan
2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (there frozen and without batch norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa.data import ImageData
from ofa.errors import UserError
from ofa.supernet import Supernet

IMAGES = 5000  # from which the patches come: hundreds of thousands of 27 to 147 numbers
FLOOR = 1e-3  # added to the variances, so that directions without any do not become noise


@torch.no_grad()
def whiten(supernet: Supernet, data: ImageData) -> None:
    """Set the filters of the supernet's first convolution from the training images, in place.

    Filter 2 i is the i-th principal direction of the patches over its standard deviation, filter 2 i + 1 its negative,
    since the activation cuts one of them off; a narrower net keeps the directions of most variance.  Filters beyond
    twice the numbers of a patch stay as they are.  Raises UserError for a space that does not start with a convolution.
    """
    kinds = [layer.kind for layer in supernet.space.stem]
    if kinds[:1] != ["conv"]:
        raise UserError(f"whiten needs a stem that starts with a conv, not {kinds}; set schedule.whiten=false")
    (conv,) = (m for m in supernet.units[0].modules() if isinstance(m, nn.Conv2d))
    filters = directions(data, max(supernet.space.resolution), conv.kernel_size[0])
    both = torch.stack([filters, -filters], dim=1).flatten(0, 1)[: len(conv.weight)]
    conv.weight[: len(both)] = both.view(-1, *conv.weight.shape[1:]).to(conv.weight)


def directions(data: ImageData, side: int, kernel: int) -> Tensor:
    """Principal directions of K x K patches over their standard deviations, most variance first: (C K K, C K K)."""
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for x, _ in data.batches("train", 250, side, rng=None, limit=IMAGES):
        patches = F.unfold(x, kernel, stride=kernel).transpose(1, 2).flatten(0, 1).double()
        total, count = total + patches.t() @ patches, count + len(patches)
    variance, vectors = torch.linalg.eigh(total / count)
    return (vectors / (variance + FLOOR).sqrt()).t().flip(0)

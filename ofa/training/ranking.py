"""Whether inherited accuracy ranks subnets as their accuracy after short fine-tuning does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import kendalltau

from ofa.errors import UserError
from ofa.evaluate import accuracy, specialise
from ofa.files import append_jsonl, read_jsonl
from ofa.finetune import Finetuning, finetune

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.supernet import Supernet

FEWEST = 3


def rank_correlation(
    supernet: Supernet,
    data: ImageData,
    settings: Finetuning,
    path: Path,
    *,
    nets: int,
    images: int | None = None,
    seed: int = 0,
    report: Callable[[dict[str, Any]], None] = lambda values: None,
) -> dict[str, Any]:
    """Kendall's tau of `nets` random subnets' validation accuracy before and after fine-tuning, with its p-value.

    Both are None where accuracies are all equal, before or after, as the nets then have no order.
    Each net is a line of `path`, {"arch", "inherited", "finetuned"} (0 to 1), and is trained once: a run that was
    stopped goes on with the next.  images: validation images (None: all).
    """
    require_nets(nets)
    archs = supernet.space.decode(supernet.space.sample(nets, np.random.default_rng((seed, 7))))
    for arch in archs[len(read_jsonl(path)) :]:
        net = specialise(supernet, arch, data)
        top1 = accuracy(net, data, "val", resolution=arch.resolution, limit=images)
        tuned = finetune(net, data, settings, resolution=arch.resolution, seed=seed)
        better = accuracy(tuned, data, "val", resolution=arch.resolution, limit=images)
        append_jsonl(path, {"arch": arch.to_dict(), "inherited": top1, "finetuned": better})
        report({"step": len(read_jsonl(path)), "steps": nets, "inherited": top1, "finetuned": better})
    lines = read_jsonl(path)[:nets]
    found = kendalltau([line["inherited"] for line in lines], [line["finetuned"] for line in lines])
    ordered = math.isfinite(found.statistic)
    tau, p = (float(found.statistic), float(found.pvalue)) if ordered else (None, None)
    return {"kendall_tau": tau, "p": p, "nets": nets, "epochs": settings.epochs}


def require_nets(nets: int) -> None:
    """Raise UserError for fewer nets than have a rank correlation."""
    if not isinstance(nets, int) or nets < FEWEST:
        raise UserError(f"{nets} nets have no rank correlation to speak of; give a whole number, at least {FEWEST}")

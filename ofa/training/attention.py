"""A predictor in the loop: subnets measured when a phase begins, from which it learns to rank the candidates.

N architectures, G genes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.evaluate import accuracy, specialise
from ofa.files import append_jsonl, read_jsonl
from ofa.sampling import Score, couple
from ofa.schedule import Phase
from ofa.space import Genes, Space

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.supernet import Supernet
    from ofa.training.watch import Watch

Learn = Callable[[Genes, NDArray[np.float64]], Score]  # genes (N, G) of the whole space and accuracies (N,)


def learn_score(
    phase: Phase,
    space: Space,
    supernet: Supernet,
    data: ImageData,
    watch: Watch,
    learn: Learn | None,
    path: Path,
    rng: np.random.Generator,
    report: Callable[[str], None],
) -> Score:
    """A score for genes of the phase's own `space`, learned from the accuracy of some of its nets.

    Each measured net is a line of `path`, {"arch", "accuracy"}, and is measured once (Wang et al. 2021, sec. 4.2).
    report: gets how many are measured, as "12/64 nets".
    """
    if learn is None:
        raise UserError(f"phase {phase.name} prefers {phase.prefer} nets, which takes a predictor; give learn")
    archs = space.decode(couple(space, space.sample(phase.measured, rng), phase.couple))
    known = [float(line["accuracy"]) for line in read_jsonl(path)]
    for arch in archs[len(known) :]:
        net = specialise(supernet, arch, data, images=watch.calibration)
        known.append(accuracy(net, data, "val", resolution=arch.resolution, limit=watch.images))
        append_jsonl(path, {"arch": arch.to_dict(), "accuracy": known[-1]})
        report(f"{len(known)}/{len(archs)} nets")
    whole = supernet.space
    score = learn(whole.encode(archs), np.array(known[: len(archs)]))
    return lambda genes: score(whole.encode(space.decode(genes)))

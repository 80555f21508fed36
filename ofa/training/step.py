"""One step of training a supernet: which nets, how they are taught, and what the optimizer makes of it."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ofa.data import Augment
from ofa.distill import Outputs, observe
from ofa.drop import Drop
from ofa.sampling import Score, draw
from ofa.schedule import Phase, Schedule
from ofa.space import Arch, Space
from ofa.supernet import Supernet
from ofa.training.gradients import Add, Gradients
from ofa.training.losses import net_loss, reads_features, regularized, teaching
from ofa.training.optimizer import clip, set_rate
from ofa.training.rollback import check_finite, check_gradients
from ofa.training.teacher import Teacher


class Step:
    """Trains a supernet on a batch, in place, on several architectures drawn for the step.

    features: whether teachers have to show more than logits.  Raises UserError for a way to distil that a supernet
    cannot use.
    """

    def __init__(
        self,
        supernet: Supernet,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        schedule: Schedule,
        augment: Augment,
        seed: int,
    ) -> None:
        self.supernet, self.optimizer, self.gradients = supernet, optimizer, gradients
        self.schedule, self.augment, self.seed = schedule, augment, seed
        self.distill = teaching(schedule, compiled=gradients.scale.compile)
        self.features = reads_features(self.distill)

    def __call__(
        self,
        phase: Phase,
        space: Space,
        step: int,
        lr: float,
        x: Tensor,
        y: Tensor,
        teacher: Teacher | None,
        score: Score | None,
    ) -> float:
        """The loss of images (N, C, H, W) with labels (N,), from which the supernet has learned.

        space: what the phase trains of the whole.  teacher: a frozen one.  score: ranks nets, where the phase prefers
        some.  Raises DivergedError where the loss is not finite, or float16 cannot hold the gradients.
        """
        archs = draw(phase, space, self._random(2, step), resolution=x.shape[-1], score=score)
        x, y = x.to(self.gradients.device), y.to(self.gradients.device)
        if self.augment.mixes:
            x, y = self.augment.mixed(x, y, self.supernet.space.classes, self._random(6, step))
        set_rate(self.optimizer, lr)
        self.supernet.train()
        drops = [self._drop(step, i) if regularized(self.schedule, phase, i) else None for i in range(len(archs))]
        loss = self.gradients.of(partial(self._losses, phase, archs, drops, teacher), x, y)
        check_finite(loss, step, phase.name, lr)
        self.gradients.apply(self.optimizer, lambda net: clip(net, self.schedule))
        check_gradients(self.gradients.precision, step, phase.name, lr)
        return loss

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *place))

    def _losses(
        self,
        phase: Phase,
        archs: list[Arch],
        drops: list[Drop | None],
        frozen: Teacher | None,
        x: Tensor,
        y: Tensor,
        add: Add,
    ) -> Tensor:
        """Add the loss of each of `archs`; returns that of the first, which a sandwich makes the largest.

        drops: what each leaves out of a part of a batch; the next part draws on.
        """
        share = 1 / len(archs) if self.schedule.gradient == "mean" else 1.0
        teacher, losses = None, []
        if frozen is not None:
            with torch.no_grad():
                teacher = frozen(x)
        for i, arch in enumerate(archs):
            regular = regularized(self.schedule, phase, i)
            own = self._outputs(x, arch, drops[i])
            loss = net_loss(self.distill, own, y, teacher, self.schedule.label_smoothing if regular else 0.0)
            add(loss * share)
            if i == 0 and phase.teacher == "inplace":
                teacher = own.detached()
            losses.append(loss.detach())
        return losses[0]

    def _outputs(self, x: Tensor, arch: Arch, drop: Drop | None) -> Outputs:
        return observe(self.supernet, x, arch, drop) if self.features else Outputs(self.supernet(x, arch, drop))

    def _drop(self, step: int, net: int) -> Drop | None:
        """What the pass of one net of a step leaves out, in each process something else."""
        path, features = self.schedule.drop_path, self.schedule.dropout
        rng = self._random(4, step, net, self.gradients.scale.world.rank)
        return Drop(path, features, rng) if path or features else None

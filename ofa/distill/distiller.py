"""A student and its teachers while they train: taps, learned regressors, mutual learning.

N images, K classes; maps are (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ofa.distill.logits import label_loss
from ofa.distill.settings import BY_CHANNEL, ON_LOGITS, REGRESSED, Distillation, require_classes
from ofa.distill.taps import Outputs, Tap, match, require_layers, stage_ends
from ofa.inference import fast
from ofa.modules import evaluating


class Distiller:
    """The loss of a student on a batch: its labels' and what its teachers add.

        with Distiller(settings, student, teachers, images) as distiller:
            optimizer = SGD([*student.parameters(), *distiller.parameters()], lr)
            distiller(x, y).backward()

    images: a batch (N, C, H, W), by which layers are paired and sizes known.  Regressors, 1x1 convolutions from the
    student's channels to a teacher's, learn along and are dropped with the distiller.  With `mutual`, the teachers are
    trained in place (give copies where they are to stay).  Raises UserError for layers that do not exist or pair, and
    for a loss on logits between other numbers of classes.
    """

    def __init__(
        self,
        settings: Distillation,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        images: Tensor,
        *,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.settings, self.smoothing = settings, smoothing
        self._modes = {module: module.training for teacher in teachers for module in teacher.modules()}
        pairs = [self._pairs(student, teacher, images) for teacher in teachers]
        self._names = tuple(dict.fromkeys(own for found in pairs for own, _ in found))
        self._own = [[self._names.index(own) for own, _ in found] for found in pairs]
        embedding = settings.reads_embedding
        self.student = Tap(student, self._names, embedding=embedding)
        self.networks = tuple(teachers)
        looked_into = settings.mutual or settings.reads_maps or embedding
        self.teachers = [
            Tap(teacher if looked_into else fast(teacher), [other for _, other in found], embedding=embedding)
            for teacher, found in zip(teachers, pairs, strict=True)
        ]
        for teacher in teachers:
            teacher.train(settings.mutual)
        try:
            self.regressors = self._make_regressors(student, images, seed)
        except BaseException:
            self.close()
            raise

    def ask(self, x: Tensor) -> list[Outputs]:
        """What each teacher says about images (N, C, H, W)."""
        with torch.set_grad_enabled(self.settings.mutual and torch.is_grad_enabled()):
            return [teacher(x) for teacher in self.teachers]

    def __call__(self, x: Tensor, y: Tensor, others: Sequence[Outputs] | None = None) -> Tensor:
        """The loss of a batch of images (N, C, H, W) with labels (N,); others: what `ask` says about it, if known."""
        own = self.student(x)
        others = self.ask(x) if others is None else others
        loss = self._loss(own, y, [self._view(own, i, other) for i, other in enumerate(others)])
        if self.settings.mutual:
            everyone = [own, *others]
            for i, other in enumerate(others, 1):
                rest = [(other, peer) for j, peer in enumerate(everyone) if j != i]
                loss = loss + self._loss(other, y, rest)
        return loss

    def parameters(self) -> Iterator[nn.Parameter]:
        """What learns besides the student: the regressors, and the teachers of mutual learning."""
        yield from self.regressors.parameters()
        if self.settings.mutual:
            for teacher in self.networks:
                yield from (parameter for parameter in teacher.parameters() if parameter.requires_grad)

    def __enter__(self) -> Self:
        """The distiller."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the networks as they were, but for what they learned."""
        self.close()

    def close(self) -> None:
        """Unhook from all networks; teachers are in their own mode again."""
        for tap in (self.student, *self.teachers):
            tap.close()
        for module, mode in self._modes.items():
            module.training = mode

    def _loss(self, own: Outputs, y: Tensor, pairs: Sequence[tuple[Outputs, Outputs]]) -> Tensor:
        """Labels, and the losses between the student, as each of its teachers sees it, and that teacher."""
        loss = own.logits.new_zeros(())
        if self.settings.labels:
            loss = loss + self.settings.labels * label_loss(own.logits, y, self.smoothing)
        return loss + self.settings.among(pairs) if pairs else loss

    def _view(self, own: Outputs, i: int, teacher: Outputs) -> tuple[Outputs, Outputs]:
        """The student's outputs that belong to teacher i's, fitted to its channels."""
        maps = tuple(own.maps[k] for k in self._own[i])
        fitted = tuple(fit(m) for fit, m in zip(self.regressors[i], maps, strict=True))  # type: ignore[call-overload]
        return own._replace(maps=maps, fitted=fitted), teacher

    def _pairs(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[tuple[str, str], ...]:
        if not self.settings.reads_maps:
            return ()
        layers = tuple(self.settings.layers)
        if layers:
            require_layers(student, [own for own, _ in layers], images, "the student")
            require_layers(teacher, [other for _, other in layers], images, "the teacher")
            return layers
        return match(stage_ends(student, images), stage_ends(teacher, images))

    @torch.no_grad()
    def _make_regressors(self, student: nn.Module, images: Tensor, seed: int) -> nn.ModuleList:
        """For each teacher a regressor or nothing for each pair; the classes are compared on the way."""
        with evaluating(student, *self.networks):
            own, *others = (tap(images) for tap in (self.student, *self.teachers))
        found = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for i, other in enumerate(others):
                if self.settings.used & set(ON_LOGITS):
                    require_classes(own, other)
                maps = [own.maps[k] for k in self._own[i]]
                fits = [self._regressor(s, t) for s, t in zip(maps, other.maps, strict=True)]
                found.append(nn.ModuleList(fits))
        return found.to(images.device)

    def _regressor(self, student: Tensor, teacher: Tensor) -> nn.Module:
        used, differs = self.settings.used, student.shape[1] != teacher.shape[1]
        if used & set(REGRESSED) or (differs and used & set(BY_CHANNEL)):
            return nn.Conv2d(student.shape[1], teacher.shape[1], 1)
        return nn.Identity()

"""How a network is taught, as data: which losses, how much of each, at which layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.distill import features, logits, relations
from ofa.distill.features import KERNELS
from ofa.distill.taps import Outputs
from ofa.errors import UserError
from ofa.kinds import check_fields

Loss = Callable[[Outputs, Outputs, "Distillation"], Tensor]


@dataclass(frozen=True, slots=True)
class Distillation:
    """The loss of a student: `labels` times the loss on labels, plus each loss of `losses` times its weight.

    losses: weights by name.  On logits: soft_labels, kl, logits, alpha; on feature maps: hints, attention, neurons,
    flow, boundaries, channels, channel_maps, normalized; on the classifiers' inputs: distances, angles.
    temperature: softens soft_labels, kl and channel_maps.  kernel: of neurons.  alpha_min, alpha_max, clip: of alpha.
    layers: pairs of names of a student's and a teacher's layer (empty: the ends of their stages, paired where maps have
    one size).  mutual: the teachers learn too, each from labels and from all the others (Zhang et al. 2018).
    """

    losses: Mapping[str, float] = field(default_factory=lambda: {"soft_labels": 0.5})
    labels: float = 0.5
    temperature: float = 1.0
    kernel: str = "poly"
    alpha_min: float = -1.0
    alpha_max: float = 1.0
    clip: float = 5.0
    layers: Sequence[tuple[str, str]] = ()
    mutual: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.losses, Mapping):
            raise UserError(f"losses is {self.losses}; give weights by name, as {{kl: 0.5}}, or {{}} for labels alone")
        object.__setattr__(self, "losses", dict(self.losses))
        object.__setattr__(self, "layers", tuple(map(_pair, self.layers)))
        if unknown := set(self.losses) - set(LOSSES):
            raise UserError(f"loss {sorted(unknown)[0]!r} is not known; choose from {', '.join(LOSSES)}")
        if not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in (self.labels, *self.losses.values())):
            raise UserError(
                f"weights {self.losses}, labels {self.labels}: a weight is a finite number, at least 0; 0 leaves it out"
            )
        if self.labels + sum(self.losses.values()) <= 0:
            raise UserError(f"weights {self.losses}, labels {self.labels}: nothing is learned; give a weight above 0")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} must be finite and above 0; 4 is usual, 1 softens nothing")
        if self.kernel not in KERNELS:
            raise UserError(f"kernel {self.kernel!r} is not known; choose from {', '.join(KERNELS)}")
        if self.mutual and not self.used <= set(ON_LOGITS):
            raise UserError(f"mutual learning is on logits, not {', '.join(self.losses)}; use {', '.join(ON_LOGITS)}")

    @property
    def used(self) -> set[str]:
        """Names of the losses with a weight above 0."""
        return {name for name, weight in self.losses.items() if weight}

    @property
    def reads_maps(self) -> bool:
        """Whether a loss compares feature maps."""
        return bool(self.used & set(ON_MAPS))

    @property
    def reads_logits(self) -> bool:
        """Whether the teachers' logits are all that it takes, and they stay what they are."""
        return not (self.mutual or self.reads_maps or self.reads_embedding)

    @property
    def reads_embedding(self) -> bool:
        """Whether a loss compares the classifiers' inputs."""
        return bool(self.used & set(ON_EMBEDDINGS))

    def __call__(self, student: Outputs, *teachers: Outputs) -> Tensor:
        """The weighted sum of the losses between a student and its teachers, without the labels'.

        Several teachers: probabilities are those of their ensemble, other losses the mean over teachers; in mutual
        learning all are (Zhang et al. 2018, sec. 3.4).
        """
        return self.among([(student, teacher) for teacher in teachers])

    def among(self, pairs: Sequence[tuple[Outputs, Outputs]]) -> Tensor:
        """The same, the student given as it is to be compared with each teacher; in float32 under autocast too."""
        with torch.autocast(pairs[0][0].logits.device.type, enabled=False):
            pairs = [(student.in_float32(), teacher.in_float32()) for student, teacher in pairs]
            total = pairs[0][0].logits.new_zeros(())
            for name in sorted(self.used):
                together = name in ENSEMBLED and len(pairs) > 1 and not self.mutual
                taught = [self._ensemble(pairs, name)] if together else pairs
                total = total + self.losses[name] * torch.stack([LOSSES[name](s, t, self) for s, t in taught]).mean()
        return total

    def _ensemble(self, pairs: Sequence[tuple[Outputs, Outputs]], name: str) -> tuple[Outputs, Outputs]:
        temperature = 1.0 if name == "alpha" else self.temperature  # the probabilities that the loss compares
        return pairs[0][0], Outputs(logits.ensemble([teacher.logits for _, teacher in pairs], temperature))


def _pair(pair: Sequence[str]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2:
        raise UserError(f"layers has {pair!r}; each of its entries is a pair [student's layer, teacher's layer]")
    return pair[0], pair[1]


def require_classes(student: Outputs, teacher: Outputs) -> None:
    """Raise UserError where two networks do not have the same number of classes."""
    own, other = student.logits.shape[1], teacher.logits.shape[1]
    if own != other:
        raise UserError(
            f"a loss on logits needs equal classes: the teacher has {other}, the student {own}; give a teacher of the "
            f"same classes, or a loss on features ({', '.join((*ON_MAPS, *ON_EMBEDDINGS))})"
        )


def _maps(loss: Callable[[Tensor, Tensor], Tensor], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean of a loss over pairs of maps, the larger of two averaged to the size of the smaller."""
    return torch.stack([loss(*_resized(s, t)) for s, t in zip(student, teacher, strict=True)]).mean()


def _resized(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    s, t = (maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
    return s, t


def _raw(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda student, teacher, settings: _maps(loss, student.maps, teacher.maps)


def _fitted(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda student, teacher, settings: _maps(loss, _channels(student, teacher), teacher.maps)


def _channels(student: Outputs, teacher: Outputs) -> tuple[Tensor, ...]:
    """The student's maps with the teacher's channels; raises UserError where they have others."""
    maps = student.maps if student.fitted is None else student.fitted
    for own, other in zip(maps, teacher.maps, strict=True):
        if own.shape[1] != other.shape[1]:
            raise UserError(
                f"a loss of channel with channel: the student has {own.shape[1]}, the teacher {other.shape[1]}; "
                "use attention, neurons, distances or angles where no regressor fits one to the other"
            )
    return maps


def _flow(student: Outputs, teacher: Outputs, settings: Distillation) -> Tensor:
    if len(teacher.maps) < 2:
        raise UserError(f"flow is between two layers, {len(teacher.maps)} is given; name at least two pairs in layers")
    own = pairwise(_channels(student, teacher))
    losses = [features.flow_loss(s, t) for s, t in zip(own, pairwise(teacher.maps), strict=True)]
    return torch.stack(losses).mean()


def _embeddings(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def compare(student: Outputs, teacher: Outputs, settings: Distillation) -> Tensor:
        if student.embedding is None or teacher.embedding is None:
            raise UserError("a loss on relations needs networks with a linear classifier; name layers for the others")
        return loss(student.embedding, teacher.embedding)

    return compare


ON_LOGITS: dict[str, Loss] = {
    "soft_labels": lambda s, t, d: logits.soft_label_loss(s.logits, t.logits, d.temperature),
    "kl": lambda s, t, d: logits.kl_loss(s.logits, t.logits, d.temperature),
    "logits": lambda s, t, d: logits.logit_loss(s.logits, t.logits),
    "alpha": lambda s, t, d: logits.alpha_divergence(s.logits, t.logits, d.alpha_min, d.alpha_max, d.clip),
}
ON_MAPS: dict[str, Loss] = {
    "hints": _fitted(features.hint_loss),
    "attention": _raw(features.attention_loss),
    "neurons": lambda s, t, d: _maps(partial(features.neuron_loss, kernel=d.kernel), s.maps, t.maps),
    "flow": _flow,
    "boundaries": _fitted(features.boundary_loss),
    "channels": _fitted(features.channel_loss),
    "channel_maps": lambda s, t, d: _maps(
        partial(features.channel_map_loss, temperature=d.temperature), _channels(s, t), t.maps
    ),
    "normalized": _fitted(features.normalized_feature_loss),
}
ON_EMBEDDINGS: dict[str, Loss] = {
    "distances": _embeddings(relations.relation_distance_loss),
    "angles": _embeddings(relations.relation_angle_loss),
}
LOSSES = ON_LOGITS | ON_MAPS | ON_EMBEDDINGS
ENSEMBLED = ("soft_labels", "kl", "alpha")  # compare probabilities
REGRESSED = ("hints", "boundaries", "normalized")  # always through a regressor, as in their papers
BY_CHANNEL = (*REGRESSED, "flow", "channels", "channel_maps")  # through one where the numbers of channels differ

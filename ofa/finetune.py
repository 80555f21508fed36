"""Fine-tuning of any network: SGD on labels and, where there are teachers, on what they add, with exact resume."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ofa.data import Augment
from ofa.distill import Distillation, Distiller, Outputs
from ofa.distill.answers import Answers
from ofa.errors import UserError
from ofa.evaluate import CALIBRATION_IMAGES
from ofa.extraction import recalibrate
from ofa.kernels import keep_memory
from ofa.kinds import check_fields
from ofa.parallel import Averaging, World
from ofa.precision import Precision, check_precision
from ofa.schedule import positive, share
from ofa.static import StaticNet
from ofa.training.layers import fast_layers
from ofa.training.muon import Muon, turnable
from ofa.weights import load_tensors, load_weights, save_tensors

if TYPE_CHECKING:
    from ofa.data import ImageData

Report = Callable[[dict[str, Any]], None]
Net = TypeVar("Net", bound=nn.Module)
SAVE_SECONDS = 60.0  # between two checkpoints


@dataclass(frozen=True, slots=True)
class Finetuning:
    """How long and how fast: SGD with Nesterov momentum (`muon`: Muon for dense convolutions), a cosine from `lr` to 0.

    epochs: passes over the training images, at least one step (0: only batch norm is recalibrated).  soft_labels: share
    of the teacher's soft labels in the loss, the rest is the labels', smoothed; `distill` takes the place of both
    shares.  clip_norm: of the gradient (None: not clipped).  precision: of the forward pass, as `Precision` takes it.
    views: after so many epochs their batches come again, augmented as they were, and what the teachers said about them
    is read from a file instead of asked again (after Shen & Xing 2022, fast knowledge distillation); None: all epochs
    are new.  augment: of the batches (None: as the data says).
    """

    epochs: float = 5.0
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    soft_labels: float = 0.5
    distill: Distillation | None = None
    clip_norm: float | None = None
    precision: str = "float32"
    muon: float = 0.0
    views: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 <= self.epochs < math.inf and 0 < self.lr < math.inf and self.batch_size >= 2):
            given = f"epochs {self.epochs}, lr {self.lr}, batch_size {self.batch_size}"
            raise UserError(f"{given}: give at least 0 epochs, an lr above 0 and a batch_size of at least 2")
        if not 0 <= self.soft_labels <= 1:
            raise UserError(f"soft_labels is {self.soft_labels}; give a number from 0 to 1")
        for name in ("momentum", "weight_decay", "label_smoothing", "muon"):
            share(name, getattr(self, name))
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        if not isinstance(self.distill, Distillation | None):
            raise UserError(f"finetune.distill is {self.distill}, no way to distil; choose one as in distill=kl")
        if self.views is not None:
            positive("views", self.views)
            if self.distill is not None and not self.distill.reads_logits:
                ways = "give distill=soft_labels, kl, logits or alpha, or views=null"
                raise UserError(
                    f"views={self.views} keeps logits of teachers, and this way to distil takes more; {ways}"
                )
        if not isinstance(self.augment, Augment | None):
            raise UserError(f"augment is {self.augment}, which is no ofa.data.Augment; derive one's own from that")
        check_precision(self.precision)

    def steps(self, images: int) -> int:
        """Optimizer steps on so many training images: at least one, unless epochs is 0."""
        return max(round(self.epochs * (images // min(self.batch_size, images))), int(self.epochs > 0))

    def lesson(self, teachers: int) -> Distillation:
        """What is learned from so many teachers; without one, labels alone."""
        if not teachers:
            return Distillation({}, labels=1.0)
        return self.distill or Distillation({"soft_labels": self.soft_labels}, labels=1 - self.soft_labels)


def finetune(
    net: Net,
    data: ImageData,
    settings: Finetuning,
    *,
    resolution: int | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    after_step: Callable[[Net], None] = lambda net: None,
    seed: int = 0,
    report: Report = lambda values: None,
    checkpoint: str | Path | None = None,
    world: World | None = None,
) -> Net:
    """A trained copy of `net`, on its device, batch norm recalibrated on validation images, in evaluation mode.

    resolution: of the images, in pixels (None: the network's own).  teacher: one or several, on the same device; they
    stay as they are, in mutual learning copies of them learn too.  Only parameters that require gradients are trained.
    `after_step` gets the copy after every optimizer step, and may change its weights in place: it holds pruned weights
    at zero, for instance.  `report` gets step, steps, loss and lr.  checkpoint: a .safetensors file, written every
    minute, from which the same call goes on after a kill and ends with the same weights.  world: the processes that
    share each batch and all call this with the same arguments; each normalises by the statistics of its share.  Raises
    UserError where the loss is not finite, where float16 cannot hold the gradients, where teacher and student do not
    have equal classes though a loss needs it, for unknown layers, and for batches with less than two images for each
    process.
    """
    keep_memory()
    net = copy.deepcopy(net).train()
    data = data if settings.augment is None else replace(data, augment=settings.augment)
    teachers = _teachers(teacher)
    lesson = settings.lesson(len(teachers))
    if not lesson.used:
        teachers = []
    if lesson.mutual:
        teachers = [copy.deepcopy(one) for one in teachers]
    device = next(net.parameters()).device
    if resolution is None:
        resolution = net.spec.resolution if isinstance(net, StaticNet) else data.side
    if isinstance(net, StaticNet) and net.spec.classes != len(data.classes):
        has = f"the network has {net.spec.classes} classes, {data.name} {len(data.classes)}"
        raise UserError(f"{has}; give ofa.static.with_classes(net, {len(data.classes)}), whose classifier is fresh")
    probe = next(iter(data.calibration("val", 2, resolution))).to(device)
    smoothing = settings.label_smoothing
    with Distiller(lesson, net, teachers, probe, smoothing=smoothing, seed=seed) as distiller:
        run = _Run(net, distiller, settings, seed, checkpoint, world or World())
        with fast_layers(net):
            run.train(data, resolution, after_step, report)
    images = data.calibration("val", CALIBRATION_IMAGES, resolution, augment=True)
    with _drawing(device, seed):
        recalibrate(net, (x.to(device) for x in images))
    run.require_finite(settings.steps(data.size("train")))
    return net.eval()


def _teachers(teacher: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if teacher is None:
        return []
    return [teacher] if isinstance(teacher, nn.Module) else list(teacher)


class _Run:
    """The steps of one fine-tuning, and their state on disk."""

    def __init__(
        self,
        net: nn.Module,
        distiller: Distiller,
        settings: Finetuning,
        seed: int,
        checkpoint: str | Path | None,
        world: World,
    ) -> None:
        self.net, self.distiller, self.settings, self.seed, self.world = net, distiller, settings, seed, world
        self.file = None if checkpoint is None else Path(checkpoint)
        self.answers: Answers | None = None  # where batches come again
        self.since = 0  # step from which on this many processes divided the batches, whose answers they know
        self.everything = nn.ModuleList([net, distiller.regressors])
        if distiller.settings.mutual:
            self.everything.extend(distiller.networks)
        learned = [*(p for p in net.parameters() if p.requires_grad), *distiller.parameters()]
        turned = {id(weight) for weight in turnable(net)} if settings.muon else set()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if id(p) not in turned]},
            {"params": [p for p in learned if id(p) in turned], "weight_decay": 0.0, "turn": settings.muon},
        ]
        self.optimizer = Muon(
            groups,
            world,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
            fused=True,
        )
        for parameter in learned:  # fused SGD takes them for granted
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.learned = learned
        self.device = next(net.parameters()).device
        self.precision = Precision(settings.precision, self.device)
        self.average = Averaging(learned, world)
        world.align(self.everything)

    def train(self, data: ImageData, resolution: int, after_step: Callable[[Any], None], report: Report) -> None:
        """All steps, or those that a checkpoint has not seen."""
        size, processes = min(self.settings.batch_size, data.size("train")), self.world.size
        steps = self.settings.steps(data.size("train"))
        if steps and size < 2 * processes:
            raise UserError(
                f"a batch of {size} has less than 2 images for each of {processes} processes; raise batch_size"
            )
        first = self._resume()
        saved = time.monotonic()
        views = self.settings.views
        period = steps if views is None else views * (data.size("train") // size)
        batches = self._batches(data, size, resolution, first)
        known = {step % period for step in range(self.since, first)}
        with self._remembering(known) if period < steps else nullcontext():
            for step in range(first, steps):
                x, y = next(batches)
                weight = len(y) * processes / size  # the mean over the processes is that over the batch
                with _drawing(self.device, self.seed, step, self.world.rank):
                    x, y = x.to(self.device), y.to(self.device)
                    if data.augment.mixes:
                        rng = np.random.default_rng((self.seed, 6, step % period))
                        x, y = data.augment.mixed(x, y, len(data.classes), rng)
                    values = self._step(x, y, step, steps, step % period, weight)
                after_step(self.net)
                if self.world.sum(self.world.first and time.monotonic() - saved > SAVE_SECONDS):
                    self._save(step + 1)
                    saved = time.monotonic()
                report({"step": step + 1, "steps": steps, **values})
        self.require_finite(steps)

    def _batches(self, data: ImageData, size: int, resolution: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of augmented batches from number `start` on, without end, or the same `views` epochs."""
        epoch, done = divmod(start, data.size("train") // size)
        while True:
            drawn = epoch if self.settings.views is None else epoch % self.settings.views
            rng = np.random.default_rng((self.seed, drawn))
            options: dict[str, Any] = {"drop_last": True, "start": done, "epoch": drawn, "share": self.world.share}
            yield from data.batches("train", size, resolution, rng=rng, **options)
            epoch, done = epoch + 1, 0

    @contextmanager
    def _remembering(self, known: set[int]) -> Iterator[None]:
        """What teachers say inside is kept; earlier processes did that for the `known` batches."""
        if self.distiller.networks:
            suffix = ".answers" if self.world.size == 1 else f".answers-{self.world.rank}-of-{self.world.size}"
            with Answers(self.file and self.file.with_suffix(suffix), known) as self.answers:
                yield
            self.answers = None
            if self.file is not None and self.world.first:
                for other in self.file.parent.glob(f"{self.file.stem}.answers*"):  # of other numbers of processes
                    other.unlink(missing_ok=True)
        else:
            yield

    def _asked(self, batch: int, x: Tensor) -> list[Outputs]:
        """What the teachers say about a batch of that number, or said before."""
        if self.answers is None:
            return self.distiller.ask(x)
        said = self.answers(batch, lambda: [teacher.logits for teacher in self.distiller.ask(x)])
        return [Outputs(logits.to(self.device)) for logits in said]

    def _step(self, x: Tensor, y: Tensor, step: int, steps: int, batch: int, weight: float) -> dict[str, float]:
        rate = self.settings.lr * (1 + math.cos(math.pi * step / steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.precision.cast():
            loss = self.distiller(x, y, self._asked(batch, x)) * weight
        mean = self.world.sum(loss.item()) / self.world.size
        if not math.isfinite(mean):
            raise UserError(f"the loss is {mean} at step {step} with learning rate {rate:.3g}; lower lr")
        self.optimizer.zero_grad()
        self.precision.backward(loss)
        self.average()
        self.precision.unscale(self.optimizer)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.learned, self.settings.clip_norm)
        self.precision.step(self.optimizer)
        if self.precision.stuck:
            raise UserError(
                f"gradients overflow float16 at step {step}; give precision=bfloat16, or lower lr ({rate:.3g})"
            )
        return {"loss": mean, "lr": rate}

    def require_finite(self, step: int) -> None:
        """Raise UserError where weights or statistics are no numbers, which the loss before them does not tell."""
        tensors = self.everything.state_dict()
        if wrong := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"weights are not finite after step {step} ({wrong[0]}, learning rate {rate:.3g}); lower lr"
            )

    def _save(self, step: int) -> None:
        self.require_finite(step)
        if self.file is None:
            return
        if self.answers is not None:
            self.answers.flush()
        self.world.wait()
        if not self.world.first:
            return
        tensors = {f"weights.{name}": tensor for name, tensor in self.everything.state_dict().items()}
        for i, parameter in enumerate(self.learned):
            tensors[f"momentum.{i}"] = self.optimizer.state[parameter]["momentum_buffer"]
        values = {"step": step, "loss_scale": self.precision.state()}
        save_tensors(self.file, tensors, values | {"processes": self.world.size, "since": self.since})

    def _resume(self) -> int:
        """Number of steps that the checkpoint has seen, its state loaded; 0 where there is none."""
        if self.file is None or not self.world.told(self.file.exists()):
            return 0
        tensors, state = load_tensors(self.file)
        weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        load_weights(self.everything, weights, self.file)
        for i, parameter in enumerate(self.learned):
            self.optimizer.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum.{i}"])  # its layout is kept
        self.precision.restore(state.get("loss_scale", {}))
        same = state.get("processes", 1) == self.world.size
        self.since = int(state.get("since", 0) if same else state["step"])
        return int(state["step"])


@contextmanager
def _drawing(device: torch.device, *place: int) -> Iterator[None]:
    """What PyTorch draws inside (dropout) depends on `place` alone; the caller's generators stay as they are."""
    seed, cuda = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]), device.type == "cuda"
    seeded = torch.manual_seed if cuda else torch.default_generator.manual_seed  # the first, of all devices, takes long
    with torch.random.fork_rng(devices=[device] if cuda else []):
        seeded(seed)
        yield

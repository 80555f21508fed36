"""Train a supernet: phases over growing spaces, several architectures a step, exact resume.

Everything random is drawn from `default_rng((seed, step or epoch))`, so that a run that was killed and started again
goes on as if nothing had happened, and every worker of a distributed run draws the same architectures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ofa.distill import label_loss, soft_label_loss
from ofa.errors import UserError
from ofa.evaluate import specialise
from ofa.files import append_jsonl, read_jsonl
from ofa.kernels import keep_memory
from ofa.schedule import Phase, Schedule, draw
from ofa.space import Arch, Space
from ofa.static import StaticNet, build_spec
from ofa.supernet import Supernet
from ofa.training.gradients import Add, Gradients, Scale, compile_blocks
from ofa.training.optimizer import make_optimizer, reset_momentum
from ofa.training.state import load_state, save_state, trim_log
from ofa.training.watch import Watch, collapsed
from ofa.units import space_spec
from ofa.weights import load_tensors, load_weights, save_tensors

if TYPE_CHECKING:
    from ofa.data import ImageData

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """One training run in one folder: `run()` starts it or continues it to its end.

    folder: checkpoint.safetensors (weights, momentum, step), log.jsonl (a line an epoch), supernet.safetensors (at the
    end).  initial: a supernet file to start from.
    """

    def __init__(
        self,
        space: Space,
        data: ImageData,
        schedule: Schedule,
        folder: Path,
        *,
        seed: int = 0,
        watch: Watch | None = None,
        save_seconds: float = 60.0,
        device: str = "cpu",
        initial: str | Path | None = None,
        scale: Scale | None = None,
        report: Report = lambda values: None,
    ):
        self.space, self.data, self.schedule, self.folder = space, data, schedule, folder
        self.seed, self.watch, self.save_seconds, self.report = seed, watch or Watch(), save_seconds, report
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_memory()
        torch.manual_seed(seed)
        self.supernet = Supernet(space)
        if initial is not None:
            start_from(self.supernet, initial)
        self.supernet.to(self.device)
        scale = scale or Scale()
        self.world = scale.world
        self.world.align(self.supernet)
        if scale.compile:
            compile_blocks(self.supernet)
        self.gradients = Gradients(self.supernet, schedule.batch_size, scale)
        self.optimizer = make_optimizer(self.supernet, schedule)
        self.steps_per_epoch = data.size("train") // schedule.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"batch_size {schedule.batch_size} is more than the {data.size('train')} training images; lower it"
            )
        self.ends = np.cumsum(schedule.steps(self.steps_per_epoch))
        self.spaces = [space.restrict(**phase.keep) for phase in schedule.phases]
        self.teacher: StaticNet | None = None
        self.step, self.loss_sum, self.loss_steps, self.seconds = 0, 0.0, 0, 0.0

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Supernet:
        """Train to the end of the schedule and return the supernet; continues from the folder's checkpoint."""
        self._resume()
        saved = time.monotonic()
        started = time.monotonic()
        while self.step < self.ends[-1]:
            for x, y in self._batches():
                phase = self._phase()
                if self.step == self._start(phase):
                    self._enter(self.schedule.phases[phase])
                self._train_step(phase, x, y)
                now = time.monotonic()
                self.seconds += now - started
                started = now
                if self._epoch_ends():
                    self._end_epoch(phase)
                    started = time.monotonic()
                if self._epoch_ends() or self.world.sum(self.world.first and now - saved > self.save_seconds):
                    self._save()
                    saved = started = time.monotonic()
                if self._epoch_ends():
                    self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0
                    break
        if self.world.first:
            about = {"space": self.space.to_dict()}
            save_tensors(self.folder / "supernet.safetensors", self.supernet.state_dict(), about)
        return self.supernet

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the rest of this epoch, each at a resolution drawn for its step."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        rng = np.random.default_rng((self.seed, 1, epoch))

        def resolution(batch: int) -> int:
            step = epoch * self.steps_per_epoch + batch
            choices = self.spaces[self._phase(step)].resolution
            return int(np.random.default_rng((self.seed, 3, step)).choice(choices))

        size, share = self.schedule.batch_size, self.world.share
        return self.data.batches("train", size, resolution, rng=rng, drop_last=True, start=done, share=share)

    def _train_step(self, phase: int, x: Tensor, y: Tensor) -> None:
        record = self.schedule.phases[phase]
        rng = np.random.default_rng((self.seed, 2, self.step))
        archs = draw(record, self.spaces[phase], rng, resolution=x.shape[-1])
        x, y = x.to(self.device), y.to(self.device)
        start = self._start(phase)
        rate = self.schedule.rate(record, (self.step - start) / (self.ends[phase] - start))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.supernet.train()
        loss = self.gradients.of(partial(self._losses, record, archs), x, y)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step} of phase {record.name} (learning rate {rate:.3g}); lower the "
                "phase's lr or set clip_norm, and start again with another run folder or restart=true"
            )
        self.gradients.apply(self.optimizer, self.schedule.clip_norm)
        self.step += 1
        self.loss_sum, self.loss_steps = self.loss_sum + loss, self.loss_steps + 1
        self.report({"step": self.step, "steps": int(self.ends[-1]), "phase": record.name, "loss": loss, "lr": rate})

    def _losses(self, phase: Phase, archs: list[Arch], x: Tensor, y: Tensor, add: Add) -> Tensor:
        """Gradient of the mean loss over `archs`; the loss of the first of them, which a sandwich makes the largest."""
        smoothing, losses = self.schedule.label_smoothing, []
        soft = None
        if phase.teacher == "previous" and self.teacher is not None:
            with torch.no_grad():
                soft = self.teacher(x)
        for i, arch in enumerate(archs):
            logits = self.supernet(x, arch)
            loss = label_loss(logits, y, smoothing) if soft is None else soft_label_loss(logits, soft)
            add(loss / len(archs))
            if i == 0 and phase.teacher == "inplace":
                soft = logits.detach()
            losses.append(loss.detach())
        return losses[0]

    def _enter(self, phase: Phase) -> None:
        """What happens once, before the first step of a phase."""
        if phase.sort_channels:
            self.supernet.sort_channels()
            reset_momentum(self.optimizer)
            self.gradients.average.forget()
        if phase.teacher == "previous":
            arch = self.space.decode(self.space.largest())[0]
            self.teacher = specialise(self.supernet, arch, self.data, images=self.watch.calibration)
            if self.world.first:
                save_tensors(self._teacher_file(phase), self.teacher.state_dict())

    def _end_epoch(self, phase: int) -> None:
        record = self.schedule.phases[phase]
        values = {
            "phase": record.name,
            "epoch": math.ceil(self.step / self.steps_per_epoch),
            "epochs": math.ceil(self.ends[-1] / self.steps_per_epoch),
            "loss": self.loss_sum / self.loss_steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
            "images_per_s": self.loss_steps * self.schedule.batch_size / self.seconds,
            "val": self.watch.validate(self.supernet, self.data, self.world),
            "val_images": min(self.watch.images or self.data.size("val"), self.data.size("val")),
        }
        log = self.folder / "log.jsonl"
        values["collapsed"] = collapsed(values["val"], read_jsonl(log), self.space.classes)
        if self.world.first:
            append_jsonl(log, values)
        self.report(values | {"step": self.step, "steps": int(self.ends[-1])})

    # -- state -------------------------------------------------------------------------------------------------------

    def _phase(self, step: int | None = None) -> int:
        """The phase that a step (by default the next) belongs to; the last one after the end."""
        found = np.searchsorted(self.ends, self.step if step is None else step, side="right")
        return min(int(found), len(self.ends) - 1)

    def _start(self, phase: int) -> int:
        return int(self.ends[phase - 1]) if phase else 0

    def _epoch_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.ends[-1]

    def _teacher_file(self, phase: Phase) -> Path:
        return self.folder / f"teacher-{phase.name}.safetensors"

    def _save(self) -> None:
        state = {"step": self.step, "loss_sum": self.loss_sum, "loss_steps": self.loss_steps, "seconds": self.seconds}
        if self._epoch_ends():
            state |= {"loss_sum": 0.0, "loss_steps": 0, "seconds": 0.0}
        save_state(self.folder, self.supernet, self.optimizer, self.gradients, state)

    def _resume(self) -> None:
        state = load_state(self.folder, self.supernet, self.optimizer, self.gradients)
        if state is not None:
            self.step, self.loss_steps = int(state["step"]), int(state["loss_steps"])
            self.loss_sum, self.seconds = float(state["loss_sum"]), float(state["seconds"])
            self._load_teacher()
        whole = int(self.ends[-1]) if self.step == self.ends[-1] else self.step // self.steps_per_epoch
        if self.world.first:
            trim_log(self.folder / "log.jsonl", whole)

    def _load_teacher(self) -> None:
        phase = self.schedule.phases[self._phase()]
        if phase.teacher == "previous" and self.step > self._start(self._phase()):
            teacher = build_spec(space_spec(self.space, self.space.decode(self.space.largest())[0]))
            load_weights(teacher, load_tensors(self._teacher_file(phase))[0], self._teacher_file(phase))
            self.teacher = teacher.to(self.device).eval()


def start_from(supernet: Supernet, path: str | Path) -> None:
    """Load the weights of a supernet file, in place.

    A first or last layer whose shape differs (other channels or classes) keeps its fresh weights; raises UserError for
    any other difference.
    """
    own, (tensors, _) = supernet.state_dict(), load_tensors(path)
    ends = ("units.0.", f"units.{len(supernet.units) - 1}.")
    fresh = {n: own[n] for n, t in tensors.items() if n in own and n.startswith(ends) and t.shape != own[n].shape}
    load_weights(supernet, tensors | fresh, path)


def load_supernet(folder: Path, space: Space) -> Supernet:
    """The trained supernet of a training folder, in evaluation mode."""
    supernet = Supernet(space)
    path = folder / "supernet.safetensors"
    load_weights(supernet, load_tensors(path)[0], path)
    return supernet.eval()

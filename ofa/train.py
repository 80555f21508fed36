"""Train a supernet: phases over growing spaces, several architectures a step, exact resume.

Everything random is drawn from `default_rng((seed, step or epoch))`, so that a run that was killed and started again
goes on as if nothing had happened, and every worker of a distributed run draws the same architectures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ofa.errors import UserError
from ofa.evaluate import specialise
from ofa.files import append_jsonl, read_jsonl
from ofa.kernels import keep_memory
from ofa.kinds import check_kinds
from ofa.sampling import Score
from ofa.schedule import Schedule
from ofa.space import Space
from ofa.supernet import Supernet
from ofa.training.attention import Learn, learn_score
from ofa.training.average import Average
from ofa.training.checkpoint import read_checkpoint, write_checkpoint
from ofa.training.gradients import Gradients, Scale, compile_blocks
from ofa.training.optimizer import make_optimizer, reset_momentum
from ofa.training.rollback import DivergedError, Rollbacks, Safety, check_weights, note_rollback
from ofa.training.state import restore, state_tensors, trim_log
from ofa.training.step import Step
from ofa.training.teacher import Teacher, load_teacher, taken
from ofa.training.trained import AVERAGE, SUPERNET, start_from
from ofa.training.watch import Watch, collapsed, diverged, memory
from ofa.training.whiten import whiten
from ofa.weights import save_tensors

if TYPE_CHECKING:
    from ofa.data import ImageData

Report = Callable[[dict[str, Any]], None]


class Trainer:
    """One training run in one folder: `run()` starts it or continues it to its end.

    folder: a checkpoint (weights, momentum, step), log.jsonl (a line an epoch), good/ (the checkpoint of the
    last epoch without a collapse), rollbacks.jsonl, and, at the end, supernet.safetensors and average.safetensors.  It
    is gone on from with the same space, schedule, seed and images alone.
    initial: a supernet file to start from.  average: decay of a moving average of the weights (None: none).
    learn: makes a predictor from measured nets, for phases that prefer some nets.
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
        safety: Safety | None = None,
        average: float | None = None,
        learn: Learn | None = None,
        report: Report = lambda values: None,
    ):
        if [layer.kind for layer in space.head[-1:]] != ["linear"]:
            raise UserError(f"space {space.name} has no classifier; end its head with {{kind: pool}}, {{kind: linear}}")
        check_kinds(Trainer, {"save_seconds": save_seconds, "average": average})
        if not save_seconds >= 0:
            raise UserError(f"save_seconds is {save_seconds}; give seconds between checkpoints, 60 is usual, 0 for all")
        self.space, self.data, self.schedule, self.folder = space, data, schedule, folder
        self.seed, self.watch, self.save_seconds, self.report = seed, watch or Watch(), save_seconds, report
        self.safety, self.learn = safety or Safety(), learn
        self.device = torch.device(device)
        keep_memory()
        torch.manual_seed(seed)
        self.supernet = Supernet(space)
        first = schedule.phases[0]
        if initial is None and first.teacher in ("full", "previous"):
            raise UserError(
                f"phase {first.name} is the first, its teacher={first.teacher} would have learned nothing; give a "
                "phase before it, train.initial=<file>, or teacher=none"
            )
        if initial is not None:
            start_from(self.supernet, initial)
        elif schedule.whiten:
            whiten(self.supernet, data)
        self.supernet.to(self.device)
        scale = scale or Scale()
        self.world = scale.world
        self.world.align(self.supernet)
        if scale.compile:
            compile_blocks(self.supernet)
        self.gradients = Gradients(self.supernet, schedule.batch_size, scale)
        self.optimizer = make_optimizer(self.supernet, schedule, self.world)
        self.steps_per_epoch = data.size("train") // schedule.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"batch_size {schedule.batch_size} is more than the {data.size('train')} training images; lower it"
            )
        self.ends = np.cumsum(schedule.steps(self.steps_per_epoch))
        self.spaces = [phase.space(space) for phase in schedule.phases]
        self.average = None if average is None else Average(self.supernet, average)
        self.taught = Step(self.supernet, self.optimizer, self.gradients, schedule, data.augment, seed)
        self.teacher: Teacher | None = None
        self.score: Score | None = None
        self.rollbacks = Rollbacks()
        self.step, self.loss_sum, self.loss_steps, self.seconds = 0, 0.0, 0, 0.0

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Supernet:
        """Train to the end of the schedule and return the supernet; continues from the folder's checkpoint."""
        self._resume()
        while self.step < self.ends[-1]:
            try:
                if self._train_epoch():
                    self._keep()
                    continue
                reason, phase = "a net collapsed", self.schedule.phases[self._phase(self.step - 1)].name
            except DivergedError as error:
                if self.rollbacks.count >= self.safety.attempts:
                    raise UserError(f"{error}; {self._remedy()}") from None
                reason, phase = str(error), error.phase
            self._roll_back(reason, phase)
        if self.world.first:
            about = {"space": self.space.to_dict()}
            save_tensors(self.folder / SUPERNET, self.supernet.state_dict(), about)
            if self.average is not None:
                save_tensors(self.folder / AVERAGE, self.average.supernet.state_dict(), about)
        return self.supernet

    def _remedy(self) -> str:
        """What is to be done after a divergence, with what earlier epochs are worth."""
        lower = "lower the phase's lr or set clip_norm, and start again with another run folder"
        if not self.safety.attempts:
            return f"{lower} or restart=true"
        more = f"train.rollback.attempts={2 * self.rollbacks.count} goes on from the last good epoch at lower rates"
        return f"{more}; or {lower}, where train.initial={self.folder / 'good'} keeps what the phases before it learned"

    def _train_epoch(self) -> bool:
        """Train to the end of this epoch, or of the schedule; False where what came of it is to be undone."""
        saved = started = time.monotonic()
        for x, y in self._batches():
            phase = self._phase()
            if self.step == self._start(phase):
                self._enter(phase)
                started = time.monotonic()
            self._train_step(phase, x, y)
            now = time.monotonic()
            self.seconds += now - started
            started = now
            if self._epoch_ends():
                return self._end_epoch(phase)
            if self.world.sum(self.world.first and now - saved > self.save_seconds):
                self._save(self.folder)
                saved = started = time.monotonic()
        raise AssertionError("an epoch ends with its last step")

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the rest of this epoch, each at a resolution drawn for its step."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        rng = np.random.default_rng((self.seed, 1, epoch))

        def resolution(batch: int) -> int:
            step = epoch * self.steps_per_epoch + batch
            choices = self.spaces[self._phase(step)].resolution
            return int(np.random.default_rng((self.seed, 3, step)).choice(choices))

        size, share = self.schedule.batch_size, self.world.share
        return self.data.batches(
            "train", size, resolution, rng=rng, drop_last=True, start=done, share=share, epoch=epoch
        )

    def _train_step(self, phase: int, x: Tensor, y: Tensor) -> None:
        record = self.schedule.phases[phase]
        start, steps = self._start(phase), int(self.ends[phase]) - self._start(phase)
        rate = self.schedule.rate(record, (self.step - start) / steps)
        rate *= self.rollbacks.factor(record.name)
        loss = self.taught(record, self.spaces[phase], self.step, rate, x, y, self.teacher, self.score)
        self.step += 1
        if self.average is not None:
            self.average.update(self.supernet)
        self.loss_sum, self.loss_steps = self.loss_sum + loss, self.loss_steps + 1
        self.report({"step": self.step, "steps": int(self.ends[-1]), "phase": record.name, "loss": loss, "lr": rate})

    def _enter(self, index: int) -> None:
        """What happens once, before the first step of a phase."""
        phase = self.schedule.phases[index]
        if phase.sort_channels:
            self.supernet.sort_channels(self.spaces[index - 1] if index else None)
            reset_momentum(self.optimizer)
            self.gradients.average.forget()
            if self.average is not None:
                self.average.restart(self.supernet)
        for path in taken(self.schedule, index, self.folder):
            arch = self.space.decode(self.space.largest())[0]
            net = specialise(self.supernet, arch, self.data, images=self.watch.calibration)
            if self.world.first:
                save_tensors(path, net.state_dict())
        self.world.wait()
        self._prepare(index)

    def _prepare(self, index: int) -> None:
        """Load or make what a phase's steps need besides the weights."""
        phase = self.schedule.phases[index]
        self.teacher = load_teacher(self.folder, phase, self.space, self.device, features=self.taught.features)
        self.score = None
        if phase.prefer != "none":
            for turn in (self.world.first, not self.world.first):  # the first measures, the others read
                if turn:
                    self.score = self._learn(index)
                self.world.wait()

    def _learn(self, index: int) -> Score:
        """What ranks the nets of a phase that prefers some, measured once and kept on disk."""
        rng, path = np.random.default_rng((self.seed, 5, index)), self._measured_file(index)
        phase, space = self.schedule.phases[index], self.spaces[index]

        def report(measured: str) -> None:
            self.report({"step": self.step, "steps": int(self.ends[-1]), "phase": phase.name, "measured": measured})

        return learn_score(phase, space, self.supernet, self.data, self.watch, self.learn, path, rng, report)

    def _end_epoch(self, phase: int) -> bool:
        """Log the epoch; False where a net collapsed and there are attempts left to roll back."""
        record = self.schedule.phases[phase]
        check_weights(self.supernet, self.step, record.name)
        values = {
            "phase": record.name,
            "epoch": math.ceil(self.step / self.steps_per_epoch),
            "epochs": math.ceil(self.ends[-1] / self.steps_per_epoch),
            "loss": self.loss_sum / self.loss_steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
            "images_per_s": self.loss_steps * self.schedule.batch_size / self.seconds,
            **memory(self.device),
            "val": self._validated(self.supernet),
            "val_images": min(self.watch.images or self.data.size("val"), self.data.size("val")),
        }
        if self.average is not None:
            values["val_average"] = self._validated(self.average.supernet)
        log = self.folder / "log.jsonl"
        chance = self.data.guessing("val")
        values["diverged"] = diverged(values["val"], values["loss"], self.space.classes, chance)
        fell = collapsed(values["val"], read_jsonl(log), chance, values["val_images"])
        values["collapsed"] = self.world.told(fell)
        if self.world.first:
            append_jsonl(log, values)
        self.report(values | {"step": self.step, "steps": int(self.ends[-1])})
        return not values["collapsed"] or self.rollbacks.count >= self.safety.attempts

    def _validated(self, supernet: Supernet) -> dict[str, float]:
        """What the log says of the watched nets, in the precision of training, in which they are the faster."""
        with self.gradients.precision.cast():
            return self.watch.validate(supernet, self.data, self.world)

    # -- state -------------------------------------------------------------------------------------------------------

    def _phase(self, step: int | None = None) -> int:
        """The phase that a step (by default the next) belongs to; the last one after the end."""
        found = np.searchsorted(self.ends, self.step if step is None else step, side="right")
        return min(int(found), len(self.ends) - 1)

    def _start(self, phase: int) -> int:
        return int(self.ends[phase - 1]) if phase else 0

    def _epoch_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.ends[-1]

    def _measured_file(self, phase: int) -> Path:
        return self.folder / f"measured-{self.schedule.phases[phase].name}.jsonl"

    def _keep(self) -> None:
        """Save the state at the end of a good epoch, as the checkpoint and as what a rollback returns to."""
        self.loss_sum, self.loss_steps, self.seconds = 0.0, 0, 0.0
        if self.safety.attempts:
            self._save(self.folder / "good")
        self._save(self.folder)

    def _roll_back(self, reason: str, phase: str) -> None:
        """Return to the last good epoch, at a lower rate for the rest of the phase that went wrong."""
        past = self.rollbacks
        self._load(self.folder / "good")
        self.rollbacks = past
        self.rollbacks.add(phase, self.safety.factor)
        self._save(self.folder)
        self._trim_log()
        if self.world.first:
            for index in range(len(self.ends)):
                if self._start(index) > self.step:
                    self._measured_file(index).unlink(missing_ok=True)
            line = note_rollback(self.folder, reason, back_to=self.step, factor=self.rollbacks.factor(phase))
            self.report({"step": self.step, "steps": int(self.ends[-1]), "rollback": line})
        self.world.wait()

    def _save(self, folder: Path) -> None:
        values: dict[str, Any] = {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "seconds": self.seconds,
        }
        values |= {"rollbacks": self.rollbacks.to_dict(), "averaged": self.average.steps if self.average else 0}
        values["run"] = self._settings()
        held, memory = self.gradients.memory()
        tensors = state_tensors(self.supernet, self.optimizer, self.average)
        write_checkpoint(folder, tensors | held, values | memory, self.world)

    def _load(self, folder: Path) -> bool:
        """Go on from a folder's checkpoint; False where it has none."""
        found = read_checkpoint(folder)
        if found is None:
            return False
        tensors, values = found
        mine = self._settings()
        if other := [name for name, value in values.get("run", {}).items() if value != mine[name]]:
            raise UserError(f"{folder} holds a training with another {other[0]}; give the same one, or another folder")
        restore(tensors, self.supernet, self.optimizer, self.average, folder)
        self.step, self.loss_steps = int(values["step"]), int(values["loss_steps"])
        self.loss_sum, self.seconds = float(values["loss_sum"]), float(values["seconds"])
        self.gradients.recall(tensors, values, self.step)
        self.rollbacks = Rollbacks.from_dict(values["rollbacks"])
        if self.average is not None:
            self.average.steps = int(values["averaged"])
        if self.step > self._start(self._phase()):
            self._prepare(self._phase())
        return True

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint can only be gone on from with."""
        settings = {"space": repr(self.space.to_dict()), "schedule": repr(self.schedule), "seed": self.seed}
        return settings | {"number of training images": self.data.size("train")}

    def _resume(self) -> None:
        self._load(self.folder)
        if self.safety.attempts and not self.world.told((self.folder / "good").exists()):
            self._save(self.folder / "good")
        self._trim_log()

    def _trim_log(self) -> None:
        whole = int(self.ends[-1]) if self.step == self.ends[-1] else self.step // self.steps_per_epoch
        if self.world.first:
            trim_log(self.folder / "log.jsonl", whole)

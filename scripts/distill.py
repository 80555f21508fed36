"""ofa-distill: train a student of any architecture from one or several teachers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import make, stage_command
from scripts.parts import finetuning, load_data
from scripts.shared import in_turn, shared_progress, shared_stage
from scripts.stage import note, plain

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ofa.data import ImageData
    from ofa.distill import Distillation
    from ofa.distill.nets import Named
    from ofa.finetune import Finetuning
    from ofa.parallel import World

READS = ("data", "augment", "seed", "student", "teacher", "finetune")


@stage_command("finetune", "distill", "data")
def main(cfg: DictConfig) -> None:
    """Train student=digits_mbv3/smallest from teacher=<card> by distill=relations.  Writes <run>/distill/student.json.

    A student or teacher is a card, a block list, <space>/smallest, <space>/largest, <space>/<arch.json> (a space is a
    name in conf/space or a .yaml file), or a name of torchvision; weights follow an @, as in teacher=resnet18@net.pth.
    A student with weights for other classes gets a fresh classifier.  Several teachers are a list.
    """
    if not cfg.student or not cfg.teacher:
        raise UserError("ofa-distill needs both; give student=digits_mbv3/smallest teacher=<card>, or others")
    from ofa.parallel import processes

    with processes(cfg.train.device) as (world, device):
        data = replace(in_turn(world, lambda: load_data(cfg)), augment=make(cfg.augment))
        parts = in_turn(world, lambda: _parts(cfg, data, device))  # a mistake is answered before there is a folder
        with shared_stage(cfg, "distill", READS, world) as stage:
            if not stage.done:
                note(cfg.run, data=data.describe())
                _distil(cfg, data, *parts, stage.folder, world)


def load_teachers(
    cfg: DictConfig, data: ImageData, settings: Distillation, resolution: int, device: str | torch.device
) -> list[Named]:
    """The networks of teacher=, which are to take images of `resolution` pixels, on a device.

    Raises UserError for one that cannot, and for one that has learned nothing and is not to learn along.
    """
    from ofa.distill.nets import load_net, require_images

    found = []
    for text in [cfg.teacher] if isinstance(cfg.teacher, str) else cfg.teacher:
        found.append(load_net(str(text), data))
        if not found[-1].learned and not settings.mutual:
            raise UserError(
                f"teacher {text} has no weights; give {text}@<file>, or distill=mutual, where it learns too"
            )
        require_images(found[-1].net.to(device), f"teacher {text}", data, resolution, others=True)
    return found


def _parts(cfg: DictConfig, data: ImageData, device: str) -> tuple[Finetuning, Named, list[Named]]:
    """The settings, the student and its teachers, on a device."""
    import torch

    from ofa.distill.nets import load_net, require_images

    settings = finetuning(cfg)
    if not settings.epochs:
        raise UserError("finetune.epochs=0 trains nothing; give finetune.epochs=<passes over the training images>")
    torch.manual_seed(cfg.seed)
    student = load_net(str(cfg.student), data, adapt=True)
    resolution = _resolution(student, data)
    require_images(student.net.to(device), f"student {cfg.student}", data, resolution)
    return settings, student, load_teachers(cfg, data, settings.lesson(1), resolution, device)


def _resolution(student: Named, data: ImageData) -> int:
    """The side of the images that the student learns from, in pixels."""
    from ofa.static import StaticNet

    return student.net.spec.resolution if isinstance(student.net, StaticNet) else data.side


def _distil(
    cfg: DictConfig,
    data: ImageData,
    settings: Finetuning,
    student: Named,
    teachers: list[Named],
    folder: Path,
    world: World,
) -> None:
    """Train the student; the first process writes it, and says how good it and its teachers are."""
    from ofa.evaluate import accuracy
    from ofa.files import write_json
    from ofa.finetune import finetune
    from ofa.training.watch import at_chance

    resolution = _resolution(student, data)
    state = folder / "state.safetensors"
    options: dict[str, Any] = {"seed": cfg.seed, "checkpoint": state, "resolution": resolution, "world": world}
    with shared_progress("distill", world) as options["report"]:
        net = finetune(student.net, data, settings, teacher=[found.net for found in teachers], **options)
    if not world.first:
        return
    named = {"student": net} | {f"teacher {i}": found.net for i, found in enumerate(teachers)}
    if settings.lesson(1).mutual:
        named = {"student": net}  # the teachers that learned along are gone
    probe = next(iter(data.calibration("val", 1, resolution))).to(next(net.parameters()).device)
    named = {name: one for name, one in named.items() if one(probe).shape[1] == len(data.classes)}
    scores = {name: accuracy(one, data, "val", resolution=resolution) for name, one in named.items()}
    training = {"student": cfg.student, "teacher": plain(cfg.teacher), **asdict(settings)}
    file = _save(folder, student._replace(net=net.cpu()), data, cfg.seed, scores["student"], training)
    write_json(folder / "result.json", {"accuracy_val": scores, "network": str(file), **training})
    state.unlink(missing_ok=True)
    said = ", ".join(f"{name} {100 * top1:.1f} %" for name, top1 in scores.items())
    said = said if len(teachers) > 1 else said.replace("teacher 0", "teacher")
    print(f"validation top-1 at {resolution} x {resolution} pixels: {said}; {file}")
    if at_chance(scores["student"], data.guessing("val")):
        print("warning: the student has learned next to nothing; lower finetune.lr, or raise finetune.epochs")


def _save(folder: Path, student: Named, data: ImageData, seed: int, top1: float, training: dict[str, Any]) -> Path:
    """A plain network as a card and its weights, any other as a PyTorch file of weights; the file to give on."""
    from ofa.export.card import save_net
    from ofa.static import StaticNet
    from predictors.spec import spec_costs

    net = student.net
    if not isinstance(net, StaticNet):
        return _save_weights(folder / "student.pth", net)
    values = {"accuracy_val": top1} | spec_costs(net.spec)
    save_net(folder / "student.json", net, student.card(data, seed, values, training))
    return folder / "student.json"


def _save_weights(path: Path, net: nn.Module) -> Path:
    import io

    import torch

    from ofa.files import atomic_write

    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    atomic_write(path, buffer.getvalue())
    return path


if __name__ == "__main__":
    main()

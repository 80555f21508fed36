"""ofa-specialize: extract, fine-tune and prune the network that the search chose for each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import Arch
from scripts.cli import make, stage_command
from scripts.distill import load_teachers
from scripts.ondevice import adapt, read_options, require_room
from scripts.parts import SEARCH, finetuning, load_parts, reachable, require_images, trained
from scripts.shared import in_turn, shared_progress, shared_stage
from scripts.stage import plain

if TYPE_CHECKING:
    from torch import nn

    from ofa.data import ImageData
    from ofa.finetune import Finetuning
    from ofa.parallel import World
    from ofa.space import Space
    from ofa.static import StaticNet

READS = (*SEARCH, "teacher", "finetune", "compress.pruning", "compress.finetuning")
RESULT = "result.json"  # written when both networks are
STATE = "state.safetensors"  # of a fine-tuning, kept until then


@dataclass(frozen=True, slots=True)
class Job:
    """One device's network: what it is made from, the folder that it is written to, and the processes that make it."""

    cfg: DictConfig
    data: ImageData
    space: Space
    arch: Arch
    folder: Path
    world: World


@stage_command("finetune", "distill", "compress", "ondevice", "device")
def main(cfg: DictConfig) -> None:
    """Extract each device's network, fine-tune it (finetune.epochs=10), prune it.  Writes <run>/specialize/<device>."""
    from ofa.parallel import processes
    from ofa.units import space_spec

    check(cfg)
    with processes(cfg.train.device) as (world, _):
        data, space = in_turn(world, lambda: load_parts(cfg))
        if world.first:
            require_images(cfg, data)
        devices = world.told(reachable(cfg) if world.first else [])
        chosen = {device: Path(cfg.run, "search", device, "chosen.json") for device in devices}
        for path in chosen.values():
            if cfg.ondevice.memory is not None and path.exists():  # where not, its stage says what is missing
                require_room(space_spec(space, _arch(path)), plain(cfg.ondevice))
        for device, path in chosen.items():
            reads = (*READS, f"device.{device}")
            with shared_stage(cfg, f"specialize/{device}", reads, world, needs=("search",)) as stage:
                _make(Job(cfg, data, space, _arch(path), stage.folder, world))


def _make(job: Job) -> None:
    """Write what is missing of a device's networks."""
    if job.world.told((job.folder / RESULT).exists()):
        require_arch(job.arch, job.folder)
    else:
        _specialize(job)
    if job.world.first:
        for state in job.folder.glob(f"*-{STATE}"):
            state.unlink()
        if job.cfg.ondevice.memory is not None:
            _adapt(job)


def check(cfg: DictConfig) -> None:
    """Raise UserError for settings that would fail only after a search, when its networks are fine-tuned and pruned."""
    finetuning(cfg)
    make(cfg.compress)
    if cfg.ondevice.memory is not None:
        read_options(plain(cfg.ondevice))


def _arch(chosen: Path) -> Arch:
    from ofa.files import read_json

    return Arch.from_dict(read_json(chosen)["arch"])


def _specialize(job: Job) -> None:
    """Make the fine-tuned network and the pruned one; the first process writes each with its card."""
    from ofa.compress.prune import prune
    from ofa.files import write_json

    compress, device = make(job.cfg.compress), job.folder.name
    net, training = _float(job)
    start = prune(net, compress.pruning)
    pruned = _tuned(job, f"fine-tune for {device}", "pruned", start, compress.finetuning, net)
    if not job.world.first:
        return
    then = [
        *training,
        {"pruning": asdict(compress.pruning)},
        {"teacher": "float", **asdict(compress.finetuning)},
    ]
    made = {"float": (net, training), "pruned": (pruned, then)}
    result = {name: _save(job, name, *parts) for name, parts in made.items()}
    write_json(job.folder / RESULT, result)
    reached = {name: values["accuracy_val"] for name, values in result.items()}
    if training:
        _warn("float", training[0]["accuracy_val_before"], reached["float"], job.data, "lower finetune.lr")
    _warn("pruned", reached["float"], reached["pruned"], job.data, "lower compress.finetuning.lr, or prune less")
    top1 = ", ".join(f"{name} {100 * share:.1f} %" for name, share in reached.items())
    print(f"{device}: validation top-1 {top1}")


def _adapt(job: Job) -> None:
    """Write the pruned network as a device could fine-tune it, and the plan, unless it was made with these options."""
    from ofa.export.card import load_card, rebuild
    from ofa.files import read_json, write_json
    from ofa.parallel import found_device

    path, options = job.folder / "plan.json", plain(job.cfg.ondevice)
    if path.exists() and read_json(path).get("options") == options:
        return
    path.unlink(missing_ok=True)  # it is to speak for what is written now
    pruned = job.folder / "pruned.json"
    net = rebuild(pruned).to(found_device(job.cfg.train.device))
    tuned, plan = adapt(net, job.data, options, seed=job.cfg.seed)
    card = load_card(pruned)
    costs = _save(job, "ondevice", tuned, [*card.training["finetuning"], {"ondevice": plan["memory"]}])
    before = card.metrics["accuracy_val"].value
    _warn("on-device", before, costs["accuracy_val"], job.data, "lower ondevice.finetuning.lr")
    write_json(path, plan | {"accuracy_val": costs["accuracy_val"], "options": options})


def _float(job: Job) -> tuple[StaticNet, list[dict[str, Any]]]:
    """The chosen network with the supernet's weights, fine-tuned where that is asked for, and what was done."""
    from ofa.evaluate import accuracy, specialise

    cfg, side = job.cfg, job.arch.resolution
    supernet, settings = trained(cfg, job.space), finetuning(cfg)
    net = specialise(supernet, job.arch, job.data)
    if not settings.epochs:
        return net, []
    if cfg.teacher is None:
        largest = replace(job.space.decode(job.space.largest())[0], resolution=side)
        teachers: list[nn.Module] = [specialise(supernet, largest, job.data)]
    else:
        device = next(net.parameters()).device
        found = in_turn(job.world, lambda: load_teachers(cfg, job.data, settings.lesson(1), side, device))
        teachers = [teacher.net for teacher in found]
    before = accuracy(net, job.data, "val", resolution=side)
    net = _tuned(job, f"fine-tune the float network for {job.folder.name}", "float", net, settings, teachers)
    step = {
        "teacher": plain(cfg.teacher) or "the supernet's largest",
        "accuracy_val_before": before,
        **asdict(settings),
    }
    return net, [step]


def _tuned(
    job: Job, title: str, name: str, net: StaticNet, settings: Finetuning, teacher: nn.Module | list[nn.Module]
) -> StaticNet:
    """The network fine-tuned by all processes, which go on from the folder's state of that name."""
    from ofa.finetune import finetune

    options: dict[str, Any] = {"checkpoint": job.folder / f"{name}-{STATE}", "seed": job.cfg.seed, "world": job.world}
    with shared_progress(title, job.world) as report:
        return finetune(net, job.data, settings, teacher=teacher, report=report, **options)


def _warn(name: str, before: float, after: float, data: ImageData, remedy: str) -> None:
    """Say where fine-tuning left a network near chance, or far below what it had learned."""
    from ofa.training.watch import at_chance, collapsed

    chance = data.guessing("val")
    fell = at_chance(after, chance) and after < before
    if fell or collapsed({name: after}, [{"val": {name: before}}], chance, data.size("val")):
        print(f"warning: the {name} network fell from {100 * before:.1f} to {100 * after:.1f} %; {remedy}")


def require_arch(arch: Arch, folder: Path) -> None:
    """Raise UserError where a finished folder holds another network than the one that is chosen now."""
    from ofa.export.card import load_card

    if load_card(folder / "float.json").arch != arch:
        raise UserError(f"the search chose another network after {folder} was made; give restart=true to make it again")


def _save(job: Job, name: str, net: StaticNet, steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Write the network with its card; its validation accuracy and exact costs."""
    from ofa.evaluate import accuracy
    from ofa.export.card import Card, metrics_of, save_net
    from predictors.spec import spec_costs

    values = {"accuracy_val": accuracy(net, job.data, "val", resolution=job.arch.resolution)} | spec_costs(net.spec)
    about, training = job.data.describe(), {"finetuning": steps}
    card = Card(job.arch, job.space.to_dict(), net.spec, metrics_of(values), about, job.cfg.seed, training=training)
    save_net(job.folder / f"{name}.json", net, card)
    return values


if __name__ == "__main__":
    main()

"""ofa-specialize: extract, fine-tune and prune the network that the search chose for each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import Arch
from scripts.cli import make, stage_command
from scripts.distill import load_teachers
from scripts.ondevice import adapt, read_options, require_room
from scripts.parts import SEARCH, load_parts, reachable, require_images, trained
from scripts.progress import Progress
from scripts.stage import open_stage, plain

if TYPE_CHECKING:
    from torch import nn

    from ofa.data import ImageData
    from ofa.space import Space
    from ofa.static import StaticNet

READS = (*SEARCH, "teacher", "finetune", "compress.pruning", "compress.finetuning")
RESULT = "result.json"  # written when both networks are
STATE = "state.safetensors"  # of a fine-tuning, kept until then


@stage_command("finetune", "distill", "compress", "ondevice", "device")
def main(cfg: DictConfig) -> None:
    """Extract each device's network, fine-tune it (finetune.epochs=10), prune it.  Writes <run>/specialize/<device>."""
    from ofa.units import space_spec

    check(cfg)
    data, space = load_parts(cfg)
    require_images(cfg, data)
    chosen = {device: Path(cfg.run, "search", device, "chosen.json") for device in reachable(cfg)}
    for path in chosen.values():
        if cfg.ondevice.memory is not None and path.exists():  # where not, its stage says what is missing
            require_room(space_spec(space, _arch(path)), plain(cfg.ondevice))
    for device, path in chosen.items():
        with open_stage(cfg, f"specialize/{device}", (*READS, f"device.{device}"), needs=("search",)) as stage:
            arch = _arch(path)
            if (stage.folder / RESULT).exists():
                require_arch(arch, stage.folder)
            else:
                _specialize(cfg, space, arch, data, stage.folder, device)
            for state in stage.folder.glob(f"*-{STATE}"):
                state.unlink()
            if cfg.ondevice.memory is not None:
                _adapt(cfg, space, arch, data, stage.folder)


def check(cfg: DictConfig) -> None:
    """Raise UserError for settings that would fail only after a search, when its networks are fine-tuned and pruned."""
    make(cfg.finetune)
    make(cfg.compress)
    if cfg.ondevice.memory is not None:
        read_options(plain(cfg.ondevice))


def _arch(chosen: Path) -> Arch:
    from ofa.files import read_json

    return Arch.from_dict(read_json(chosen)["arch"])


def _specialize(cfg: DictConfig, space: Space, arch: Arch, data: ImageData, folder: Path, device: str) -> None:
    """Write the fine-tuned network and the pruned one, each with its card."""
    from ofa.compress.prune import prune
    from ofa.files import write_json
    from ofa.finetune import finetune

    compress = make(cfg.compress)
    net, training = _float(cfg, space, arch, data, folder, device)
    with Progress(f"fine-tune for {device}") as progress:
        pruned = prune(net, compress.pruning)
        options: dict[str, Any] = {"seed": cfg.seed, "report": progress, "checkpoint": folder / f"pruned-{STATE}"}
        pruned = finetune(pruned, data, compress.finetuning, teacher=net, **options)
    then = [
        *training,
        {"pruning": asdict(compress.pruning)},
        {"teacher": "float", **asdict(compress.finetuning)},
    ]
    result = {
        name: _save(folder / f"{name}.json", model, arch, space, data, cfg.seed, steps)
        for name, model, steps in (("float", net, training), ("pruned", pruned, then))
    }
    write_json(folder / RESULT, result)
    reached = {name: values["accuracy_val"] for name, values in result.items()}
    if training:
        _warn("float", training[0]["accuracy_val_before"], reached["float"], data, "lower finetune.lr")
    _warn("pruned", reached["float"], reached["pruned"], data, "lower compress.finetuning.lr, or prune less")
    top1 = ", ".join(f"{name} {100 * share:.1f} %" for name, share in reached.items())
    print(f"{device}: validation top-1 {top1}")


def _adapt(cfg: DictConfig, space: Space, arch: Arch, data: ImageData, folder: Path) -> None:
    """Write the pruned network as a device could fine-tune it, and the plan, unless it was made with these options."""
    from ofa.export.card import load_card, rebuild
    from ofa.files import read_json, write_json

    path, options = folder / "plan.json", plain(cfg.ondevice)
    if path.exists() and read_json(path).get("options") == options:
        return
    path.unlink(missing_ok=True)  # it is to speak for what is written now
    pruned = folder / "pruned.json"
    tuned, plan = adapt(rebuild(pruned), data, options, seed=cfg.seed)
    card = load_card(pruned)
    steps = [*card.training["finetuning"], {"ondevice": plan["memory"]}]
    costs = _save(folder / "ondevice.json", tuned, arch, space, data, cfg.seed, steps)
    before = card.metrics["accuracy_val"].value
    _warn("on-device", before, costs["accuracy_val"], data, "lower ondevice.finetuning.lr")
    write_json(path, plan | {"accuracy_val": costs["accuracy_val"], "options": options})


def _float(
    cfg: DictConfig, space: Space, arch: Arch, data: ImageData, folder: Path, device: str
) -> tuple[StaticNet, list[dict[str, Any]]]:
    """The chosen network with the supernet's weights, fine-tuned where that is asked for, and what was done."""
    from ofa.evaluate import accuracy, specialise
    from ofa.finetune import finetune

    supernet, settings = trained(cfg, space), make(cfg.finetune)
    net = specialise(supernet, arch, data)
    if not settings.epochs:
        return net, []
    if cfg.teacher is None:
        largest = replace(space.decode(space.largest())[0], resolution=arch.resolution)
        teachers: list[nn.Module] = [specialise(supernet, largest, data)]
    else:
        teachers = [found.net for found in load_teachers(cfg, data, settings.lesson(1), arch.resolution)]
    before = accuracy(net, data, "val", resolution=arch.resolution)
    with Progress(f"fine-tune the float network for {device}") as progress:
        options: dict[str, Any] = {"seed": cfg.seed, "report": progress, "checkpoint": folder / f"float-{STATE}"}
        net = finetune(net, data, settings, teacher=teachers, **options)
    step = {
        "teacher": plain(cfg.teacher) or "the supernet's largest",
        "accuracy_val_before": before,
        **asdict(settings),
    }
    return net, [step]


def _warn(name: str, before: float, after: float, data: ImageData, remedy: str) -> None:
    """Say where a network had learned and fine-tuning left it near chance."""
    from ofa.training.watch import collapsed

    if collapsed({name: after}, [{"val": {name: before}}], len(data.classes)):
        print(f"warning: the {name} network fell from {100 * before:.1f} to {100 * after:.1f} %; {remedy}")


def require_arch(arch: Arch, folder: Path) -> None:
    """Raise UserError where a finished folder holds another network than the one that is chosen now."""
    from ofa.export.card import load_card

    if load_card(folder / "float.json").arch != arch:
        raise UserError(f"the search chose another network after {folder} was made; give restart=true to make it again")


def _save(
    path: Path,
    net: StaticNet,
    arch: Arch,
    space: Space,
    data: ImageData,
    seed: int,
    training: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Write the network with its card; its validation accuracy and exact costs."""
    from ofa.evaluate import accuracy
    from ofa.export.card import Card, Metric, save_net
    from predictors.spec import spec_costs

    values = {"accuracy_val": accuracy(net, data, "val", resolution=arch.resolution)} | spec_costs(net.spec)
    units = {"accuracy_val": "share of right first classes", "macs": "MACs", "params": "parameters"}
    metrics = {name: Metric(value, units.get(name, "bytes")) for name, value in values.items()}
    card = Card(arch, space.to_dict(), net.spec, metrics, data.describe(), seed, training={"finetuning": training})
    save_net(path, net, card)
    return values


if __name__ == "__main__":
    main()

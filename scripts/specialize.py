"""ofa-specialize: extract, prune and fine-tune the network that the search chose for each device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import Arch
from scripts.cli import make, stage_command
from scripts.ondevice import adapt
from scripts.parts import SEARCH, load_parts, trained
from scripts.progress import Progress
from scripts.stage import open_stage, plain

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.space import Space
    from ofa.static import StaticNet

READS = (*SEARCH, "compress.pruning", "compress.finetuning", "ondevice")


@stage_command("compress", "ondevice", "device")
def main(cfg: DictConfig) -> None:
    """Extract each device's network, prune its channels, fine-tune it.  Writes <run>/specialize/<device>."""
    from ofa.compress.prune import prune
    from ofa.evaluate import specialise
    from ofa.files import read_json, write_json
    from ofa.finetune import finetune

    data, space = load_parts(cfg)
    for device in cfg.device:
        with open_stage(cfg, f"specialize/{device}", (*READS, f"device.{device}"), needs=("search",)) as stage:
            arch = Arch.from_dict(read_json(Path(cfg.run, "search", device, "chosen.json"))["arch"])
            if stage.done:
                _require(arch, stage.folder)
                continue
            compress = make(cfg.compress)
            net = specialise(trained(cfg, space), arch, data)
            with Progress(f"fine-tune for {device}") as progress:
                pruned = prune(net, compress.pruning)
                pruned = finetune(pruned, data, compress.finetuning, teacher=net, seed=cfg.seed, report=progress)
            result = {
                name: _save(stage.folder / f"{name}.json", model, arch, space, data, cfg.seed)
                for name, model in (("float", net), ("pruned", pruned))
            }
            if cfg.ondevice.memory is not None:
                tuned, plan = adapt(pruned, data, plain(cfg.ondevice), seed=cfg.seed)
                costs = _save(stage.folder / "ondevice.json", tuned, arch, space, data, cfg.seed)
                write_json(stage.folder / "plan.json", plan | {"accuracy_val": costs["accuracy_val"]})
            write_json(stage.folder / "result.json", result)
            top1 = ", ".join(f"{name} {100 * values['accuracy_val']:.1f} %" for name, values in result.items())
            print(f"{device}: validation top-1 {top1}")


def _require(arch: Arch, folder: Path) -> None:
    """Raise UserError where a finished folder holds another network than the one that is chosen now."""
    from ofa.export.card import load_card

    if load_card(folder / "float.json").arch != arch:
        raise UserError(f"the search chose another network after {folder} was made; give restart=true to make it again")


def _save(path: Path, net: StaticNet, arch: Arch, space: Space, data: ImageData, seed: int) -> dict[str, float]:
    """Write the network with its card; its validation accuracy and exact costs."""
    from ofa.evaluate import accuracy
    from ofa.export.card import Card, Metric, save_net
    from predictors.spec import spec_costs

    values = {"accuracy_val": accuracy(net, data, "val", resolution=arch.resolution)} | spec_costs(net.spec)
    units = {"accuracy_val": "share of right first classes", "macs": "MACs", "params": "parameters"}
    metrics = {name: Metric(value, units.get(name, "bytes")) for name, value in values.items()}
    save_net(path, net, Card(arch, space.to_dict(), net.spec, metrics, data.describe(), seed))
    return values


if __name__ == "__main__":
    main()

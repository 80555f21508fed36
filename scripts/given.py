"""ofa-export network=<card>: one network, wherever it comes from, exported for devices and proven to fit or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.compress import folder_name
from scripts.deploy import deploy, proofs_of
from scripts.onnx_files import SHIPPED, budget_of, limits_of, write_onnx
from scripts.parts import load_data
from scripts.stage import note, open_stage, plain

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.distill.nets import Named

READS = ("data", "seed", "network", "compress.quantization", "export")


def export_given(cfg: DictConfig) -> None:
    """Export and prove network= for each device.  Writes <run>/prove/<network>/<device>.

    Raises UserError, once all devices are done, where the network exceeds the limits of one.
    """
    from ofa.export.budget import require
    from ofa.files import read_json

    data = load_data(cfg)
    place = f"prove/{folder_name(cfg.network)}"
    named = _load(cfg, data)
    limits = {name: limits_of(name, plain(cfg.device[name].limits), learned=named.learned) for name in cfg.device}
    for device in cfg.device:
        reads = (*READS, f"device.{device}", *(["runtime"] if cfg.runtime else []))
        with open_stage(cfg, f"{place}/{device}", reads) as stage:
            if not stage.done:
                note(cfg.run, data=data.describe())
                _prove(cfg, named, data, device, limits[device], stage.folder)
    for device in cfg.device:
        result = read_json(Path(cfg.run, place, device, "result.json"))
        if accepted := require(device, proofs_of(result), result["budget"], force=cfg.force):
            print(accepted)


def _load(cfg: DictConfig, data: ImageData) -> Named:
    """The network, with batch norm calibrated where its weights are random."""
    import torch

    from ofa.distill.nets import load_net
    from ofa.extraction import recalibrate
    from ofa.static import StaticNet

    torch.manual_seed(cfg.seed)
    named = load_net(str(cfg.network), data)
    if not isinstance(named.net, StaticNet):
        raise UserError(f"network={cfg.network} cannot be exported; give a card, a block list or <space>/smallest")
    if named.net.spec.classes != len(data.classes):
        raise UserError(
            f"{cfg.network} has {named.net.spec.classes} classes, {data.name} {len(data.classes)}; give its own data"
        )
    if named.net.spec.in_channels != data.channels:
        wanted = f"{cfg.network} takes {named.net.spec.in_channels} channels"
        raise UserError(f"{wanted}, the images of {data.name} have {data.channels}; give its own data")
    if not named.learned:
        print(f"{cfg.network} has no weights: random ones stand in, and its accuracy is not measured")
        recalibrate(named.net, data.calibration("val", 256, named.net.spec.resolution))
    return named


def _prove(cfg: DictConfig, named: Named, data: ImageData, device: str, limits: dict[str, float], folder: Path) -> None:
    """The files of one device and what they were measured to take, in result.json."""
    from ofa.files import write_json

    net: Any = named.net
    models = write_onnx(cfg, {"float": (net, named.card(data, cfg.seed, {}))}, folder, data, learned=named.learned)
    budget = budget_of(limits, models[SHIPPED])
    settings = plain(cfg.device[device]) | {"limits": limits}
    result = {"device": settings, "spec": net.spec.to_dict(), "models": models, "budget": budget}
    result |= deploy(cfg, device, limits, budget, models[SHIPPED], folder, data)
    write_json(folder / "result.json", result | {"network": str(cfg.network), "shipped": SHIPPED})

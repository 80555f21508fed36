"""What several stages need: the data and space of a configuration, the trained supernet, the fitted predictors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.export import MICRO_RUNTIMES
from ofa.files import read_json
from ofa.limits import sought
from ofa.space import Genes, Space, load_space
from scripts.cli import make
from scripts.stage import COMMAND, INFEASIBLE, command_line, note, plain

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.finetune import Finetuning
    from ofa.supernet import Supernet

DEVICE = ("name", "description", "limits", "runtimes", "core")
TRAIN = ("space", "data", "augment", "schedule", "seed", "train")
MEASURE = (*TRAIN, "measure")
FIT = (*MEASURE, "predictor.accuracy", "fit")
SEARCH = (*FIT, "predictor", "search", "objectives")
MEASURED_HERE = "predictors.latency.Latency"


def require_whole(cfg: DictConfig, *names: str, null: bool = False) -> None:
    """Raise UserError where options are no whole numbers from 1 on, nor null where that means something."""
    for name in names:
        value = OmegaConf.select(cfg, name)
        if not (null and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{name}={value} must be a whole number, 1 or more" + ", or null" * null)


def check_devices(cfg: DictConfig) -> None:
    """Raise UserError for a device without a name or limits, or with options that no device has."""
    for device, settings in plain(cfg.device).items():
        if not {"name", "limits"} <= set(settings) or not isinstance(settings["limits"], dict):
            raise UserError(
                f"device {device} lacks a name or limits; a device's YAML file begins with # @package device.<name>"
            )
        runtimes = settings.get("runtimes", [])
        if not isinstance(runtimes, list) or set(runtimes) - set(MICRO_RUNTIMES):
            raise UserError(
                f"device {device} has runtimes={runtimes}; give a list of {', '.join(MICRO_RUNTIMES)}, or []"
            )
        if unknown := sorted(set(settings) - set(DEVICE)):
            raise UserError(f"device {device} has no option {unknown[0]!r}; choose from {', '.join(DEVICE)}")


def load_data(cfg: DictConfig) -> ImageData:
    """The data set of a configuration; a process reads it once."""
    return _data(json.dumps(plain(cfg.data)))


@lru_cache(maxsize=1)
def _data(text: str) -> ImageData:
    return make(OmegaConf.create(json.loads(text)))


def require_images(cfg: DictConfig, data: ImageData, *, fresh: bool = False) -> None:
    """Note which images the run learns from, and raise UserError where these are others; fresh: it begins with these.

    Validation and test images are cut from all that there are: one more, and others are cut, that training had seen.
    """
    command, digest = Path(cfg.run, COMMAND), data.digest()
    known = None if fresh else read_json(command).get("images") if command.exists() else None
    if known is None:
        note(cfg.run, images=digest)
    elif known != digest:
        raise UserError(
            f"the images of {data.name} are not those that {cfg.run} was trained on, so that those of val and test may "
            "have been trained on; bring them back, or give another run=<folder>, or "
            f"{command_line('train', 'restart=true')} to train again"
        )


def load_parts(cfg: DictConfig) -> tuple[ImageData, Space]:
    """The data set, and the space made for its channels and classes."""
    data = replace(load_data(cfg), augment=make(cfg.augment))
    space = load_space(plain(cfg.space)).adapt(in_channels=data.channels, classes=len(data.classes))
    size, most = OmegaConf.select(cfg, "data.size"), max(space.resolution)
    if size is not None and size < most:
        given = f"data.size={size} stores images below the largest resolution of the space, {most} pixels"
        raise UserError(f"{given}; give data.size={most}, or a space.resolution of at most {size}")
    return data, space


def searched_space(cfg: DictConfig) -> Space:
    """The space that ofa-fit left beside its predictors, so that a search reads no images."""
    path = Path(cfg.run, "fit", "space.json")
    return load_space(read_json(path)) if path.exists() else load_parts(cfg)[1]


def trained(cfg: DictConfig, space: Space, process: int | None = None) -> Supernet:
    """The supernet that ofa-train wrote, with the weights that measure.weights names, on train.device.

    process: the number of this one among several, which share out the GPUs.
    """
    from ofa.parallel import found_device
    from ofa.training.trained import load_supernet

    supernet = load_supernet(Path(cfg.run, "train"), space, weights=cfg.measure.weights)
    return supernet.to(found_device(cfg.train.device, process))


def load_trained(options: dict[str, Any], process: int) -> tuple[Supernet, ImageData]:
    """The trained supernet and the data of a configuration given as a dict, as a process of its own gets it."""
    cfg = OmegaConf.create(options)
    data, space = load_parts(cfg)
    return trained(cfg, space, process), data


def finetuning(cfg: DictConfig) -> Finetuning:
    """The settings of finetune; images are augmented as in training but for the parts that it gives."""
    section = plain(cfg.finetune)
    part = section.pop("augment", None) or {}
    if not isinstance(part, dict):
        raise UserError(
            f"finetune.augment={part} is no record of conf/augment; change a part, as finetune.augment.erase"
        )
    given = {name: value for name, value in part.items() if value is not None}
    return replace(make(section), augment=make(plain(cfg.augment) | given))


def learner(cfg: DictConfig, space: Space) -> Callable[..., Any]:
    """Makes unfitted accuracy predictors as predictor.accuracy says, but for the options that a call gives."""
    return partial(make, cfg.predictor.accuracy, space)


def require_learner(cfg: DictConfig, space: Space) -> None:
    """Raise UserError where predictor.accuracy cannot be made, or is no class that learns, is saved and loaded."""
    from hydra.utils import get_object

    learner(cfg, space)(seed=cfg.seed)
    target, needed = cfg.predictor.accuracy._target_, ("fit", "predict", "save", "load", "__call__")
    kind = get_object(target)
    lacking = [name for name in needed if not hasattr(kind, name)] if isinstance(kind, type) else list(needed)
    if lacking:
        raise UserError(f"predictor.accuracy is {target}, no class with {', '.join(lacking)}; add them")


def fitted(cfg: DictConfig, space: Space) -> dict[str, Callable[[Genes], Any]]:
    """The configured predictors by name: exact costs as they are, learned ones as ofa-fit left them."""
    return {name: _predictor(cfg, space, name) for name in cfg.predictor}


def reachable(cfg: DictConfig) -> list[str]:
    """The devices without those that ofa-search found no network for, which are named; UserError where none is left."""
    devices, reasons = [], []
    for device, settings in plain(cfg.device).items():
        path = Path(cfg.run, "search", device, INFEASIBLE)
        if path.exists() and (found := read_json(path))["device"] == settings:
            reasons.append(f"{settings['name']}: {found['reason']}")
        else:
            devices.append(device)
    if not devices:
        raise UserError("; ".join(reasons) or "device has no value; give device=<name>")
    for reason in reasons:
        print(f"left out, {reason}")
    return devices


def objectives(cfg: DictConfig) -> dict[str, int]:
    """What is sought, by name: -1 is maximised, 1 minimised."""
    if cfg.objectives is None:
        return dict(plain(cfg.search.objectives))
    names = [cfg.objectives] if isinstance(cfg.objectives, str) else plain(cfg.objectives)
    return {name: sought(name) for name in names}


def _predictor(cfg: DictConfig, space: Space, name: str) -> Callable[[Genes], Any]:
    if name == "accuracy":
        return _learned(cfg)
    if name == "accuracy_int8":
        return _transferred(cfg, space)
    if name == "latency_ms" and cfg.predictor[name]._target_ == MEASURED_HERE:
        from predictors import LatencyTable

        correction = read_json(Path(cfg.run, "fit", "fit.json"))["latency"]
        table = LatencyTable.load(Path(cfg.run, "measure", "latency.parquet"))
        return make(cfg.predictor[name], space, table, intercept=correction["intercept_ms"], slope=correction["slope"])
    return make(cfg.predictor[name], space)


def _learned(cfg: DictConfig) -> Callable[[Genes], Any]:
    """The accuracy predictor as ofa-fit left it."""
    from hydra.utils import get_class

    target = OmegaConf.select(cfg, "predictor.accuracy._target_") or "predictors.accuracy.Accuracy"
    kind: Any = get_class(target)
    return kind.load(Path(cfg.run, "fit", "accuracy.json"))


def _transferred(cfg: DictConfig, space: Space) -> Callable[[Genes], Any]:
    """Accuracy after int8, which ofa-fit leaves where ofa-measure quantized some subnets."""
    from predictors.transfer import TransferredAccuracy

    path = Path(cfg.run, "fit", "accuracy_int8.json")
    if not path.exists():
        raise UserError(
            f"{path} does not exist: no quantized subnet was measured; run ofa-measure with measure.int8_subnets=12 "
            "and ofa-fit again, or leave out predictor=int8"
        )
    return TransferredAccuracy(space, _learned(cfg)).load(path)

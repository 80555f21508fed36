"""The ONNX files of one network: float, and int8 of the last, run and measured in ONNX Runtime, with their cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa import processor
from ofa.errors import UserError
from ofa.limits import keeps
from scripts.cli import make

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.export.card import Card
    from ofa.static import StaticNet

SHIPPED = "int8"
PROVABLE = (  # accuracy: by weights
    *("macs", "params", "weight_bytes", "peak_memory_bytes", "file_bytes", "latency_ms"),
    "energy_uj",  # an estimate, as it is in the search
)


def write_onnx(
    cfg: DictConfig,
    given: Mapping[str, tuple[StaticNet, Card]],
    folder: Path,
    data: ImageData,
    *,
    learned: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write <name>.onnx of each given network and int8.onnx of the last, with their cards; what was measured on each.

    learned: whether the networks have weights whose accuracy says something.
    """
    from ofa.compress.quantize import quantize
    from ofa.export.latency import measure_models
    from ofa.export.onnx import export, require_parity, verify, weight_bits

    *_, last = given
    nets = dict(given) | {SHIPPED: given[last]}
    resolution = given[last][0].spec.resolution
    for name, (net, _) in given.items():
        export(net, folder / f"{name}.onnx")
    settings, verification = make(cfg.compress).quantization, make(cfg.export)
    images = data.calibration("val", settings.images, resolution)
    quantize(folder / f"{last}.onnx", folder / f"{SHIPPED}.onnx", images, settings)
    files = {name: folder / f"{name}.onnx" for name in nets}
    timed = measure_models(files, threads=verification.threads, repeats=verification.repeats)
    probe = next(data.batches("test", verification.images, resolution, rng=None))[0]
    found = {}
    for name, file in files.items():
        net, card = nets[name]
        parity = verify(file, net, probe, threads=verification.threads)
        if name != SHIPPED:
            require_parity(file, parity, verification)
        bits = 8 if name == SHIPPED else 32
        found[name] = _measure(file, card, timed[name], bits=bits) | {"energy_uj": _energy(cfg, card, bits)}
        if learned:
            found[name]["accuracy"] = _accuracy(file, card, data)
            found[name] |= {"accuracy_int8": found[name]["accuracy"]} if name == SHIPPED else {}
        found[name] |= {"weight_bits": weight_bits(file)} if name == SHIPPED else {}
        found[name] |= {"parity_max_abs": parity.max_abs, "sqnr_db": parity.sqnr_db, "agreement": parity.agreement}
        _save_card(file, net, card, found[name])
    return found


def budget_of(limits: Mapping[str, float], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each limit beside the value of the shipped model, and of a latency the machine that it was measured on."""
    return [
        {"limit": name, "value": values[name], "max": most, "met": keeps(name, values[name], most)}
        | ({"machine": processor.name()} if name == "latency_ms" else {})
        for name, most in limits.items()
    ]


def limits_of(device: str, limits: Mapping[str, float | str], *, learned: bool) -> dict[str, float]:
    """A device's limits by the names of what is measured; raises UserError for one that is not."""
    from search.limits import parse_limits

    try:
        return parse_limits(limits, (*PROVABLE, *(("accuracy", "accuracy_int8") if learned else ())))
    except UserError as error:
        raise UserError(f"ofa-export cannot prove the limits of device {device}: {error}") from None


def _measure(file: Path, card: Card, timed: dict[str, Any], *, bits: int) -> dict[str, Any]:
    """Exact costs, size and latency of one file."""
    from ofa.export.graph import OPSET
    from ofa.export.onnx import weight_bytes
    from predictors.spec import spec_costs

    return spec_costs(card.spec, bits=bits) | {
        "file_bytes": file.stat().st_size,
        "weight_bytes": weight_bytes(file),
        "opset": OPSET,
        "latency_ms": timed["median_ms"],
        "latency_spread_ms": timed["p90_ms"] - timed["p10_ms"],
    }


def _energy(cfg: DictConfig, card: Card, bits: int) -> float:
    """Microjoules of one inference, with numbers of `bits` bits in the memories that the search goes by."""
    from predictors.energy import spec_energy

    given = cfg.predictor.get("energy_uj", {})
    return spec_energy(
        card.spec, bits=bits, **{name: given[name] for name in ("activations", "weights") if name in given}
    )


def _accuracy(file: Path, card: Card, data: ImageData) -> float:
    from ofa.export.onnx import accuracy_onnx

    return accuracy_onnx(file, data.batches("test", 256, card.spec.resolution, rng=None))


def _save_card(file: Path, net: StaticNet, card: Card, values: dict[str, Any]) -> None:
    """Write the card, and the float weights that the network can be rebuilt from, beside the ONNX file."""
    from ofa.export.card import metrics_of, save_net

    save_net(file.with_suffix(".json"), net, replace(card, metrics=metrics_of(values)), [file])

"""ofa-export: ONNX files, float, pruned and int8, run in ONNX Runtime and checked against the device's budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from scripts.cli import make, stage_command
from scripts.deploy import deploy, proofs_of
from scripts.parts import TRAIN, load_parts, trained
from scripts.specialize import READS
from scripts.stage import open_stage

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.export.card import Card
    from ofa.space import Space
    from ofa.static import StaticNet

SHIPPED = "int8"
UNITS = {
    "accuracy": "share of right first classes",
    "latency_ms": "ms",
    "macs": "MACs",
    "params": "parameters",
    "opset": "ONNX operator set",
}


@stage_command("export", "runtime", "compress", "device")
def main(cfg: DictConfig) -> None:
    """Export each device's network, run the files, prove that the budget is met.  Writes <run>/export/<device>.

    Exit status 1 where a network exceeds its device's limits, unless force=true.
    """
    from ofa.export.budget import require
    from ofa.files import read_json, write_json

    data, space = load_parts(cfg)
    for device in cfg.device:
        reads = (*READS, "compress.quantization", "export", f"device.{device}", *(["runtime"] if cfg.runtime else []))
        with open_stage(cfg, f"export/{device}", reads, needs=("specialize",)) as stage:
            if stage.done:
                continue
            chosen = read_json(Path(cfg.run, "search", device, "chosen.json"))
            models = _export(cfg, Path(cfg.run, "specialize", device), stage.folder, data)
            budget = _budget(chosen["device"]["limits"], models[SHIPPED])
            spec = read_json(stage.folder / f"{SHIPPED}.json")["spec"]
            result = {
                "device": chosen["device"],
                "arch": chosen["arch"],
                "spec": spec,
                "models": models,
                "budget": budget,
            }
            result |= deploy(cfg, device, chosen["device"]["limits"], budget, models[SHIPPED], stage.folder, data)
            result |= {"predicted": chosen["predicted"], "shipped": SHIPPED}
            write_json(stage.folder / "result.json", result)
    with open_stage(cfg, "export/supernet", TRAIN, needs=("train",)) as stage:
        if not stage.done:
            ends = _ends(cfg, data, space)
            write_json(stage.folder / "ends.json", ends)
            print("supernet on test images: " + ", ".join(f"{name} {100 * top1:.2f} %" for name, top1 in ends.items()))
    for device in cfg.device:
        result = read_json(Path(cfg.run, "export", device, "result.json"))
        require(device, proofs_of(result), result["budget"], force=cfg.force)


def _ends(cfg: DictConfig, data: ImageData, space: Space) -> dict[str, float]:
    """Test accuracy of the supernet's largest and smallest network, as extracted."""
    from ofa.evaluate import accuracy, specialise

    supernet = trained(cfg, space)
    found = {}
    for name, genes in (("largest", space.largest()), ("smallest", space.smallest())):
        arch = space.decode(genes)[0]
        found[name] = accuracy(specialise(supernet, arch, data), data, "test", resolution=arch.resolution)
    return found


def _export(cfg: DictConfig, source: Path, folder: Path, data: ImageData) -> dict[str, dict[str, Any]]:
    """Write float.onnx, pruned.onnx and int8.onnx with their cards; what was measured on each."""
    from ofa.compress.quantize import quantize
    from ofa.export.card import load_card, rebuild
    from ofa.export.latency import measure_models
    from ofa.export.onnx import export, require_parity, verify

    nets = {name: rebuild(source / f"{name}.json") for name in ("float", "pruned")}
    cards = {name: load_card(source / f"{name}.json") for name in nets}
    nets[SHIPPED], cards[SHIPPED] = nets["pruned"], cards["pruned"]
    resolution = nets[SHIPPED].spec.resolution
    for name in ("float", "pruned"):
        export(nets[name], folder / f"{name}.onnx")
    settings, verification = make(cfg.compress).quantization, make(cfg.export)
    images = data.calibration("val", settings.images, resolution)
    quantize(folder / "pruned.onnx", folder / f"{SHIPPED}.onnx", images, settings)
    files = {name: folder / f"{name}.onnx" for name in nets}
    timed = measure_models(files, threads=verification.threads, repeats=verification.repeats)
    probe = next(data.batches("test", verification.images, resolution, rng=None))[0]
    found = {}
    for name, file in files.items():
        parity = verify(file, nets[name], probe, threads=verification.threads)
        if name != SHIPPED:
            require_parity(file, parity, verification)
        found[name] = _measure(file, cards[name], data, timed[name], bits=8 if name == SHIPPED else 32)
        found[name] |= {"parity_max_abs": parity.max_abs, "sqnr_db": parity.sqnr_db, "agreement": parity.agreement}
        _save_card(file, nets[name], cards[name], found[name])
    return found


def _measure(file: Path, card: Card, data: ImageData, timed: dict[str, Any], *, bits: int) -> dict[str, Any]:
    """Test accuracy, exact costs, size and latency of one file."""
    from ofa.export.graph import OPSET
    from ofa.export.onnx import accuracy_onnx, weight_bytes
    from predictors.spec import spec_costs

    batches = data.batches("test", 256, card.spec.resolution, rng=None)
    return spec_costs(card.spec, bits=bits) | {
        "accuracy": accuracy_onnx(file, batches),
        "file_bytes": file.stat().st_size,
        "weight_bytes": weight_bytes(file),
        "opset": OPSET,
        "latency_ms": timed["median_ms"],
        "latency_spread_ms": timed["p90_ms"] - timed["p10_ms"],
    }


def _save_card(file: Path, net: StaticNet, card: Card, values: dict[str, Any]) -> None:
    """Write the card, and the float weights that the network can be rebuilt from, beside the ONNX file."""
    from ofa.export.card import Metric, save_card
    from ofa.weights import save_tensors

    named = {name: value for name, value in values.items() if name in UNITS or name.endswith("_bytes")}
    metrics = {name: Metric(value, UNITS.get(name, "bytes")) for name, value in named.items()}
    weights = file.with_suffix(".safetensors")
    save_tensors(weights, net.state_dict())
    save_card(file.with_suffix(".json"), replace(card, metrics=metrics), [file, weights])


def _budget(limits: dict[str, float], values: dict[str, Any]) -> list[dict[str, Any]]:
    """Each limit beside the value of the shipped model."""
    return [
        {"limit": name, "value": values[name], "max": most, "met": values[name] <= most}
        for name, most in limits.items()
    ]


if __name__ == "__main__":
    main()

"""ofa-export: ONNX files, float, pruned and int8, run in ONNX Runtime and checked against the device's budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.space import Arch
from scripts.cli import stage_command
from scripts.deploy import deploy, proofs_of, require_runtimes
from scripts.given import export_given
from scripts.onnx_files import SHIPPED, budget_of, limits_of, write_onnx
from scripts.parts import MEASURED_HERE, TRAIN, load_parts, reachable, require_images, trained
from scripts.specialize import READS, require_arch
from scripts.stage import open_stage

if TYPE_CHECKING:
    from ofa.data import ImageData
    from ofa.space import Space

MADE = ("float", "pruned")  # by ofa-specialize; the last one ships, in int8


@stage_command("export", "runtime", "compress", "device")
def main(cfg: DictConfig) -> None:
    """Export each device's network, run the files, prove that the budget is met.  Writes <run>/export/<device>.

    Exit status 1 where a network exceeds its device's limits, unless force=true.  network=<card>, a block list or
    <space>/largest: prove that network instead, with no stage before; writes <run>/prove/<network>/<device>.
    """
    from ofa.export.budget import require
    from ofa.export.card import load_card, rebuild
    from ofa.files import read_json, write_json

    require_runtimes(cfg)
    if cfg.network is not None:
        export_given(cfg)
        return
    data, space = load_parts(cfg)
    require_images(cfg, data)
    devices = reachable(cfg)
    for device in devices:
        reads = (*READS, "compress.quantization", "export", f"device.{device}", *(["runtime"] if cfg.runtime else []))
        with open_stage(cfg, f"export/{device}", reads, needs=("specialize",)) as stage:
            chosen, source = (
                read_json(Path(cfg.run, "search", device, "chosen.json")),
                Path(cfg.run, "specialize", device),
            )
            require_arch(Arch.from_dict(chosen["arch"]), stage.folder if stage.done else source)
            if stage.done:
                continue
            limits = limits_of(device, chosen["device"]["limits"], learned=True)
            given = {name: (rebuild(source / f"{name}.json"), load_card(source / f"{name}.json")) for name in MADE}
            models = write_onnx(cfg, given, stage.folder, data)
            budget = budget_of(limits, models[SHIPPED])
            spec = read_json(stage.folder / f"{SHIPPED}.json")["spec"]
            result = {
                "device": chosen["device"],
                "arch": chosen["arch"],
                "spec": spec,
                "models": models,
                "budget": budget,
            }
            if "latency_ms" in limits:
                searched = cfg.predictor.latency_ms._target_
                print(f"{device}: {_latency(models, chosen['predicted']['latency_ms'], searched)}")
            result |= deploy(cfg, device, limits, budget, models[SHIPPED], stage.folder, data)
            result |= {"predicted": chosen["predicted"], "shipped": SHIPPED}
            write_json(stage.folder / "result.json", result)
    with open_stage(cfg, "export/supernet", TRAIN, needs=("train",)) as stage:
        if not stage.done:
            ends = _ends(cfg, data, space)
            write_json(stage.folder / "ends.json", ends)
            print("supernet on test images: " + ", ".join(f"{name} {100 * top1:.2f} %" for name, top1 in ends.items()))
    for device in devices:
        result = read_json(Path(cfg.run, "export", device, "result.json"))
        if accepted := require(device, proofs_of(result), result["budget"], force=cfg.force):
            print(accepted)


def _latency(models: Mapping[str, Mapping[str, Any]], predicted: float, searched: str) -> str:
    """The latency that is limited beside the one that the search went by; searched: what predicted it."""
    judged, measured = models[SHIPPED]["latency_ms"], models["float"]["latency_ms"]
    if searched == MEASURED_HERE:
        return (
            f"latency_ms {judged:.3f} is of {SHIPPED}; the search went by the float network's, "
            f"predicted {predicted:.3f}, measured {measured:.3f}"
        )
    return (
        f"latency_ms {judged:.3f} is of {SHIPPED} on this machine; the search went by another device's, "
        f"predicted {predicted:.3f} ({searched}): the limit is proven only by {SHIPPED}.onnx timed there"
    )


def _ends(cfg: DictConfig, data: ImageData, space: Space) -> dict[str, float]:
    """Test accuracy of the supernet's largest and smallest network, as extracted."""
    from ofa.evaluate import accuracy, specialise

    supernet = trained(cfg, space)
    found = {}
    for name, genes in (("largest", space.largest()), ("smallest", space.smallest())):
        arch = space.decode(genes)[0]
        found[name] = accuracy(specialise(supernet, arch, data), data, "test", resolution=arch.resolution)
    return found


if __name__ == "__main__":
    main()

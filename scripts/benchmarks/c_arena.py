"""MCUNet's published networks as plain C: the arena and flash of each, beside TinyEngine's and TensorFlow Lite Micro's.

    python scripts/benchmarks/c_arena.py [--images 4]       (needs gcc and arm-none-eabi-gcc; Debian: gcc-arm-none-eabi)
    python scripts/benchmarks/c_arena.py --tflm             (the same networks in TensorFlow Lite Micro; extra tflite)

Block lists and figures from `tables/published_subnets.json` in the folder of real data (OFA_DATA), random weights, 8
bits.  Figures in KiB; sizes do not depend on the weights, so there is no spread.  Flash and stack are of Cortex-M7
objects (-Os), SRAM is the arena and the stack.  "C" compares a build for this machine, under address and
undefined-behaviour sanitizers, with the numpy reference on `--images` random images.  --tflm: the int8 .tflite of each
in TensorFlow Lite Micro's own interpreter: the arena that it took, its tensors and its tables (pointers of 64 bits
here), and the file, beside what MCUNet's authors published for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.export.c import export_c
from ofa.export.c.build import SANITIZERS, compile_c, measure, run_c, version
from ofa.export.runtimes.tflm import Tflm, arena
from ofa.extraction import recalibrate
from ofa.files import read_json, write_json
from ofa.integer.convert import from_net
from ofa.integer.net import IntegerNet
from ofa.integer.run import quantize_images, run
from ofa.published import load_network
from ofa.static import StaticNet
from predictors.spec import spec_costs
from scripts.benchmarks.about import about

DATA = Path(os.environ.get("OFA_DATA", Path(__file__).parents[3] / "shared/data"))


def random_net(entry: dict[str, Any], n: int) -> tuple[StaticNet, torch.Tensor]:
    """The network of a block list with random weights, and n random images that its batch norm was calibrated on."""
    torch.manual_seed(0)
    net = load_network(entry)
    batch = torch.randn(n, net.spec.in_channels, net.spec.resolution, net.spec.resolution)
    recalibrate(net, [batch])
    return net.eval(), batch


def micro(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One network's figures in TensorFlow Lite Micro."""
    net, batch = random_net(entry, 8)
    file = folder / f"net{Tflm().suffix}"
    Tflm().export(net, file, batch)
    found = arena(file)
    return {
        "name": entry["name"],
        "arena": found.total,
        "tensors": found.tensors,
        "tables": found.tables,
        "mcunet": spec_costs(net.spec, bits=8, model="mcunet")["peak_memory_bytes"],
        "file": file.stat().st_size,
        "published": entry["published"]["tflite"],
    }


def micro_line(row: dict[str, Any]) -> str:
    """A row of the table of TensorFlow Lite Micro."""
    published = row["published"] or {}
    cells = [
        row["name"].removesuffix("_imagenet"),
        *(f"{row[key] / 1024:.1f}" for key in ("arena", "tensors", "tables")),
    ]
    for key, name in (("arena", "sram_kB"), ("file", "flash_kB")):
        if name in published:
            cells += [f"{published[name]}", f"{row[key] / 1024 / published[name]:.2f}"]
        else:
            cells += ["-", "-"]
    return " | ".join([*cells, f"{row['file'] / 1024:.0f}", f"{row['mcunet'] / 1024:.1f}"])


def report(entry: dict[str, Any], folder: Path, images: int) -> dict[str, Any]:
    """One network's figures, in bytes; published ones in the KiB that they are printed in."""
    net, batch = random_net(entry, max(images, 8))
    integer = from_net(net, [batch])
    written = export_c(integer, folder, name=entry["name"])
    sizes, published = measure(folder), entry["published"]
    return {
        "name": entry["name"],
        "arena": written.arena_bytes,
        "bound": written.bound_bytes,
        "fullest": written.fullest,
        **{m: spec_costs(net.spec, bits=8, model=m)["peak_memory_bytes"] for m in ("inplace", "mcunet")},
        "sram": sizes.sram_bytes,
        "flash": sizes.flash_bytes,
        "bits_published": entry["bits"],
        "tinyengine": published["tinyengine"],
        "tflite_micro": published["tflite"],
        "equal": _equal(integer, folder, batch[:images].numpy()) if images else None,
    }


def _equal(net: IntegerNet, folder: Path, images: Any) -> bool:
    q = quantize_images(net, images)
    want = run(net, q)
    return np.array_equal(run_c(compile_c(folder, flags=("-O1", *SANITIZERS)), q, want.shape[1]), want)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    engine, micro = row["tinyengine"], row["tflite_micro"]
    fair = row["bits_published"] == 8  # 4-bit activations take half of what ours do
    cells = [row["name"].removesuffix("_imagenet"), *(f"{row[k] / 1024:.1f}" for k in ("arena", "bound", "sram"))]
    cells += [f"{engine['sram_kB']}" if fair else f"{engine['sram_kB']} (4 bits)"]
    cells += [f"{row['sram'] / 1024 / engine['sram_kB']:.2f}" if fair else "-"]
    cells += [f"{micro['sram_kB']}" if micro else "-", f"{row['sram'] / 1024 / micro['sram_kB']:.2f}" if micro else "-"]
    cells += [f"{row[m] / 1024:.1f} ({row['arena'] / row[m] - 1:+.1%})" for m in ("inplace", "mcunet")]
    cells += [f"{row['flash'] / 1024:.0f}", f"{engine['flash_kB']}", f"{micro['flash_kB']}" if micro else "-"]
    return " | ".join([*cells, {True: "equal", False: "DIFFERS", None: "-"}[row["equal"]]])


HEAD = (
    "network | arena | lower bound | SRAM | TinyEngine | ratio | TFLite Micro | ratio | model inplace | model mcunet "
    "| flash | TinyEngine | TFLite Micro | C"
)


MICRO_HEAD = (
    "network | arena | tensors | tables | published SRAM | ratio | published flash | ratio | file | model mcunet"
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="random images to compare C with the reference on")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument("--tflm", action="store_true", help="in TensorFlow Lite Micro in place of C")
    args = parser.parse_args()
    rows = []
    print(MICRO_HEAD if args.tflm else HEAD, flush=True)
    for entry in read_json(DATA / "tables/published_subnets.json")["mcunet"]["nets"]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(micro(entry, Path(folder)) if args.tflm else report(entry, Path(folder), args.images))
        print(micro_line(rows[-1]) if args.tflm else line(rows[-1]), flush=True)
    compilers = {} if args.tflm else {name: version(name) for name in ("gcc", "arm-none-eabi-gcc")}
    print(json.dumps(compilers | about()))
    if args.out:
        write_json(args.out, {"rows": rows, "compilers": compilers, "about": about()})


if __name__ == "__main__":
    main()

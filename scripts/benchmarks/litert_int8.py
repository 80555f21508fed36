"""Fidelity of LiteRT's int8 files beside ONNX Runtime's on the same calibration images, and what decides it.

    python scripts/benchmarks/litert_int8.py --card runs/digits/export/phone/pruned.json

Signal to noise of the logits against the float network in PyTorch.  The ranges of activations are either the extremes
over the calibration images, or, the default of ai-edge-quantizer, the moving average of each image's extremes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.export.card import load_card, rebuild
from ofa.export.flatbuffer import inline
from ofa.export.onnx import compare, run_torch
from ofa.export.runtime import run
from ofa.export.runtimes.litert import LiteRT, convert, quantize
from ofa.export.runtimes.onnx import Onnx
from scripts.benchmarks.about import about
from scripts.benchmarks.runtimes import data_of


def main() -> None:
    """Print one line for each way to calibrate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, required=True, help="card of a trained network")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=256, help="validation images")
    args = parser.parse_args()
    net, data = rebuild(args.card), data_of(load_card(args.card))
    side = net.spec.resolution
    ranges = torch.cat(list(data.calibration("val", args.calibration, side)))
    images = next(data.batches("test", args.images, side, rng=None))[0]
    expected = run_torch(net, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "net")
        Onnx().export(net, file, ranges)
        show("onnxruntime, extremes", compare(run(Onnx(), file, images, batch=256), expected))
        content = convert(net, ranges)
        file.write_bytes(inline(content))
        show("litert, float", compare(run(LiteRT(32), file, images), expected))
        for rule in ("average", "minmax"):
            for part in (ranges[:16], ranges):
                file.write_bytes(inline(quantize(content, part, rule)))
                name = f"litert, {rule} over {len(part)} images"
                show(name, compare(run(LiteRT(), file, images), expected))
    print(json.dumps({"calibration images": args.calibration, "about": about()}))


def show(name: str, parity: Any) -> None:
    """One line."""
    figures = asdict(parity)
    print(
        f"{name:34} {figures['sqnr_db']:6.1f} dB, agreement {figures['agreement']:.4f}, n {figures['images']}",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Checkpoints of once-for-all's supernets, imported here: do both compute the same logits?

    pip install --no-deps --target build/once-for-all ofa==0.1.0.post202307202001
    python scripts/benchmarks/import_once_for_all.py [--ofa build/once-for-all] [--archs 30]

Its own code builds each supernet with random weights, batch-norm statistics and kernel transforms, and saves it with
the keys of its newest and of its first release; `ofa.checkpoint` reads both.  Each architecture that it draws runs in
both, and in the network extracted here.  "changed" is the control: the same comparison after one weight of the
checkpoint was changed by 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.checkpoint import import_supernet
from ofa.extraction import extract
from ofa.files import write_json
from ofa.published import arch_of
from ofa.space import load_space
from ofa.supernet import Supernet
from scripts.benchmarks.about import about
from scripts.benchmarks.once_for_all import OnceForAll, add_option
from scripts.benchmarks.once_for_all_worker import pictures

NETS = ("ofa_mbv3_w1.0", "ofa_mbv3_w1.2", "ofa_proxyless_w1.3", "ofa_resnet50")
Float = NDArray[np.float32]


def relative(found: Float, expected: Float) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def compare(rival: OnceForAll, net: str, archs: int, resolution: int) -> dict[str, Any]:
    """Largest relative differences over `archs` random architectures of one supernet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "supernet.pth")
        rival("build", net=net)
        space = load_space(net)
        rival("save", path=str(file), old_names=True)
        old = import_supernet(space, file)[0].state_dict()
        rival("save", path=str(file))
        supernet, digest = import_supernet(space, file)
        same = all(torch.equal(old[name], tensor) for name, tensor in supernet.state_dict().items())
    images = pictures(4, resolution, seed=1)
    x = torch.from_numpy(images).to(memory_format=torch.channels_last)
    elastic, plain, first, spread = [], [], None, []
    for seed in range(archs):
        setting = rival("sample", seed=seed).value
        expected = rival("logits", images=images, arch=setting).value
        arch = space.decode(space.encode([arch_of(space, setting, resolution=resolution)]))[0]
        elastic.append(relative(supernet(x, arch).numpy(), expected))
        plain.append(relative(extract(supernet, arch)(x).numpy(), expected))
        spread.append(float(expected.std(0).mean() / expected.std()))
        first = first or (arch, expected)
    assert first is not None
    _change(supernet)
    changed = relative(supernet(x, first[0]).numpy(), first[1])
    return {
        "net": net,
        "archs": archs,
        "resolution": resolution,
        "supernet": max(elastic),
        "extracted": max(plain),
        "changed": changed,
        "old_names_load_the_same": same,
        "spread_between_images": float(np.median(spread)),
        "sha256": digest,
    }


def _change(supernet: Supernet) -> None:
    """Change the largest weight of the first convolution by 1 %."""
    weight = next(supernet.parameters()).data
    weight[tuple((weight.abs() == weight.abs().max()).nonzero()[0])] *= 1.01


def main() -> None:
    """Print a row for each supernet; exit status 1 where one differs by 1e-4 or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument("--archs", type=int, default=30, help="random architectures of each supernet")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'supernet':20} {'archs':>5} {'supernet':>10} {'extracted':>10} {'changed':>10}  largest relative difference"
    )
    rows = []
    with OnceForAll(args.ofa) as rival:
        for net in NETS:
            rows.append(row := compare(rival, net, args.archs, args.resolution))
            values = " ".join(f"{row[name]:10.1e}" for name in ("supernet", "extracted", "changed"))
            print(f"{net:20} {row['archs']:5} {values}", flush=True)
        found = {"rows": rows, "about": about(), "once_for_all": rival("about").value}
    print(json.dumps({key: found[key] for key in ("about", "once_for_all")}))
    if args.out:
        write_json(args.out, found)
    right = (max(row["supernet"], row["extracted"]) < 1e-4 and row["old_names_load_the_same"] for row in rows)
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()

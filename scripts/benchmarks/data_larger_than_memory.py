"""Training images from a folder and from Parquet files: memory and speed when they are held, and when they are not.

    python scripts/benchmarks/data_larger_than_memory.py [--path data/cifar10] [--images 4000] [--workers 2]

Writes CIFAR-10 photographs, enlarged to 100 to 500 pixels of several shapes, as JPEG files in ImageNet's layout and as
Parquet files, into a temporary folder; reads a shuffled, augmented epoch at 224 pixels of each in a process of its own,
and prints images a second and the largest resident memory of the process and of one that decodes.  The first line is
what a process takes that reads nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ofa.data import ImageData, imagenet, parquet
from ofa.training.watch import peak_rss
from scripts.benchmarks.about import about

WORDNET = [f"n0{1440764 + 7 * i}" for i in range(10)]
LIMIT = 1e8
MODES = ("nothing", "held", "files", "unpacked", "row groups")


def photographs(source: Path, images: int) -> list[tuple[bytes, int]]:
    """JPEG images of many shapes, and their classes."""
    rows = pq.ParquetFile(source / "train.parquet").read_row_group(0).slice(0, images).to_pylist()
    rng, found = np.random.default_rng(0), []
    for row in rows:
        width, height = (int(side) for side in rng.integers(100, 500, 2))
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["img"]["bytes"])).resize((width, height)).save(buffer, "JPEG", quality=90)
        found.append((buffer.getvalue(), row["label"]))
    return found


def write(folder: Path, pictures: list[tuple[bytes, int]], *, group: int = 250) -> None:
    """ImageNet's layout in folder/files, of which one in ten is in val, and the same in folder/parquet."""
    cut = len(pictures) // 10
    for split, part in (("val", pictures[:cut]), ("train", pictures[cut:])):
        for i, (encoded, label) in enumerate(part):
            path = folder / "files" / split / WORDNET[label] / f"{split}_{i:08}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
        (folder / "parquet").mkdir(exist_ok=True)
        image = [{"bytes": encoded, "path": None} for encoded, _ in part]
        table = pa.table({"image": image, "label": [label for _, label in part]})
        name = {"val": "test", "train": "train"}[split]
        pq.write_table(table, folder / "parquet" / f"{name}.parquet", row_group_size=group, compression="none")


def load(mode: str, folder: Path, workers: int, limit: float = LIMIT) -> ImageData:
    """The data set in one of the MODES."""
    options: dict[str, Any] = {"size": 256, "val_size": 0.02, "workers": workers}
    if mode in ("held", "files"):
        return imagenet(folder / "files", memory_limit=1e12 if mode == "held" else limit, **options)
    buffer = 2 if mode == "row groups" else None
    small = min(limit, sum(file.stat().st_size for file in (folder / "parquet").glob("train*")) - 1)
    return parquet(folder / "parquet", channels=3, memory_limit=small, buffer=buffer, **options)


def read(mode: str, folder: Path, workers: int) -> dict[str, float]:
    """One epoch's speed and memory, in this process."""
    if mode == "nothing":
        return {"images": 0, "images_per_s": 0, "peak_mb": _peak(), "worker_mb": 0}
    data, images = load(mode, folder, workers), 0
    started = time.perf_counter()
    for _, y in data.batches("train", 64, 224, rng=np.random.default_rng(0)):
        images += len(y)
    seconds = time.perf_counter() - started
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"images": images, "images_per_s": images / seconds, "peak_mb": _peak(), "worker_mb": children}


def measure(mode: str, folder: Path, workers: int) -> dict[str, float]:
    """The same in a process of its own, with a cache of its own."""
    line = [sys.executable, __file__, "--read", mode, "--folder", str(folder)]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, "--workers", str(workers)], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    return peak_rss() / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=Path(os.environ.get("OFA_DATA", "data")) / "cifar10")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--read", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.folder, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), photographs(options.path, options.images))
        print(f"{options.images} photographs, {options.workers} workers, one epoch each; decoded, an image is 197 kB")
        print("| images | read | images/s | peak MB | MB of a worker |\n|---|---|---|---|---|")
        for mode in MODES:
            got = measure(mode, Path(folder), options.workers)
            numbers = f"{got['images_per_s']:.0f} | {got['peak_mb']:.0f} | {got['worker_mb']:.0f}"
            print(f"| {mode} | {got['images']:.0f} | {numbers} |")
        print(json.dumps(about()))


if __name__ == "__main__":
    main()

"""Latency of one network's files, every number of threads in a process of its own; what `runtimes.py` times with.

ExecuTorch's pool and PyTorch's are one for a process, so numbers of threads in one process would not be comparable.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ofa.export.latency import summary
from ofa.export.runtime import Logits, Runtime, latencies

Float = NDArray[np.float32]
EAGER, PACKAGE, CPP = "pytorch eager", "aotinductor float", "aotinductor, C++"
WARM_UP = 5


def timed(
    runtimes: Mapping[str, Runtime], files: Mapping[str, Path], net: nn.Module, image: Float, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Median, percentiles, n of every file and of PyTorch eager on one image (1, C, H, W), measured in turns."""
    kept = dict(os.environ)
    # read by a new process' libraries as they load; threads that spin while they wait, as OpenMP's do unless told, take
    # 200 times as long where another process has one of the cores, so every command of this project sets the second
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_time, dict(runtimes), dict(files), net, image, threads, repeats).result()
    finally:
        os.environ.clear()
        os.environ |= kept


def _time(
    runtimes: dict[str, Runtime], files: dict[str, Path], net: nn.Module, image: Float, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    import torch

    torch.set_num_threads(threads)

    def eager(x: Float) -> Logits:
        with torch.inference_mode():
            return net(torch.from_numpy(x)).numpy()

    calls = {name: runtime.load(files[name], threads) for name, runtime in runtimes.items()}
    found = latencies(calls | {EAGER: eager}, image, threads=threads, repeats=repeats)
    rows = {name: asdict(row) for name, row in found.items()}
    if CPP in files:
        times = run_cpp(files[CPP], files[PACKAGE], image, repeats=repeats + WARM_UP)[1][WARM_UP:]
        rows[CPP] = summary(times) | {"threads": threads}
    return rows


def build_cpp(folder: Path) -> Path:
    """The C++ program that runs AOTInductor's packages, built with CMake; raises where it or a compiler fails."""
    import torch

    from ofa.export.runtimes.aoti import write_cpp

    write_cpp(folder)
    place = f"-DTORCH={Path(torch.__file__).parent}"
    for line in (["cmake", "-B", "build", place], ["cmake", "--build", "build"]):
        answer = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(line)} failed: {answer.stderr[-2000:]}")
    return folder / "build" / "run"


def run_cpp(
    program: Path, package: Path, images: Float, *, repeats: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Logits (N, K) of images (N, C, H, W) from the C++ program, and milliseconds of `repeats` runs of the first."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "images.bin"), Path(folder, "logits.bin")
        given.write_bytes(np.ascontiguousarray(images).tobytes())
        line = [str(program), str(package), str(given), *map(str, images.shape[1:]), str(made), str(repeats)]
        answer = subprocess.run(line, capture_output=True, text=True, check=True)
        logits = np.frombuffer(made.read_bytes(), np.float32).reshape(len(images), -1)
    return logits, np.array(answer.stdout.split(), dtype=np.float64)

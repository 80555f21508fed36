"""Small C kernels, compiled by the system's compiler at first use and kept in the user's cache folder.

Where there is no compiler, or OFA_KERNELS=0, everything runs on PyTorch's own operations instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
log = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of `name`.c, None where they cannot be had."""
    if os.environ.get("OFA_KERNELS") == "0":
        return None
    source = Path(__file__).with_name(f"{name}.c")
    path = _folder() / f"{name}-{_key(source)}.so"
    try:
        if not path.exists():
            _compile(source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        log.info("%s runs on PyTorch's own operations: no compiled kernel (%s)", name, error)
        return None


def _compile(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        line = [os.environ.get("CC", "cc"), *FLAGS, "-o", str(made), str(source)]
        subprocess.run(line, check=True, capture_output=True, text=True)
        os.replace(made, path)  # at once: other processes may be compiling too


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ofa-nas"


def _key(source: Path) -> str:
    """Of the source, the flags and the processor: a home folder may be shared by different machines."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    text = source.read_text() + " ".join(FLAGS) + platform.machine() + os.environ.get("CC", "cc") + flags
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Files that survive a kill: each is written whole or not at all; a torn last line of a log is dropped on reading."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "optuna", "onnx", "onnxruntime", "ofa-nas")
ABANDONED = 3600.0  # seconds after which nobody still writes a file


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` at once: whoever reads it, at any moment, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sweep(path)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, default=_plain) + "\n")


def cache_folder() -> Path:
    """The user's folder of files that can be made or fetched again: $XDG_CACHE_HOME/ofa-nas, or ~/.cache/ofa-nas."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ofa-nas"


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises UserError, naming it, where it is absent or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give another file, or run the stage that writes it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it, or delete it and run its stage again") from None


def append_jsonl(path: str | Path, value: Any) -> None:
    """Append one JSON line and wait until the disk has it; a torn line that a kill left is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write((json.dumps(value, default=_plain) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read all whole lines; an absent file has none, a torn last line is left out."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a line that is not valid JSON ({error}); delete the line or the file") from None


def write_parquet(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a data frame as Parquet (zstd, with checksums), atomically."""
    import io

    buffer = io.BytesIO()
    frame.to_parquet(buffer, compression="zstd", index=False, write_page_checksum=True)
    atomic_write(path, buffer.getvalue())


def versions() -> dict[str, str]:
    """Versions of Python, the libraries a result depends on, and the commit of this project's checkout."""
    found = {"python": platform.python_version(), "commit": commit()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short commit of this checkout, "+" appended where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        run = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    for left in path.parent.glob(f".{escape(path.name)}.????????"):
        with suppress(OSError):  # another process sweeps too
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _cut_torn_line(file: Any) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy scalars and arrays, tuples inside them, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")

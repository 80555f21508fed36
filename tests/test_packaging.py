"""The wheel holds all that a clone holds: its commands find their configuration where there is no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ofa", "predictors", "search", "scripts", "conf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")):
        shutil.copy(path, source)
    pip("wheel", "--no-deps", "--wheel-dir", str(source / "dist"), str(source))
    return next((source / "dist").glob("ofa_nas-*.whl"))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


@pytest.mark.slow
def test_wheel_holds_every_file(wheel: Path) -> None:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert not wanted - set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_installed_command_finds_its_configuration(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    program = str(target / "bin/ofa-train")
    environment = os.environ | {"PYTHONPATH": str(target)}
    for arguments, expected in (
        (["-c", "import conf; print(conf.__file__)"], str(target)),
        ([program, "--cfg", "job"], "name: digits"),
        ([program, "--help"], "data.val_size="),
    ):
        line = [sys.executable, *arguments]
        out = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
        assert expected in out

"""Imports go one way (scripts -> search, predictors, ofa), and a search or a call for help loads no torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ("ofa", "predictors", "search", "scripts", "conf", "tests")
ALLOWED = {
    "ofa": ("ofa",),
    "predictors": ("predictors", "ofa"),
    "search": ("search", "ofa.space", "ofa.files", "ofa.limits", "ofa.errors"),
    "scripts": ("scripts", "search", "predictors", "ofa"),
    "conf": (),
}
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = [name for name in imports(path) if within(name, PROJECT) and not within(name, ALLOWED[package])]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def loads_torch(*modules: str) -> bool:
    code = f"import {', '.join(modules)}, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return answer.stdout == "True\n"


def test_search_space_and_files_load_no_torch() -> None:
    search = [f"search.{path.stem}" for path in (ROOT / "search").glob("*.py") if path.stem != "__init__"]
    assert search
    assert not loads_torch("ofa", "ofa.space", "ofa.table", "ofa.files", "ofa.limits", "ofa.errors", "search", *search)


def test_no_command_loads_torch_before_it_runs() -> None:
    assert not loads_torch(*(target.partition(":")[0] for target in COMMANDS.values()))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_also_a_script_and_explains_itself(command: str) -> None:
    script = ROOT / f"{COMMANDS[command].partition(':')[0].replace('.', '/')}.py"
    line = [sys.executable, str(script), "--help"]
    answer = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(f"{command} [name=value ...]")


def test_public_names_are_what_they_say_whatever_was_loaded_before() -> None:
    code = "import ofa.evaluate; from ofa import extract, recalibrate; print(callable(extract), callable(recalibrate))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout == "True True\n"
    for package in ("ofa", "predictors"):
        names = {path.stem for path in (ROOT / package).iterdir()}
        homes = importlib.import_module(package).__all__
        assert not names & set(homes), "a module of a public name's name would hide it"

"""Latency of a device elsewhere: files go there, a runner without this project measures, a table comes back."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ofa.errors import UserError
from predictors.latency_table import LatencyTable
from predictors.remote import over_adb, over_ssh, read_table, read_times, write_jobs, write_model_jobs
from predictors.shapes import Shape

SHAPES = [Shape("conv", "relu", 8, 8, 3, 1, 8), Shape("depthwise", "h_swish", 8, 8, 3, 2, 8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert write_jobs([*SHAPES, SHAPES[0]], tmp_path / "jobs") == 2
    return tmp_path / "jobs"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ssh and adb that run on this machine, in a home of their own."""
    there, programs = tmp_path / "there", tmp_path / "bin"
    there.mkdir()
    programs.mkdir()
    scripts = {
        "ssh": f'#!/bin/sh\necho "ssh $1" >> {tmp_path}/log\nshift\ncd {there} && exec sh -c "$*"\n',
        "adb": f"""#!/bin/sh
echo "adb $2 $3" >> {tmp_path}/log
shift 2
case $1 in
push) mkdir -p "$3" && cp -r "$2" "$3" ;;
shell) exec sh -c "$2" ;;
pull) cp "$2" "$3" ;;
esac
""",
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the device has nothing of this project
    return there


def test_a_table_comes_back_over_ssh(folder: Path, commands: Path, tmp_path: Path) -> None:
    over_ssh("pi@board", folder, place="my jobs", python=sys.executable)
    assert (commands / "my jobs/results.json").read_bytes() == (folder / "results.json").read_bytes()
    assert (tmp_path / "log").read_text() == "ssh pi@board\n" * 3
    table = read_table(folder)
    assert set(table.times) == set(SHAPES)
    assert all(
        0 <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["n"] >= 5 for row in table.times.values()
    )
    assert table.device["threads"] == 1 and table.device["runtime"].startswith("onnxruntime ")
    table.save(tmp_path / "table.parquet")
    assert LatencyTable.load(tmp_path / "table.parquet").times == table.times


def test_a_table_comes_back_over_adb(folder: Path, commands: Path, tmp_path: Path) -> None:
    over_adb("R58", folder, place=str(commands / "tmp"), python=sys.executable)
    assert set(read_table(folder).times) == set(SHAPES)
    assert (tmp_path / "log").read_text() == "adb R58 push\nadb R58 shell\nadb R58 pull\n"


def test_the_runner_needs_python_and_the_runtime_alone_and_goes_on_where_it_was(folder: Path) -> None:
    line = [sys.executable, "-I", "runner.py", "jobs.json", "results.json"]
    jobs = json.loads((folder / "jobs.json").read_text())
    names = jobs["groups"][0]
    jobs["groups"] = [names[:2], names[2:]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    known = {"protocol": 1, "device": {"machine": "m"}, "times": {name: [1.0, 2.0] for name in names[:2]}}
    (folder / "results.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"lacks 2 models, 00001_less\.onnx first; run runner\.py again"):
        read_times(folder)
    subprocess.run(line, cwd=folder, check=True, capture_output=True)
    device, times = read_times(folder)
    assert times[names[0]].tolist() == [1.0, 2.0], "not measured again"
    assert device["cores"] == os.cpu_count()
    source = (folder / "runner.py").read_text()
    assert not any(f"import {package}" in source or f"from {package}" in source for package in ("ofa", "predictors"))


def test_a_table_is_the_difference_of_its_two_models_by_hand(folder: Path) -> None:
    rows = json.loads((folder / "shapes.json").read_text())
    times = {row["files"][0]: [1.0, 1.0, 1.0] for row in rows} | {row["files"][1]: [2.0, 3.0, 4.0] for row in rows}
    (folder / "results.json").write_text(json.dumps({"protocol": 1, "device": {"machine": "m"}, "times": times}))
    table = read_table(folder)
    for row in rows:
        found = table.times[Shape(**row["shape"])]
        assert found["n"] == 3 and found["median_ms"] == pytest.approx(2 / row["n"])


def test_whole_models_are_timed_too(folder: Path, tmp_path: Path) -> None:
    write_model_jobs(sorted(folder.glob("*_less.onnx")), tmp_path / "whole", repeats=5)
    line = [sys.executable, "-I", "runner.py", "jobs.json", "results.json"]
    subprocess.run(line, cwd=tmp_path / "whole", check=True, capture_output=True)
    _, times = read_times(tmp_path / "whole")
    assert sorted(times) == ["00000_less.onnx", "00001_less.onnx"]
    assert all(np.all(row > 0) for row in times.values())


def test_what_goes_wrong_on_the_way_is_said(folder: Path, commands: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ssh board .* failed with status 127: .*no-python"):
        over_ssh("board", folder, python="no-python")
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        read_table(folder)
    (folder / "results.json").write_text('{"protocol": 2}')
    with pytest.raises(UserError, match="has protocol 2, not 1"):
        read_table(folder)
    (folder / "results.json").write_text('{"protocol": 1}')
    with pytest.raises(UserError, match=r"is no result of runner\.py"):
        read_table(folder)
    with pytest.raises(UserError, match="0 shapes"):
        write_jobs([], folder)
    with pytest.raises(UserError, match="no model to measure"):
        write_model_jobs([], folder)

"""Latency of a device elsewhere: files go there, a runner without this project measures, a table comes back."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.export.card import Card, save_net
from ofa.files import write_json
from ofa.space import Arch
from predictors.latency_table import LatencyTable
from predictors.remote import over_adb, over_ssh, read_table, read_times, write_jobs, write_model_jobs
from predictors.shapes import Shape, space_shapes
from scripts import latency
from scripts.parts import fitted, load_parts
from tests.ofa.nets import SPEC, random_net

SHAPES = [Shape("conv", "relu", 8, 8, 3, 1, 8), Shape("depthwise", "h_swish", 8, 8, 3, 2, 8)]

DEVICE = {"machine": "m", "cores": 2, "runtime": "onnxruntime"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert write_jobs([*SHAPES, SHAPES[0]], tmp_path / "jobs") == 2
    return tmp_path / "jobs"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ssh and adb that run on this machine, each host in a home of its own."""
    there, programs = tmp_path / "there", tmp_path / "bin"
    there.mkdir()
    programs.mkdir()
    scripts = {
        "ssh": f"""#!/bin/sh
echo "ssh $1" >> {tmp_path}/log
mkdir -p {there}/$1 && cd {there}/$1
shift
exec sh -c "$*"
""",
        "python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
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


def run_here(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the runner as a device does, and check its status."""
    line = [sys.executable, "-I", "runner.py", "jobs.json", "results.json"]
    return subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def jobs_id(folder: Path) -> str:
    return str(json.loads((folder / "jobs.json").read_text())["id"])


def test_a_table_comes_back_over_ssh(folder: Path, commands: Path, tmp_path: Path) -> None:
    over_ssh("pi@board", folder, place="my jobs", python=sys.executable)
    assert (commands / "pi@board/my jobs/results.json").read_bytes() == (folder / "results.json").read_bytes()
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
    run_here(folder)
    jobs, known = json.loads((folder / "jobs.json").read_text()), results(folder)
    names = jobs["groups"][0]
    jobs["groups"] = [names[:2], names[2:]]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "results.json").write_text(json.dumps(known | {"times": {name: [1.0, 2.0] for name in names[:2]}}))
    with pytest.raises(UserError, match=r"lacks 2 models, 00001_less\.onnx first; run runner\.py again"):
        read_times(folder)
    run_here(folder)
    device, times = read_times(folder)
    assert times[names[0]].tolist() == [1.0, 2.0], "not measured again"
    assert device["cores"] == os.cpu_count()
    source = (folder / "runner.py").read_text()
    assert not any(f"import {package}" in source or f"from {package}" in source for package in ("ofa", "predictors"))


def test_jobs_have_an_id_of_their_options_names_and_contents(folder: Path, tmp_path: Path) -> None:
    first = jobs_id(folder)
    write_jobs(SHAPES, folder)
    assert jobs_id(folder) == first, "the same jobs"
    found = {first}
    for shapes, threads in ((SHAPES, 2), (SHAPES[:1], 1), (SHAPES[::-1], 1)):
        write_jobs(shapes, tmp_path / "other", threads=threads)
        found.add(jobs_id(tmp_path / "other"))
    models = [tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "c" / "a.onnx"]
    models[2].parent.mkdir()
    for model, content in zip(models, (b"1", b"1", b"2"), strict=True):
        model.write_bytes(content)
        write_model_jobs([model], tmp_path / "models")
        found.add(jobs_id(tmp_path / "models"))
    assert len(found) == 7


def test_results_of_other_jobs_are_moved_aside_on_the_device(folder: Path) -> None:
    old = {"protocol": 1, "id": "other", "device": {"machine": "m"}, "times": {"00000_less.onnx": [1e9, 1e9]}}
    (folder / "results.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"has times of the jobs other, not of .*jobs\.json.*; remove it and run"):
        read_times(folder)
    run_here(folder)
    assert json.loads((folder / "results.json.old").read_text()) == old
    assert read_times(folder)[1]["00000_less.onnx"].max() < 1e9
    assert results(folder)["id"] == jobs_id(folder)


def test_timing_anew_keeps_what_other_jobs_left_on_the_device(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text())
    old = {"protocol": 1, "id": "other", "device": {"machine": "m"}, "times": {"a": [1.0]}}
    for id_, aside in (("other", True), (jobs["id"], False)):
        (folder / "results.json").write_text(json.dumps(old | {"id": id_, "device": {}}))
        (folder / "results.json.old").unlink(missing_ok=True)
        (folder / "jobs.json").write_text(json.dumps(jobs | {"again": True}))
        run_here(folder)
        assert (folder / "results.json.old").exists() == aside
        assert "a" not in results(folder)["times"]


@pytest.mark.parametrize(("key", "value"), [("machine", "another board"), ("runtime", "onnxruntime 0.1")])
def test_the_runner_refuses_results_of_another_device(folder: Path, key: str, value: str) -> None:
    run_here(folder)
    known = results(folder)
    (folder / "results.json").write_text(json.dumps(known | {"device": known["device"] | {key: value}}))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_here(folder)
    assert f"holds for {key} {value}, not {known['device'][key]}" in caught.value.stderr
    assert "remove results.json" in caught.value.stderr
    assert results(folder)["device"][key] == value, "left as it was"


def test_a_table_is_the_difference_of_its_two_models_by_hand(folder: Path) -> None:
    rows = json.loads((folder / "shapes.json").read_text())
    times = {row["files"][0]: [1.0, 1.0, 1.0] for row in rows} | {row["files"][1]: [2.0, 3.0, 4.0] for row in rows}
    known = {"protocol": 1, "id": jobs_id(folder), "device": DEVICE, "times": times}
    (folder / "results.json").write_text(json.dumps(known))
    table = read_table(folder)
    for row in rows:
        found = table.times[Shape(**row["shape"])]
        assert found["n"] == 3 and found["median_ms"] == pytest.approx(2 / row["n"])


def test_whole_models_are_timed_too(folder: Path, tmp_path: Path) -> None:
    write_model_jobs(sorted(folder.glob("*_less.onnx")), tmp_path / "whole", repeats=5)
    run_here(tmp_path / "whole")
    _, times = read_times(tmp_path / "whole")
    assert sorted(times) == ["00000_less.onnx", "00001_less.onnx"]
    run_here(tmp_path / "whole")
    again = read_times(tmp_path / "whole")[1]
    assert all((again[name] != times[name]).any() for name in times), "measured again"
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
    names = [name for group in json.loads((folder / "jobs.json").read_text())["groups"] for name in group]
    good = {name: [1.0, 2.0] for name in names}
    damages: list[tuple[dict[str, Any], Any, str]] = [
        ({names[1]: row}, DEVICE, rf"\({names[1]} has times .*, not some of 0 and more\); run it again")
        for row in ([], [[1, 2]], [1.0, None], [1.0, -1.0], 5)
    ]
    damages += [({names[0]: ["a", 1]}, DEVICE, "could not convert"), ({}, {"foo": 1}, "its device has no cores")]
    for times, device, words in damages:
        damaged = {"protocol": 1, "id": jobs_id(folder), "device": device, "times": good | times}
        (folder / "results.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=rf"is no result of runner\.py .*{words}"):
            read_table(folder)
    uneven = {"protocol": 1, "id": jobs_id(folder), "device": DEVICE, "times": good | {names[1]: [1.0]}}
    (folder / "results.json").write_text(json.dumps(uneven))
    with pytest.raises(UserError, match=rf"has 1 times of {names[1]}, 2 of {names[0]}, which were measured in turns"):
        read_table(folder)
    with pytest.raises(UserError, match="0 shapes"):
        write_jobs([], folder)
    with pytest.raises(UserError, match="no model to measure"):
        write_model_jobs([], tmp_path / "models")
    with pytest.raises(UserError, match="measures the operations of a space; give the models a folder"):
        write_model_jobs([folder / "00000_less.onnx"], folder)


def configuration(*overrides: str) -> DictConfig:
    """Of a space with few operations."""
    small = [f"space.{name}=[{value}]" for name, value in {"resolution": 12, "width": 0.5}.items()]
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [*small, *overrides])


def test_two_hosts_do_not_mix(commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("pi@a:22", "b", "b"):
        latency.main(configuration(f"run={tmp_path / 'run'}", f"remote=ssh:{host}"))
    assert (tmp_path / "log").read_text() == "ssh pi@a:22\n" * 3 + "ssh b\n" * 3, "the third call reads what is there"
    folders = sorted((tmp_path / "run/remote").iterdir())
    assert [folder.name for folder in folders] == ["ssh-b", "ssh-pi@a%3A22"]
    tables = [LatencyTable.load(folder / "latency.parquet") for folder in folders]
    assert tables[0].times != tables[1].times
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"predictor.latency_ms.table={folders[0]}/latency.parquet" in line and "restart=true" not in line
    write_json(tmp_path / "run/search/phone/random/config.json", {})  # of a search by other latencies
    latency.main(configuration(f"run={tmp_path / 'run'}", "remote=ssh:b"))
    assert capsys.readouterr().out.splitlines()[-1] == f"{line} restart=true"


def test_results_of_another_space_or_thread_count_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, folder = (f"run={tmp_path / 'run'}", f"remote=folder:{tmp_path / 'jobs'}"), tmp_path / "jobs"
    latency.main(configuration(*options))
    assert "bring results.json back here, and give this command again" in capsys.readouterr().out
    run_here(folder)
    latency.main(configuration(*options))
    for other, message in {
        "threads=3": "threads 1 and batch 1, not 3 and 1",
        "measure.threads=2": "threads 1 and batch 1, not 2 and 1",
        "space.width=[1.0]": r"of \d+ operations, \d+ of the \d+ wanted",
    }.items():
        with pytest.raises(UserError, match=rf"{message}.*; give the options .* or remove .*results\.json"):
            latency.main(configuration(*options, other))


def test_the_table_prices_a_space_through_its_predictor(tmp_path: Path) -> None:
    table = tmp_path / "latency.parquet"
    cfg = configuration("predictor=[latency_ms,latency_table]", f"predictor.latency_ms.table={table}")
    space = load_parts(cfg)[1]
    timing = {"p10_ms": 1.0, "median_ms": 2.5, "p90_ms": 3.0, "n": 5.0}
    LatencyTable({"machine": "board"}, dict.fromkeys(space_shapes(space), timing)).save(table)
    genes = space.sample(5, np.random.default_rng(0))
    blocks = space.values(genes, "depth") @ [3, 4, 4]  # expand, depthwise, project; squeeze-excite from stage 2 on
    np.testing.assert_array_equal(fitted(cfg, space)["latency_ms"](genes), 2.5 * (3 + blocks + 2))  # stem, head


def network(path: Path, seed: int = 0) -> Path:
    """The card of a network with random weights."""
    save_net(path, random_net(seed=seed), Card(Arch(16), {}, SPEC, {}, {}, 0))
    return path


def test_a_network_is_timed_on_a_host(commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        f"run={tmp_path / 'run'}",
        f"model={network(tmp_path / 'net.json')}",
        "runtime=[onnx,onnx_float]",
        "threads=1",
    )
    for _ in range(2):
        latency.main(configuration(*options, "remote=ssh:pi@board"))
        first, *rows = capsys.readouterr().out.splitlines()
        assert first.startswith("on ") and first.endswith(f"{os.cpu_count()} cores:")
        assert [row.split(":")[0] for row in rows] == ["onnx", "onnx_float"]
        assert all(
            re.search(r": [0-9.]+ ms \(10 % to 90 %: [0-9.]+ to [0-9.]+; n \d+; 1 threads\)", row) for row in rows
        )
    assert (tmp_path / "log").read_text() == "ssh pi@board\n" * 6, "timed anew"
    with pytest.raises(UserError, match=r"runtime=c is not timed elsewhere; choose from onnx, litert, onnx_float"):
        latency.main(configuration(*options, "runtime=[onnx,c]", "remote=ssh:pi@board"))


def test_a_folder_times_the_network_that_it_was_made_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "carried", f"run={tmp_path / 'run'}"
    first, second = (
        configuration(run, f"remote=folder:{folder}", f"model={network(tmp_path / f'{seed}.json', seed)}")
        for seed in (0, 1)
    )
    latency.main(first)
    assert f"carry {folder} to the device" in capsys.readouterr().out
    run_here(folder)
    with pytest.raises(UserError, match="has times of the jobs"):
        latency.main(second)
    latency.main(first)
    assert "onnx: " in capsys.readouterr().out

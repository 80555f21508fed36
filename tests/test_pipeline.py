"""The whole job on real digits, with a short schedule: every file is there, the numbers hold together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch

from ofa.data import digits
from ofa.evaluate import accuracy, specialise
from ofa.export.card import load_card, rebuild
from ofa.export.onnx import load_onnx, run_onnx, run_torch
from ofa.space import load_space
from ofa.supernet import Supernet
from ofa.training.trained import load_supernet
from ofa.weights import load_tensors, load_weights
from tests.ofa.test_published import theirs

SHORT = (
    "schedule.epochs=12",
    "measure.subnets=14",
    "measure.latency_nets=6",
    "measure.int8_subnets=5",
    "predictor=int8",
    "fit.repeats=2",
    "search.evaluations=120",
    "finetune.epochs=1",
    "compress.finetuning.epochs=1",
    "export.images=100",
    "device.stm32f746.runtimes=[c]",  # the TFLM converter takes most of a minute where it is installed
)


def without(*words: str) -> list[str]:
    """The options above, but those that name one of `words`."""
    return [option for option in SHORT if not any(word in option for word in words)]


def ofa(stage: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    entry = "command" if stage == "measure" else "main"
    command = [sys.executable, "-c", f"from scripts.{stage} import {entry}; {entry}()", *options]
    environment = os.environ | {"OFA_DEBUG": "1", "COLUMNS": "120"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    found = ofa("run", *SHORT, folder=folder)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return folder / "runs/digits"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("device", ["stm32l073", "stm32f746"])
def test_every_device_gets_a_quantized_model_within_its_budget(run: Path, device: str) -> None:
    result = read(run / "export" / device / "result.json")
    assert result["met"]
    assert {row["limit"] for row in result["budget"]} == {"peak_memory_bytes", "weight_bytes", "macs"}
    float_, pruned, int8 = (result["models"][name] for name in ("float", "pruned", "int8"))
    assert pruned["macs"] < float_["macs"]
    assert int8["file_bytes"] < pruned["file_bytes"] < float_["file_bytes"]
    assert int8["macs"] == pruned["macs"]
    assert float_["accuracy"] > 0.5
    assert float_["macs"] == result["predicted"]["macs"], "an exact cost is not predicted"


@pytest.mark.parametrize("device", ["stm32l073", "stm32f746"])
def test_the_found_network_is_fine_tuned_by_the_largest_and_its_card_says_so(run: Path, device: str) -> None:
    card = load_card(run / "specialize" / device / "float.json")
    (step,) = card.training["finetuning"]
    assert (step["teacher"], step["epochs"], step["distill"]["losses"]) == (
        "the supernet's largest",
        1,
        {"soft_labels": 0.5},
    )
    space = load_space("digits_mbv3")
    supernet = load_supernet(run / "train", space)
    inherited = specialise(supernet, card.arch, digits())
    before = accuracy(inherited, digits(), "val", resolution=card.arch.resolution)
    assert before == pytest.approx(step["accuracy_val_before"])
    tuned = rebuild(run / "specialize" / device / "float.json")
    assert not torch.equal(tuned.units[0].conv.weight, inherited.units[0].conv.weight)
    assert not list((run / "specialize" / device).glob("*state*"))


def test_the_shipped_file_computes_what_its_card_rebuilds(run: Path) -> None:
    folder = run / "export/stm32f746"
    card = load_card(folder / "pruned.json")
    net = rebuild(run / "specialize/stm32f746/pruned.json")
    images = next(digits().batches("test", 50, card.spec.resolution, rng=None))[0]
    expected = run_torch(net, images)
    assert np.abs(run_onnx(folder / "pruned.onnx", images) - expected).max() < 1e-4 * np.abs(expected).max()
    with torch.no_grad():
        net.units[0].conv.weight.mul_(1.05)  # type: ignore[union-attr, operator]
    assert np.abs(run_torch(net, images) - expected).max() > 1e-4 * np.abs(expected).max()
    kinds = {node.op_type for node in load_onnx(folder / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_every_agent_searched_every_device(run: Path) -> None:
    for device in ("stm32l073", "stm32f746"):
        for agent in ("random", "evolution", "optuna"):
            assert read(run / "search" / device / agent / "result.json")["evaluations"] == 120


def test_int8_accuracy_is_predicted_and_says_whether_the_ranking_changed(run: Path, tmp_path: Path) -> None:
    chosen = read(run / "search/stm32f746/chosen.json")
    assert abs(chosen["predicted"]["accuracy_int8"] - chosen["predicted"]["accuracy"]) < 0.2
    assert read(run / "fit/fit.json")["accuracy_int8"]["n"] == 5
    assert "int8 against float:" in (run / "report.html").read_text()
    shutil.copytree(run, tmp_path / "runs/digits", ignore=shutil.ignore_patterns("search", "specialize", "export"))
    found = ofa("search", *SHORT, "objectives=[accuracy_int8,macs]", "agent=random", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    result = read(tmp_path / "runs/digits/search/stm32f746/random/result.json")
    assert result["objectives"] == {"accuracy_int8": -1, "macs": 1}
    best = max(row["values"]["accuracy_int8"] for row in result["front"])
    assert result["chosen"]["values"]["accuracy_int8"] == best


def test_agents_side_by_side_find_what_they_find_one_after_the_other(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/digits", ignore=shutil.ignore_patterns("search", "specialize", "export"))
    found = ofa("search", *SHORT, "workers=2", "restart=true", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (found.stdout + found.stderr).count("search stm32f746 optuna 120/120") == 1
    for agent in ("random", "evolution", "optuna"):
        name = f"search/stm32f746/{agent}/evaluations.parquet"
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "runs/digits" / name), pd.read_parquet(run / name))


@pytest.mark.parametrize(("stage", "workers"), [("search", 2), ("run", 1)])
def test_a_budget_out_of_reach_is_named_and_the_other_devices_are_finished(
    run: Path, tmp_path: Path, stage: str, workers: int
) -> None:
    shutil.copytree(run, tmp_path / "runs/digits", ignore=shutil.ignore_patterns("search", "specialize", "export"))
    options = ("agent=[random,evolution]", f"workers={workers}", "device.stm32l073.limits.macs=1")
    tight = ofa(stage, *SHORT, *options, folder=tmp_path)
    assert tight.returncode == 1
    assert "STM32L073: no network of space digits_mbv3 meets macs <= 1" in tight.stderr
    assert (tmp_path / "runs/digits/search/stm32f746/chosen.json").exists()
    assert not (tmp_path / "runs/digits/search/stm32l073/chosen.json").exists()
    assert read(tmp_path / "runs/digits/search/stm32l073/infeasible.json")["reason"] in tight.stderr
    if stage == "run":
        found = read(tmp_path / "runs/digits/report/summary.json")
        assert found["missing"] == [] and "search" in found["timings"]
        assert {device["device"]: device["met"] for device in found["devices"]} == {
            "stm32f746": True,
            "stm32l073": None,
        }


def test_a_search_before_the_predictors_names_the_command_that_fits_them(tmp_path: Path) -> None:
    early = ofa("search", folder=tmp_path)
    assert early.returncode == 1
    assert "search needs the stage fit, which has not finished in runs/digits; run: ofa-fit" in early.stderr


def test_every_search_has_a_study_of_its_own_in_a_storage(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/digits", ignore=shutil.ignore_patterns("search", "specialize", "export"))
    options = [*without("evaluations"), "search.evaluations=10", "agent=optuna", "seeds=2", "workers=2"]
    options += ["agent.optuna.storage=sqlite:///studies.db", "agent.optuna.options={n_startup_trials: 5}"]
    found = ofa("search", *options, folder=tmp_path)
    assert found.returncode == 0, found.stderr[-4000:]
    studies = optuna.get_all_study_names(f"sqlite:///{tmp_path}/studies.db")
    names = {f"search/{device}/optuna/seed-{seed}" for device in ("stm32l073", "stm32f746") for seed in (0, 1)}
    assert set(studies) == names
    wrong = ofa(
        "search", *SHORT, "agent=optuna", "agent.optuna.options={n_startups: 5}", "restart=true", folder=tmp_path
    )
    assert "sampler tpe does not take options {'n_startups': 5}" in wrong.stderr


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("search.evaluations=1.5", "search.evaluations=1.5 must be a whole number, 1 or more"),
        ("workers=0", "workers=0 must be a whole number, 1 or more"),
        ("device=bare", "lacks a name or limits; a device's YAML file begins with # @package device.<name>"),
        ("device=number", "device number lacks a name or limits"),
        ("device=misspelt", "device misspelt has no option 'runtime'; choose from name, description, limits, runtimes"),
    ],
)
def test_settings_that_would_fail_after_a_search_are_refused_before_it(
    run: Path, tmp_path: Path, option: str, answer: str
) -> None:
    (tmp_path / "my/device").mkdir(parents=True)
    (tmp_path / "my/device/bare.yaml").write_text("limits: {macs: 1M}\n")
    (tmp_path / "my/device/number.yaml").write_text("# @package device.number\nname: a\nlimits: 3\n")
    (tmp_path / "my/device/misspelt.yaml").write_text(
        "# @package device.misspelt\nname: a\nlimits: {macs: 1M}\nruntime: [c]\n"
    )
    found = ofa("search", f"run={run}", "--config-dir", "my", *without("stm32f746"), option, folder=tmp_path)
    assert found.returncode == 1 and answer in found.stderr


def test_a_network_is_timed_here_in_the_threads_asked_for(run: Path, tmp_path: Path) -> None:
    options = (f"model={run / 'export/stm32f746/int8.json'}", "runtime=onnx", "threads=2")
    timed = ofa("measure", "latency", *options, folder=tmp_path)
    assert timed.returncode == 0, timed.stderr
    assert timed.stdout.startswith("onnx: ") and timed.stdout.endswith("; 2 threads)\n")
    assert "model has no value" in ofa("measure", "latency", folder=tmp_path).stderr


def test_the_report_is_one_page_that_needs_no_network(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "STM32L073" in page
    assert "<script src" not in page
    assert 'href="http' not in page


def test_a_finished_run_is_not_run_again(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.onnx")}
    found = ofa("run", *SHORT, folder=run.parent.parent)
    assert found.returncode == 0, found.stderr
    assert "train: already done" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.onnx")} == before


def test_an_imported_checkpoint_takes_the_place_of_training(run: Path, tmp_path: Path) -> None:
    tensors = load_tensors(run / "train/supernet.safetensors")[0]
    supernet = Supernet(load_space("digits_mbv3"))
    load_weights(supernet, tensors, run)
    torch.save({"state_dict": theirs(supernet, old=False)}, tmp_path / "net.pth")
    found = ofa("import_", *SHORT, "checkpoint=net.pth", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "SHA-256" in found.stdout
    imported = load_tensors(tmp_path / "runs/digits/train/supernet.safetensors")[0]
    assert all(torch.equal(imported[name], tensor) for name, tensor in tensors.items())
    found = ofa("measure", *SHORT, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "runs/digits/measure/subnets.jsonl").read_text() == (run / "measure/subnets.jsonl").read_text()


def test_another_configuration_is_refused(run: Path) -> None:
    found = ofa("train", *SHORT, "schedule.batch_size=32", folder=run.parent.parent)
    assert found.returncode == 1
    assert "schedule.batch_size" in found.stderr
    assert "another run=<folder>" in found.stderr


def test_agents_are_compared_over_seeds(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/digits")
    options = ("agent=[random,genetic,aging]", "device=stm32l073", "seeds=3", "search.evaluations=150")
    found = ofa("search", *without("evaluations", "stm32f746"), *options, folder=tmp_path)
    assert found.returncode == 1, "another number of evaluations needs restart=true"
    found = ofa("search", *without("evaluations", "stm32f746"), *options, "restart=true", folder=tmp_path)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    folder = tmp_path / "runs/digits/search/stm32l073"
    searches = read(folder / "compare.json")["searches"]
    assert [(row["agent"], row["seed"]) for row in searches] == [
        (agent, seed) for agent in ("random", "genetic", "aging") for seed in (0, 1, 2)
    ]
    table = pd.read_parquet(folder / "compare.parquet")
    last = table.groupby(["agent", "seed"])["hypervolume"].max()
    for row in searches:
        assert last[row["agent"], row["seed"]] == pytest.approx(row["hypervolume"])
    assert (folder / "compare.svg").read_text().startswith("<?xml")
    assert "mean and spread over 3 seeds" in found.stdout


def test_processes_and_machines_measure_one_search(run: Path, tmp_path: Path) -> None:
    options = (*without("stm32f746"), "mode=shared", "device=stm32l073", "search.measurements=4", "restart=true")
    options += (f"agent.optuna.storage=sqlite:///{tmp_path}/study.db", "agent.optuna.sampler=random")
    logs, results = [], []
    for machine, workers in (("one", 2), ("other", 1)):
        shutil.copytree(run, tmp_path / machine / "runs/digits")
        found = ofa("search", *options, f"workers={workers}", folder=tmp_path / machine)
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
        folder = tmp_path / machine / "runs/digits/search/stm32l073"
        logs.append([line for file in folder.glob("shared/measured-*.jsonl") for line in file.read_text().splitlines()])
        results.append(read(folder / "chosen.json"))
        measured = pd.read_parquet(folder / "shared/evaluations.parquet")
        assert (measured["violation"] == 0).all(), "moved within the limits"
    assert len(logs[0]) == len(set(logs[0])) == 4 and not logs[1], "measured once by all"
    assert results[0] == results[1] and results[0]["agent"] == "shared"


def test_a_search_that_iterates_measures_only_what_is_not_known_and_goes_on_where_it_was(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "runs/digits")
    options = (*without("stm32f746"), "mode=iterate", "device=stm32l073")
    options += ("search.measurements=4", "search.measure_batch=2", "workers=2")
    found = ofa("search", *options, folder=tmp_path)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    folder = tmp_path / "runs/digits/search/stm32l073"
    rows = (folder / "iterate/measured.jsonl").read_text().splitlines()
    before = (tmp_path / "runs/digits/measure/subnets.jsonl").read_text()
    assert len(rows) == len(set(rows)) == 4
    assert not any(json.dumps(json.loads(row)["arch"]) in before for row in rows)
    chosen = read(folder / "chosen.json")
    assert chosen["agent"] == "iterate"
    pool = [json.loads(row) for row in (*rows, *before.splitlines())]
    assert chosen["predicted"]["accuracy"] in [row["accuracy"] for row in pool], "the accuracy is a measured one"
    kept = read(folder / "iterate/result.json")
    for name in ("result.json", "config.json"):
        (folder / "iterate" / name).unlink()
    progress = folder / "iterate/progress.jsonl"
    progress.write_text("".join(progress.read_text().splitlines(keepends=True)[:-1]))  # as after a kill
    found = ofa("search", *options, folder=tmp_path)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    assert (folder / "iterate/measured.jsonl").read_text().splitlines() == rows
    assert read(folder / "iterate/result.json")["hypervolume"] == kept["hypervolume"]
    both = [option.replace("device=stm32l073", "device=[stm32f746,stm32l073]") for option in options]
    found = ofa("search", *both, folder=tmp_path)
    assert found.returncode == 0, "another device in front: " + found.stderr[-4000:]
    assert (folder / "iterate/measured.jsonl").read_text().splitlines() == rows

"""A command as its user meets it: configuration, help, and every mistake answered in one line."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from scripts.cli import stage_command, use_threads
from scripts.options import sources

STAGE = """
from omegaconf import DictConfig
from ofa.errors import UserError
from scripts.cli import make, stage_command
from scripts.stage import open_stage

@stage_command("data", "schedule")
def main(cfg: DictConfig) -> None:
    '''Train nothing, for a test.'''
    with open_stage(cfg, "train", ("data", "seed")) as stage:
        if not stage.done:
            {body}

if __name__ == "__main__":
    main()
"""
BODY = "print('trained with seed', cfg.seed)"


@dataclass
class Answer:
    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a stage called train in an empty folder, as `python train.py` would."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"

    def run(*arguments: str, body: str = BODY) -> Answer:
        script.write_text(STAGE.format(body=body))
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        status = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return Answer(status, *capsys.readouterr())

    return run


def test_command_runs_with_overrides_and_prints_the_next_command(command: Command) -> None:
    answer = command("seed=3", "run=my runs/a")
    assert answer.status == 0 and answer.err == ""
    assert "trained with seed 3" in answer.out
    assert answer.out.strip().splitlines()[-1].endswith("measure.py seed=3 'run=my runs/a'")


def test_command_writes_nothing_outside_its_run_folder(command: Command, tmp_path: Path) -> None:
    command()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "train.py"]
    assert Path.cwd() == tmp_path


def test_finished_stage_says_so(command: Command) -> None:
    command()
    answer = command()
    assert "already done" in answer.out and "trained" not in answer.out and "next: " in answer.out


def test_restart_is_not_part_of_the_next_command(command: Command) -> None:
    assert "restart=" not in command("restart=true").out


def test_sweep_gives_each_job_a_folder(command: Command, tmp_path: Path) -> None:
    answer = command("--multirun", "seed=0,1")
    assert "trained with seed 0" in answer.out and "trained with seed 1" in answer.out
    assert {path.parent.parent.name for path in tmp_path.rglob("train/config.json")} == {"seed=0", "seed=1"}


@pytest.mark.parametrize(
    ("run", "folders"),
    [("run=mine", {"mine/seed=0", "mine/seed=1"}), ("run=mine/s${seed}", {"mine/s0", "mine/s1"})],
)
def test_sweep_in_a_folder_of_the_users_gives_each_job_its_own(
    command: Command, tmp_path: Path, run: str, folders: set[str]
) -> None:
    answer = command("-m", "seed=0,1", run)
    assert answer.status == 0, answer.err
    assert {str(p.parents[1].relative_to(tmp_path)) for p in tmp_path.rglob("train/config.json")} == folders


def test_a_value_that_another_option_reads_may_be_added(command: Command) -> None:
    assert command("+side=24", "data.seed=${side}").status == 0


def test_cfg_prints_the_configuration_and_runs_nothing(command: Command, tmp_path: Path) -> None:
    answer = command("--cfg", "job", "seed=7")
    assert answer.status == 0 and "seed: 7\n" in answer.out and "next:" not in answer.out
    assert not (tmp_path / "runs").exists()


def test_help_explains_the_options_of_the_stage(command: Command) -> None:
    answer = command("--help", "data=parquet")
    assert answer.status == 0 and "Train nothing, for a test." in answer.out
    for expected in ("* data=parquet", "data=digits", "data.path=", "seed=0", "schedule.batch_size=", "--multirun"):
        assert expected in answer.out
    comments = {name: text for source in sources() for name, text in source.comments.items()}
    assert comments["seed"] in answer.out and "agent.random" not in answer.out


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["schedule.batch_sise=4"], 2, ["schedule.batch_sise is not an option", "did you mean schedule.batch_size="]),
        (
            ["device.stm32f746.limits={latency_ms:1}"],
            2,
            ["limits has no latency_ms to change", "write '+device.stm32f746.limits={latency_ms: <value>}'"],
        ),
        (
            ["device.stm32f746.limits.latency=5ms"],
            2,
            ["limits.latency is no limit of this device so far; write +device.stm32f746.limits.latency=<value>"],
        ),
        (
            ["schedule=attentivenas", "schedule.clip_norm=5"],
            2,
            ["clip_norm is not among the options of this schedule; write +schedule.clip_norm=<value> to add it"],
        ),
        (["sede=4"], 2, ["sede is not an option", "did you mean seed="]),
        (["data.path=here"], 2, ["data.path", "belongs to", "data=parquet"]),
        (["step=[scales,norms,scales]"], 1, ["names scales twice", "+step@step.scales_again=scales"]),
        (["data=digitz"], 2, ["data=digitz is not known", "cifar10, digits, folder, imagenet, parquet"]),
        (["device=[phone,none]"], 2, ["device=none is not known", "phone, server, stm32f746"]),
        (["experiment=none_such"], 2, ["experiment=none_such is not known", "digits"]),
        (
            ["schedule=digits", "distill@schedule.distill=kl"],
            2,
            ["distill@schedule.distill is not an option here", "belongs to schedule=alphanet", "schedule=shrinking"],
        ),
        (["data=3"], 2, ["name of one of its choices"]),
        (["seed"], 2, ["cannot read 'seed'", "name=value"]),
        (["data.seed=(1"], 2, ["cannot read 'data.seed=(1'"]),
        (["--verbos"], 2, ["--verbos"]),
        (["--cfg", "jobs"], 2, ["jobs", "choose from"]),
        (["--config-dir", "absent"], 2, ["absent", "not found"]),
        (["seed=abc"], 1, ["seed=abc is not a number", "seed=0"]),
        (["seed=-1"], 1, ["seed=-1 must be"]),
        (["finetune=null"], 1, ["finetune=null has no options", "leave it out, or give finetune."]),
        (["train.watch=null"], 1, ["train.watch=null has no options", "leave it out, or give train.watch."]),
        (["ondevice.finetuning=null"], 1, ["ondevice.finetuning=null has no options"]),
        (["fit=3"], 1, ["fit=3 has no options"]),
        (["train.initial=3"], 1, ["train.initial=3 is no path; write train.initial=./3"]),
        (["run=3"], 1, ["run=3 is no path"]),
        (["restart=3"], 1, ["restart=3 is not true or false"]),
        (["device=[]"], 1, ["device has no value; choose from device=phone, server, stm32f746"]),
        (["+train.watch.image=3"], 1, ["train.watch.image is not an option", "did you mean train.watch.images="]),
        (["device=stm32f746", "device.phone.limits.macs=3"], 2, ["belongs to device=phone"]),
        (["threads=0"], 1, ["threads=0", "at least 1"]),
        (["run=null"], 1, ["run=null is empty; give one, such as run=runs/mine"]),
        (["run="], 1, ["run= is empty"]),
        (["name=''"], 1, ["name= is empty"]),
        (["+seeed=3"], 1, ["seeed is not an option; did you mean seed="]),
        (["-m", "seed=0,1", "--cfg", "job"], 2, ["give one of --multirun, --cfg, --info and --help at a time"]),
    ],
)
def test_mistake_on_the_command_line_is_one_line(
    command: Command, arguments: list[str], status: int, parts: list[str]
) -> None:
    answer = command(*arguments)
    assert answer.status == status and answer.err.startswith("ofa-train: ")
    assert len(answer.err.splitlines()) == 1
    for part in parts:
        assert part in answer.err


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("raise UserError('wrong: 1; give 2')", "wrong: 1; give 2"),
        ("cfg.data.val_size = -1; make(cfg.data)", "val_size"),
        ("make({'_target_': 'ofa.schedule.Phase', 'name': 'a', 'epoch': 1})", "'epoch'"),
        ("make({'_target_': 'ofa.nothing'})", "ofa.nothing"),
        ("raise OSError(28, 'No space left on device', 'runs/a')", "cannot write runs/a: No space left on device"),
        (
            "raise PermissionError(13, 'Permission denied', 'cat.png')",
            "cannot read or write cat.png: Permission denied",
        ),
        ("raise PermissionError(1, 'Operation not permitted', '/sys/x')", "cannot read or write /sys/x: Operation not"),
        ("raise NotADirectoryError(20, 'Not a directory', 'a/train')", "cannot read or write a/train: Not a directory"),
        ("cfg.name = '???'; cfg.run", "name"),
        (
            "from concurrent.futures.process import BrokenProcessPool; raise BrokenProcessPool('terminated abruptly')",
            "a worker was ended, as the system does where memory is short; give this again with fewer workers=",
        ),
    ],
)
def test_mistake_found_by_a_stage_is_one_line(command: Command, body: str, part: str) -> None:
    answer = command(body=body)
    assert answer.status in (1, 2) and len(answer.err.splitlines()) == 1 and part in answer.err


@pytest.mark.parametrize("before", [(), ("seed=1",)])
def test_missing_value_is_named_with_its_explanation(command: Command, tmp_path: Path, before: tuple[str, ...]) -> None:
    (tmp_path / "more/data").mkdir(parents=True)
    (tmp_path / "more/data/mine.yaml").write_text("path: ???\n")
    answer = command(*before, "--config-dir", "more", "data=mine")
    assert answer.err.startswith("ofa-train: data.path has no value; give data.path=<value>")


def test_a_file_that_the_projects_own_would_hide_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more/device").mkdir(parents=True)
    own = (files("conf") / "device/stm32f746.yaml").read_text()
    (tmp_path / "more/device/stm32f746.yaml").write_text(own)
    assert command("--config-dir", "more").status == 0, "the same text"
    (tmp_path / "more/device/stm32f746.yaml").write_text(own.replace("macs:", "macs: 1M #"))
    answer = command("--config-dir", "more", "device=stm32f746")
    assert answer.status == 1 and "more/device/stm32f746.yaml would not be read" in answer.err
    assert "the project has a device=stm32f746; give it another name" in answer.err


def test_broken_yaml_is_named_with_its_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more/data").mkdir(parents=True)
    (tmp_path / "more/data/mine.yaml").write_text("val_size: 1\npath: [1\nsize: 2\n")
    answer = command("--config-dir", "more", "data=mine")
    assert answer.status == 2 and len(answer.err.splitlines()) == 1
    assert "mine.yaml, line 3" in answer.err


def test_step_that_an_experiment_names_twice_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [override /step: [scales, norms, scales]]\n"
    (tmp_path / "more/experiment/mine.yaml").write_text(text)
    options = "--config-dir", "more", "experiment=mine"
    answer = command(*options)
    assert answer.status == 1 and "step names scales twice" in answer.err and len(answer.err.splitlines()) == 1
    again = command(*options, "step=[scales]", "+step@step.scales_again=scales")
    assert again.status == 0, again.err


def test_option_that_an_experiment_misspells_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more/experiment").mkdir(parents=True)
    text = "# @package _global_\nnote: mine\nsearch: {objectives: {params: 1}}\nmeasure: {%s: 3}\n"
    assert command("+finetune.soft_labels=0.3").status == 0, "its class takes it"
    for option, status in (("subnetz", 1), ("subnets", 0)):
        (tmp_path / "more/experiment/mine.yaml").write_text(text % option)
        answer = command("--config-dir", "more", "experiment=mine")
        assert answer.status == status, answer.err
        assert ("measure.subnetz is not an option; did you mean measure.subnets=" in answer.err) == bool(status)


OPTIONS = "_target_: search.evolution.Evolution\npopulation: 20\n"


@pytest.mark.parametrize(
    ("group", "text", "parts"),
    [
        ("agent", OPTIONS, ["belongs to no agent", "begins with # @package agent.<name>"]),
        ("predictor", "_target_: predictors.costs.Macs\n", ["belongs to no predictor", "# @package predictor.<name>"]),
        ("device", "name: a\nlimits: {macs: 1M}\n", ["device.name=a belongs to no device"]),
        ("agent", "# @package agent.mine\npopulation: 20\n", ["a section with population has no _target_"]),
        ("agent", "# @package agent.mine\n_target_: search.evolution\n", ["agent.mine", "importable class"]),
        ("agent", f"# @package agent.mine\n{OPTIONS}populaton: 1\n", ["has no option 'populaton'; remove it"]),
        ("agent", "# @package agent.mine\n_target_: search.evolution.Evolution\n", ["lacks 'space'; give it"]),
        (
            "agent",
            "# @package agent.mine\n_target_: builtins.dict\npart: {_target_: predictors.lut.LutLatency}\n",
            ["agent.mine.part lacks 'space' and 'folder'; give it"],
        ),
    ],
)
def test_mistake_in_a_file_of_ones_own_is_one_line(
    command: Command, tmp_path: Path, group: str, text: str, parts: list[str]
) -> None:
    (tmp_path / "more" / group).mkdir(parents=True)
    (tmp_path / "more" / group / "mine.yaml").write_text(text)
    answer = command("--config-dir", "more", f"{group}=mine", body="make(cfg.agent.mine)")
    assert answer.status in (1, 2) and len(answer.err.splitlines()) == 1
    assert all(part in answer.err for part in parts), answer.err


@pytest.mark.parametrize(
    ("section", "options", "part"),
    [
        ("agent.evolution", "population=2.5", "Evolution has population=2.5; give a whole number"),
        ("agent.evolution", "mutation=true", "Evolution has mutation=True; give a number or null"),
        ("predictor.weight_bytes", "bits=8.5", "WeightBytes has bits=8.5; give a whole number"),
        ("schedule", "batch_size=64.5", "Schedule has batch_size=64.5; give a whole number"),
        ("schedule", "phases=[{name: a, epochs: 1, lr: 0.1, measured: 9.5}]", "Phase has measured=9.5; give a whole"),
        ("schedule", "phases=[3]", "phase 3 is no record"),
        ("finetune", "batch_size=1.5", "Finetuning has batch_size=1.5; give a whole number"),
        ("compress", "pruning=null", "Compression has pruning=None; leave that out, or give its options"),
        ("compress", "finetuning.batch_size=1.5", "Finetuning has batch_size=1.5; give a whole number"),
    ],
)
def test_number_of_another_kind_is_refused_where_a_part_is_made(
    command: Command, section: str, options: str, part: str
) -> None:
    answer = command(f"{section}.{options}", body=f"make(cfg.{section})")
    assert answer.status == 1 and len(answer.err.splitlines()) == 1 and part in answer.err


def test_bug_shows_its_traceback(command: Command) -> None:
    with pytest.raises(ZeroDivisionError):
        command(body="1 / 0")


def test_debug_shows_the_traceback_of_a_mistake(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFA_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong"):
        command(body="raise UserError('wrong')")


@pytest.mark.parametrize(
    ("option", "made", "how"),
    [
        ("run=other", True, "again"),
        ("restart=true", True, "without restart=true"),
        ("restart=true", False, "again"),
    ],
)
def test_interrupted_command_says_how_to_go_on(
    command: Command, tmp_path: Path, option: str, made: bool, how: str
) -> None:
    command(body="pass")  # writes train.py
    script = tmp_path / "train.py"
    make = "(stage.folder / 'part').touch(); " * made
    script.write_text(STAGE.format(body=make + "import time; print('ready', flush=True); time.sleep(60)"))
    line = [sys.executable, "train.py", option]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == f"ofa-train: stopped; start the same command {how} to continue\n"


def test_reader_that_stops_early_is_no_error() -> None:
    line = f"{sys.executable} -m scripts.train --help | head -n 1"
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, env=_environment())
    assert (answer.stdout, answer.stderr) == ("ofa-train [name=value ...]\n", "")


def test_command_called_with_a_configuration_is_a_plain_call() -> None:
    seen: list[DictConfig] = []
    main = stage_command()(seen.append)
    cfg = OmegaConf.create({"seed": 1})
    main(cfg)
    assert seen == [cfg]


def test_threads_limit_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        use_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root}

"""The run folder: nothing of one configuration is mixed with another, and two processes never write the same stage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ofa.data import Split, digits
from ofa.errors import UserError
from ofa.files import read_json
from scripts.parts import FIT, SEARCH, require_images
from scripts.stage import NOTHING, command_line, next_command, note, open_stage, run_id


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    values: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "name": "test",
        "restart": False,
        "seed": 0,
        "data": {"size": [8, 16], "path": None},
        "device": {"phone": {"macs": 5}, "server": {"macs": 9}},
        "mode": "predict",
        "agent": {"evolution": None, "random": None},
        "train": {"save_seconds": 60, "loggers": [], "average": None},
    }
    return OmegaConf.create(values)


def finish(cfg: DictConfig, name: str, *reads: str, needs: tuple[str, ...] = ()) -> bool:
    """Run a stage that does nothing; whether it was done before."""
    with open_stage(cfg, name, reads, needs=needs) as stage:
        return stage.done


def test_stage_is_done_once_its_block_ends(cfg: DictConfig) -> None:
    assert not finish(cfg, "train", "data", "seed")
    assert finish(cfg, "train", "data", "seed")
    assert set(read_json(Path(cfg.run, "timings.json"))) == {"train"}
    made = read_json(Path(cfg.run, "command.json"))
    assert (made["experiment"], made["run"]) == ("test", str(cfg.run))


def test_what_stands_beside_the_stages_leaves_their_command(cfg: DictConfig) -> None:
    finish(cfg, "train", "seed")
    before = read_json(Path(cfg.run, "command.json"))["command"]
    finish(cfg, "compress/float/int8", "seed")
    assert before.startswith("ofa-train") and read_json(Path(cfg.run, "command.json"))["command"] == before


def test_failed_stage_is_continued(cfg: DictConfig) -> None:
    with pytest.raises(RuntimeError), open_stage(cfg, "train", ("seed",)) as stage:
        (stage.folder / "kept").touch()
        raise RuntimeError
    with open_stage(cfg, "train", ("seed",)) as stage:
        assert not stage.done and (stage.folder / "kept").exists()


def test_other_options_are_refused_by_name(cfg: DictConfig) -> None:
    finish(cfg, "train", "data", "seed")
    cfg.data.size = [8, 20]
    with pytest.raises(UserError, match=r"data.size=\[8, 16\], this command has data.size=\[8, 20\].*restart=true"):
        finish(cfg, "train", "data", "seed")


def test_a_stage_that_failed_before_it_made_anything_takes_other_options(cfg: DictConfig) -> None:
    for made in (False, True):
        with pytest.raises(UserError, match="wrong"), open_stage(cfg, "train", ("seed",)) as stage:
            if made:
                (stage.folder / "checkpoint").touch()
            raise UserError("wrong")
        cfg.seed += 1
    with pytest.raises(UserError, match="was made with seed=1, this command has seed=2"):
        finish(cfg, "train", "seed")


def test_a_stage_that_fails_before_it_makes_anything_leaves_the_run_as_it_was(cfg: DictConfig) -> None:
    run = Path(cfg.run)
    with pytest.raises(UserError, match="needs the stage train"):
        finish(cfg, "measure", "seed", needs=("train",))
    assert not run.exists()
    finish(cfg, "train", "seed")
    before = {path: path.read_text() for path in run.rglob("*") if path.is_file()}
    for name in ("search/phone/random", "compress/net/int8"):
        with pytest.raises(UserError, match="wrong"), open_stage(cfg, name, ("data",)):
            raise UserError("wrong")
    assert {path: path.read_text() for path in run.rglob("*") if path.is_file()} == before
    assert {path.name for path in run.iterdir()} == {"command.json", "timings.json", "train"}


def test_a_stage_that_was_interrupted_or_made_something_is_the_latest(cfg: DictConfig) -> None:
    finish(cfg, "train", "seed")
    for error, made in ((KeyboardInterrupt, False), (UserError, True)):
        with pytest.raises(error), open_stage(cfg, "search/phone/random", ("seed",)) as stage:
            if made:
                (stage.folder / "log").touch()
            raise error
        command = read_json(Path(cfg.run, "command.json"))
        assert command["command"].startswith("ofa-search") and command["devices"] == ["phone", "server"]


def test_options_that_a_stage_does_not_read_may_change(cfg: DictConfig) -> None:
    finish(cfg, "train", "data")
    cfg.seed = 1
    assert finish(cfg, "train", "data")


def test_later_stage_refuses_options_that_an_earlier_one_was_not_made_with(cfg: DictConfig) -> None:
    finish(cfg, "train", "data", "seed")
    cfg.seed = 1
    with pytest.raises(UserError, match=r"train was made with seed=0, this command has seed=1"):
        finish(cfg, "measure", "data")


def test_restart_discards_the_stage_alone(cfg: DictConfig) -> None:
    finish(cfg, "train", "seed")
    with open_stage(cfg, "measure", ("seed",)) as stage:
        (stage.folder / "part").mkdir()
    cfg.restart = True
    with open_stage(cfg, "measure", ("seed",)) as stage:
        assert not stage.done and not (stage.folder / "part").exists()
    cfg.restart = False
    assert finish(cfg, "train", "seed")


def test_a_restart_that_fails_before_it_makes_anything_discards_nothing(cfg: DictConfig) -> None:
    with open_stage(cfg, "search/phone/random", ("seed",)) as stage:
        (stage.folder / "part").mkdir()
        (stage.folder / "part" / "weights").write_text("old")
    for made in (False, True):
        cfg.restart, cfg.seed = True, 1
        with pytest.raises(UserError, match="wrong"), open_stage(cfg, "search/phone/random", ("seed",)) as stage:
            assert not stage.done and not (stage.folder / "part").exists()
            if made:
                (stage.folder / "new").touch()
            raise UserError("wrong")
        cfg.restart, cfg.seed = False, int(made)
        assert finish(cfg, "search/phone/random", "seed") is not made
        assert (stage.folder / "part" / "weights").exists() is not made
        assert {path.name for path in Path(cfg.run).iterdir()} == {"command.json", "search", "timings.json"}


def test_what_is_started_again_after_a_kill_does_not_discard_its_own(cfg: DictConfig) -> None:
    """As workers of torchrun are, with restart=true."""
    for name in ("specialize/phone", "specialize/server"):
        with open_stage(cfg, name, ("seed",)) as stage:
            (stage.folder / "old").touch()
    cfg.restart = True
    for start in range(3):
        with pytest.raises(RuntimeError), open_stage(cfg, "specialize/phone", ("seed",), launch="a") as stage:
            assert not (stage.folder / "old").exists() and (stage.folder / "new").exists() is (start == 2)
            if start:
                (stage.folder / "new").touch()
            raise RuntimeError("killed")
    for name in ("specialize/phone", "specialize/server"):
        with open_stage(cfg, name, ("seed",), launch="a") as stage:
            assert not stage.done and not (stage.folder / "old").exists()
            (stage.folder / "new").touch()
        with open_stage(cfg, name, ("seed",), launch="a") as stage:
            assert stage.done and (stage.folder / "new").exists()
    with open_stage(cfg, "specialize/phone", ("seed",), launch="b") as stage:
        assert not (stage.folder / "new").exists()


def test_an_interrupted_restart_tells_whether_it_made_anything(cfg: DictConfig) -> None:
    finish(cfg, "train", "seed")
    cfg.restart = True
    for made, said in ((False, [NOTHING]), (True, [])):
        with pytest.raises(KeyboardInterrupt) as caught, open_stage(cfg, "train", ("seed",)) as stage:
            if made:
                (stage.folder / "new").touch()
            raise KeyboardInterrupt
        assert list(caught.value.args) == said


def test_a_restart_killed_before_it_made_anything_discards_nothing(cfg: DictConfig) -> None:
    with open_stage(cfg, "train", ("seed",)) as stage:
        (stage.folder / "weights").touch()
    cfg.restart = True
    elsewhere(cfg, "os._exit(0)")  # as a kill, nothing else of it runs
    cfg.restart = False
    assert finish(cfg, "train", "seed") and (stage.folder / "weights").exists()


@pytest.mark.parametrize("renames", [1, 3, 4, 5, 6, 8])
def test_a_restart_killed_while_it_moves_files_discards_nothing(cfg: DictConfig, renames: int) -> None:
    """Four files and their folder are moved aside, and back when the restart fails."""
    names = {"a", "b", "c"}
    with open_stage(cfg, "train", ("seed",)) as stage:
        for name in names:
            (stage.folder / name).write_text(name)
    cfg.restart = True
    elsewhere(cfg, "raise ValueError('wrong')", before=f"die_after({renames})")
    cfg.restart = False
    assert finish(cfg, "train", "seed")
    kept = {path.name: path.read_text() for path in stage.folder.iterdir() if path.name in names}
    assert kept == {name: name for name in names}
    assert {path.name for path in Path(cfg.run).iterdir()} == {"command.json", "timings.json", "train"}


def test_stage_made_from_an_earlier_result_is_not_taken_for_done(cfg: DictConfig) -> None:
    finish(cfg, "train", "seed")
    finish(cfg, "measure", "seed")
    cfg.restart = True
    finish(cfg, "train", "seed")
    cfg.restart = False
    with pytest.raises(UserError, match="train was run again"):
        finish(cfg, "measure", "seed")


def test_needed_stage_is_named_with_its_command(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match=r"measure needs the stage train.*run: ofa-train"):
        finish(cfg, "measure", "seed", needs=("train",))
    finish(cfg, "train", "seed")
    finish(cfg, "measure", "seed", needs=("train",))


def test_parts_of_one_device_do_not_mind_another(cfg: DictConfig) -> None:
    finish(cfg, "search/phone/random", "device.phone")
    finish(cfg, "search/server/random", "device.server")
    cfg.device.server.macs = 10
    finish(cfg, "specialize/phone", "device.phone")
    with pytest.raises(UserError, match=r"device.server.macs=9, this command has device.server.macs=10"):
        finish(cfg, "specialize/server", "device.server")


def test_an_agent_that_the_command_leaves_out_is_no_disagreement(cfg: DictConfig) -> None:
    for agent in ("evolution", "random"):
        finish(cfg, f"search/phone/{agent}", "seed")
    cfg.seed, cfg.agent, cfg.restart = 1, {"evolution": None}, True
    finish(cfg, "search/phone/evolution", "seed")
    cfg.restart = False
    assert not finish(cfg, "specialize/phone", "seed", needs=("search",))
    cfg.agent = {"random": None}
    with pytest.raises(UserError, match="search/phone/random was made with seed=0"):
        finish(cfg, "specialize/server", "seed") or finish(cfg, "export/phone", "seed")
    cfg.mode = "iterate"
    with pytest.raises(UserError, match="needs the stage search"):
        finish(cfg, "export/phone", "seed", needs=("search",))


def test_options_that_change_nothing_that_is_made_may_change(cfg: DictConfig) -> None:
    cfg.data = {"size": 8, "workers": 2}
    finish(cfg, "train", "train", "data")
    cfg.train.save_seconds, cfg.train.loggers, cfg.data.workers = 5, ["tensorboard"], 0
    assert finish(cfg, "train", "train", "data")
    assert not finish(cfg, "measure", "train", "data", needs=("train",))
    cfg.train.average = 0.9
    with pytest.raises(UserError, match=r"was made with train.average=null, this command has train.average=0.9"):
        finish(cfg, "train", "train", "data")


def test_a_run_keeps_to_the_images_that_it_began_with(cfg: DictConfig) -> None:
    data = digits()
    finish(cfg, "train", "seed")
    require_images(cfg, data)
    require_images(cfg, digits())
    turned = Split(data.train.images.flip(0), data.train.labels)
    others = (
        digits(seed=1),
        digits(val_size=301),
        replace(data, classes=data.classes[::-1]),
        replace(data, train=turned),
    )
    for other in others:
        with pytest.raises(
            UserError, match=r"images of digits are not those that .* was trained on.*another run=<folder>"
        ):
            require_images(cfg, other)
    require_images(cfg, others[0], fresh=True)
    require_images(cfg, others[0])


def test_deselected_device_is_no_disagreement(cfg: DictConfig) -> None:
    finish(cfg, "search/phone/random", "device.phone")
    del cfg.device["phone"]
    assert not finish(cfg, "specialize/server", "device.server")


def elsewhere(cfg: DictConfig, body: str, before: str = "") -> str:
    """What another process prints that opens the stage train."""
    code = f"""
import os, time
from pathlib import Path
rename, moved = Path.rename, []
def die_after(n):
    def move(path, target):
        if len(moved) == n:
            os._exit(0)  # as a kill
        moved.append(path)
        return rename(path, target)
    Path.rename = move
{before}
from omegaconf import OmegaConf
from scripts.stage import open_stage
cfg = OmegaConf.create({OmegaConf.to_container(cfg)!r})
try:
    with open_stage(cfg, "train", ("seed",)):
        {body}
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def test_two_processes_do_not_write_one_stage(cfg: DictConfig) -> None:
    with open_stage(cfg, "train", ("seed",)) as stage:
        assert elsewhere(cfg, "pass").startswith(f"process {os.getpid()} is writing {stage.folder}; ")


def test_child_of_a_dead_process_does_not_keep_its_stage(cfg: DictConfig) -> None:
    orphan = "(os.close(1), time.sleep(60)) if pid == 0 else (print(pid, flush=True), os._exit(0))"
    child = int(elsewhere(cfg, f"pid = os.fork(); {orphan}"))
    try:
        assert not finish(cfg, "train", "seed")
    finally:
        os.kill(child, signal.SIGKILL)


def test_notes_are_kept_together(cfg: DictConfig) -> None:
    note(cfg.run, data={"classes": 10})
    note(cfg.run, machine={"cpu": "x"})
    noted = read_json(Path(cfg.run, "command.json"))
    assert noted == {"id": noted["id"], "data": {"classes": 10}, "machine": {"cpu": "x"}}


def test_a_run_keeps_its_id_when_it_is_renamed_and_a_copy_has_another(tmp_path: Path) -> None:
    run, copy, other = (tmp_path / name for name in ("run", "copy", "other"))
    for folder in (run, other):
        note(folder)
    shutil.copytree(run, copy)
    own = run_id(run)
    assert len({own, run_id(copy), run_id(other)}) == 3
    assert run_id(run.rename(tmp_path / "moved")) == own


def test_next_command_repeats_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/nowhere/ofa-train", "data=folder", "data.path=my pictures", "restart=true"])
    assert next_command("train") == "ofa-measure data=folder 'data.path=my pictures'"
    assert next_command("report") is None
    assert next_command("run") is None


def test_a_search_by_another_device_s_table_follows_ofa_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ofa-latency", "remote=ssh:pi", "run=runs/x"])
    assert command_line("search", "seed=1") == "ofa-search run=runs/x seed=1"


def test_what_ofa_fit_does_not_fit_may_change_before_the_search(cfg: DictConfig) -> None:
    cfg.predictor = {"accuracy": {"model": "gp"}, "latency_ms": {"table": "here"}}
    finish(cfg, "fit", *FIT)
    cfg.predictor.latency_ms.table = "another device"
    finish(cfg, "search", *SEARCH)
    cfg.predictor.latency_ms.table = "a third"
    with pytest.raises(UserError, match=r"search was made with predictor\.latency_ms\.table"):
        finish(cfg, "search", *SEARCH)
    cfg.predictor.accuracy.model = "svr"
    with pytest.raises(UserError, match=r"fit was made with predictor\.accuracy\.model"):
        finish(cfg, "search", *SEARCH)


def test_next_command_starts_a_script_as_this_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "seed=1"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "scripts/train.py", "seed=1"])
    assert next_command("train") == ".venv/bin/python scripts/measure.py seed=1"

"""The run folder: a stage's folder remembers its options, is written by one process, and knows whether it is done.

<run>/command.json         the command, its run folder and versions of the latest stage that made anything; the run's id
<run>/timings.json         seconds of every finished stage, all its sessions together
<run>/<stage>/config.json  options it was made with ("reads"), stages it was made from ("after"), "done", "seconds"
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.files import atomic_write, read_json, versions, write_json
from ofa.names import parse

STAGES = ("train", "measure", "fit", "search", "specialize", "export", "report")
CONFIG, LOCK, COMMAND = "config.json", ".lock", "command.json"
IDLE = ("data.workers", "train.device", "train.save_seconds", "train.loggers", "train.profile", "train.rollback")
NETWORKS = ("network", "student", "teacher")  # options that name files
NOTHING = "nothing was made"  # in a KeyboardInterrupt
INFEASIBLE = "infeasible.json"  # in search/<device>: why no network fits that device


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's folder, and whether an earlier command finished it."""

    folder: Path
    done: bool


@contextmanager
def open_stage(
    cfg: DictConfig, name: str, reads: Sequence[str], *, needs: Sequence[str] = (), launch: str | None = None
) -> Iterator[Stage]:
    """Lock, check and time a stage's folder <run>/<name>; leaving the block without an error marks it done.

    name: "train", or "search/phone/evolution" for one part of a stage.  reads: the options it depends on, dotted
    ("data", "device.phone").  needs: stages that must be finished.  Raises UserError where the folder, or a stage
    before it, was made with other options, and where another process is writing it.  A block that fails before it makes
    anything leaves the run as it was: what `restart` discards comes back, and no folder stays.  launch: what started
    this process, and starts it again after a kill, with the same options; what it has made is not discarded again.
    """
    folder = Path(cfg.run, name)
    aside = Path(cfg.run, f".{name.replace('/', '+')}")
    new = not Path(cfg.run).exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), _undone(folder, Path(cfg.run), new=new):
        _bring_back(folder, aside)
        config: dict[str, Any] = {
            "reads": _reads(cfg, reads),
            "files": _files(cfg, reads),
            "after": _before(cfg, name, needs),
            "done": None,
            "seconds": 0.0,
            "launch": launch,
        }
        if cfg.restart and not _made_by(folder, launch):
            _set_aside(folder, aside)
        config = _settle(folder, config)
        if config["done"]:
            print(f"{name}: already done in {folder}")
            yield Stage(folder, done=True)
            return
        ours = name.partition("/")[0] in STAGES  # not ofa-compress
        command = {"command": _own_command(name), "run": str(cfg.run)} if ours else {}
        devices = {"devices": list(cfg.device)} if name.startswith("search/") else {}
        note(cfg.run, **command, **devices, experiment=cfg.name, versions=versions())
        started = time.monotonic()
        try:
            yield Stage(folder, done=False)
            config["done"] = datetime.now(UTC).isoformat()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*[] if holds(folder) else [NOTHING]) from None
        finally:
            config["seconds"] += time.monotonic() - started
            write_json(folder / CONFIG, config)
            if config["done"]:
                shutil.rmtree(aside, ignore_errors=True)
            _bring_back(folder, aside)
        write_json(Path(cfg.run, "timings.json"), _timings(Path(cfg.run)))


def note(run: str | Path, /, **values: Any) -> None:
    """Add values to <run>/command.json, which the report reads; of several processes the first one alone does.

    It also holds the `id` that `run_id` tells runs apart by.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    path = Path(run, COMMAND)
    write_json(path, {"id": uuid4().hex} | (read_json(path) if path.exists() else {}) | values)


def run_id(run: str | Path) -> str:
    """The id of a run folder in which a stage has begun: the same when it is renamed, another for a copy of it."""
    return f"{read_json(Path(run, COMMAND))['id']}-{Path(run).stat().st_ino}"


def next_command(stage: str, *more: str) -> str | None:
    """The shell line that runs the stage after `stage` with the same options and more.

    None after the last stage and for network=; after ofa-compress, ofa-export where it has made a card (in `more`).
    """
    if stage == "export" and any(argument.startswith("network=") for argument in sys.argv[1:]):
        return None
    if stage == "compress":
        return command_line("export", *more) if more else None
    stage = "train" if stage == "import" else stage  # which it takes the place of
    if stage not in STAGES[:-1]:
        return None
    following = STAGES[STAGES.index(stage) + 1]
    return command_line(following, *more)


def command_line(stage: str, *more: str) -> str:
    """The shell line that runs a stage with the options of this command and more."""
    return shlex.join([*_program(stage), *_options(), *more])


def _own_command(name: str) -> str:
    return shlex.join([f"ofa-{name.partition('/')[0]}", *_options()])


def _options() -> list[str]:
    """The arguments of this command that other stages share; none where it is not one of ours, as in a test."""
    own = ("restart=", "checkpoint=", "sha256=", "remote=", "network=", "step", "+step", "sensitivity.")
    return [argument for argument in sys.argv[1:] if _ours() and not argument.startswith(own)]


def _ours() -> bool:
    return Path(sys.argv[0]).stem.removeprefix("ofa-").rstrip("_") in (*STAGES, "run", "import", "latency", "compress")


def _program(stage: str) -> list[str]:
    """How to start another stage the way this one was started."""
    here, name = Path(sys.argv[0]), f"ofa-{stage}"
    if here.suffix == ".py" and _ours():
        return [sys.orig_argv[0], str(here.with_name(f"{stage}.py"))]
    beside, found = here.with_name(name), shutil.which(name)
    return [str(beside)] if beside.exists() and not (found and beside.samefile(found)) else [name]


def _settle(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder's config.json, written now if nothing was made there; raises where it disagrees with this command."""
    path = folder / CONFIG
    made = read_json(path) if path.exists() else config
    if not made["done"] and not holds(folder):
        write_json(path, config)
        return config
    _agree(folder, made, config["reads"], "restart=true to discard what is there")
    for file, digest in made.get("files", {}).items():
        if config["files"].get(file, digest) != digest:
            raise UserError(f"{file} was changed after {folder} was made; give restart=true to make it again too")
    for stage, done in made["after"].items():
        if config["after"].get(stage, done) != done:
            raise UserError(f"{stage} was run again after {folder} was made; give restart=true to make it again too")
    return made | {"after": config["after"]}


def _before(cfg: DictConfig, name: str, needs: Sequence[str]) -> dict[str, str]:
    """When the stages that this one builds on were done; raises where one is missing or was made with other options."""
    run, (stage, *part) = Path(cfg.run), name.split("/")
    after: dict[str, str] = {}
    for earlier in STAGES[: STAGES.index(stage)] if stage in STAGES else ():  # others stand by themselves
        for path in sorted((run / earlier).rglob(CONFIG)):
            place = path.parent.relative_to(run)
            if part[:1] and place.parts[1:2] not in ((), tuple(part[:1])):
                continue
            by = place.parts[2:3] if earlier == "search" else ()
            if by and by[0] not in (cfg.agent if cfg.mode == "predict" else (cfg.mode,)):
                continue  # another command's agent
            made = read_json(path)
            shared = [key for key in made["reads"] if OmegaConf.select(cfg, key) is not None]
            _agree(path.parent, made, _reads(cfg, shared), f"{command_line(earlier, 'restart=true')} to make it again")
            if made["done"]:
                after[str(place)] = made["done"]
        if earlier in needs and not any(Path(place).parts[0] == earlier for place in after):
            line = command_line(earlier)
            raise UserError(f"{stage} needs the stage {earlier}, which has not finished in {run}; run: {line}")
    return after


def _agree(folder: Path, made: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    """Raise UserError where a stage was made with other values of the options in `now`."""
    difference = _difference(_weighty({key: made["reads"].get(key) for key in now}), _weighty(now))
    if difference:
        key, was, given = difference
        raise UserError(
            f"{folder} was made with {key}={was}, this command has {key}={given}; "
            f"give the same options, another run=<folder>, or {remedy}"
        )


def _weighty(reads: dict[str, Any]) -> dict[str, Any]:
    """The options without those that change how long a stage takes and what it logs, but nothing that it makes."""
    return {
        key: {name: value for name, value in values.items() if f"{key}.{name}" not in IDLE}
        if isinstance(values, dict)
        else values
        for key, values in reads.items()
    }


def _difference(was: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first option in which two configurations differ: its dotted name and both values."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = dict.fromkeys([*was, *now])
        parts = (_difference(was.get(name), now.get(name), f"{key}.{name}".lstrip(".")) for name in names)
        return next(filter(None, parts), None)
    return None if was == now else (key, json.dumps(was), json.dumps(now))


def _reads(cfg: DictConfig, names: Sequence[str]) -> dict[str, Any]:
    """The named parts of the configuration as JSON values."""
    return json.loads(json.dumps({name: plain(OmegaConf.select(cfg, name)) for name in names}))


def _files(cfg: DictConfig, reads: Sequence[str]) -> dict[str, str]:
    """Digests of the files in the names of networks that options give."""
    given = [plain(OmegaConf.select(cfg, name)) for name in NETWORKS if name in reads]
    names = [str(text) for value in given for text in (value if isinstance(value, list) else [value])]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for name in names for p in parse(name).files}


def plain(value: Any) -> Any:
    """A part of the configuration as dicts, lists and values, interpolations resolved."""
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


def holds(folder: Path) -> bool:
    """Whether a stage has made anything in its folder."""
    return any(entry.name not in (CONFIG, LOCK) for entry in folder.iterdir())


def _made_by(folder: Path, launch: str | None) -> bool:
    """Whether this launch has made something in the folder."""
    made = launch is not None and holds(folder) and (folder / CONFIG).exists()
    return made and read_json(folder / CONFIG).get("launch") == launch


def _set_aside(folder: Path, aside: Path) -> None:
    """Empty a stage's folder for a restart; what was made there is kept until the restart has made something."""
    if holds(folder):
        part = _part(aside)
        part.mkdir()
        for path in folder.iterdir():
            if path.name != LOCK:
                path.rename(part / path.name)
        part.rename(aside)
    else:
        (folder / CONFIG).unlink(missing_ok=True)


def _bring_back(folder: Path, aside: Path) -> None:
    """End a restart: what it set aside comes back where nothing was made in its place, and is deleted elsewhere."""
    part = _part(aside)
    if aside.exists():
        if holds(folder):
            shutil.rmtree(aside)
        else:
            aside.rename(part)
    if part.exists():  # a kill while files were on their way there or back
        for path in part.iterdir():
            path.rename(folder / path.name)
        part.rmdir()


def _part(aside: Path) -> Path:
    """Where files are while they are set aside or come back; what is there belongs into the stage's folder."""
    return aside.with_name(f"{aside.name}.part")


def _timings(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in STAGES:
        paths = [path for path in (run / stage).rglob(CONFIG) if not (path.parents[1] / INFEASIBLE).exists()]
        made = [read_json(path) for path in paths]
        if made and all(config["done"] for config in made):
            found[stage] = round(sum(config["seconds"] for config in made), 3)
    return found


@contextmanager
def _undone(folder: Path, run: Path, *, new: bool) -> Iterator[None]:
    """Where the block fails before it makes anything: remove the stage's folder, and what was noted of its command.

    new: the run's folder was made for this stage.
    """
    command = run / COMMAND
    before = command.read_text() if command.exists() else None
    try:
        yield
    except Exception:
        config = folder / CONFIG
        if not holds(folder) and not (config.exists() and read_json(config)["done"]):
            if before is None:
                command.unlink(missing_ok=True)
            else:
                atomic_write(command, before)
            _remove(folder, run.parent if new else run)
        raise


def _remove(folder: Path, within: Path) -> None:
    """Remove a stage's folder in which nothing was made, and those above it inside of another that are empty then."""
    for name in (CONFIG, LOCK):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # one that is not empty
        for path in (folder, *folder.parents[: len(folder.relative_to(within).parts) - 1]):
            path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however the process ends, and which its children do not get."""
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read() or "unknown"
            raise UserError(
                f"process {owner} is writing {folder}; wait for it, stop it, or give another run=<folder>"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

"""Every option with its explanation, read from the YAML files under conf/, so that help and messages never go stale."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ofa.errors import UserError

FILES = ("run", "checkpoint", "model", "initial", "path", "folder", "table", "remote", "storage")
AMOUNTS = ("macs", "size")  # of steps: a share, or a number with its unit
FREE = ("search.objectives",)  # sections whose keys are the user's
WIDTH = 34  # characters of an option and its value, before its explanation
KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w.-]+):(?P<value>.*?)(?: # (?P<comment>.*))?$")


@dataclass(frozen=True, slots=True)
class Source:
    """One YAML file: its group ("" for the main file), name, first comment, and options as dotted names."""

    group: str
    name: str
    about: str
    values: Mapping[str, Any]
    comments: Mapping[str, str]


def sources(mentioning: str = "") -> list[Source]:
    """All YAML files of this project's configuration that have this text in them, the main file first."""
    return [_source(group, name) for (group, name), text in _texts().items() if mentioning in text]


@cache
def _texts() -> dict[tuple[str, str], str]:
    """The files' texts by group and name."""
    top = files("conf")
    found = {("", "config"): (top / "config.yaml").read_text()}
    folders = [entry for entry in top.iterdir() if entry.is_dir() and entry.name != "hydra"]
    for folder in sorted(folders, key=lambda entry: entry.name):
        entries = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
        for entry in sorted(entries, key=lambda entry: entry.name):
            found[folder.name, entry.name.removesuffix(".yaml")] = entry.read_text()
    return found


def check_hidden(folder: str) -> None:
    """Raise UserError for a file of a user's folder that would not be read, since this project has one of its name."""
    for (group, name), text in _texts().items():
        file = Path(folder, group, f"{name}.yaml")
        if group and file.is_file() and file.read_text() != text:
            raise UserError(f"{file} would not be read, since the project has a {group}={name}; give it another name")


def groups() -> dict[str, list[str]]:
    """The choices of each group."""
    found: dict[str, list[str]] = {}
    for source in sources()[1:]:
        found.setdefault(source.group, []).append(source.name)
    return found


def similar(name: str) -> list[str]:
    """Up to three options or groups whose names resemble `name`."""
    known = {key for source in sources() for key in source.values} | set(groups())
    known |= {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    last = {key.rpartition(".")[2]: key for key in sorted(known)}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    near += [last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], last, n=3, cutoff=0.75)]
    return list(dict.fromkeys(near))[:3]


def owners(name: str) -> list[str]:
    """The choices that have an option, such as "data=parquet", or a place for a group: distill@schedule.distill."""
    group, _, place = name.partition("@")
    if place:
        section, _, key = place.partition(".")
        return [f"{section}={s.name}" for s in sources(mentioning=f"- /{group}@{key}:") if s.group == section]
    return [f"{source.group}={source.name}" for source in sources() if source.group and name in source.values]


def explanation(name: str, chosen: Sequence[Any] = ()) -> str:
    """The comment beside an option, or beside the record it is in; in the files called `chosen` first."""
    found = sorted((source for source in sources() if name in source.comments), key=lambda s: s.name not in chosen)
    record, part = name.rpartition(".")[0], name.partition(".")[2]
    if not found and part.partition(".")[0] in groups():  # a choice in a place of another: schedule.distill
        return explanation(part, chosen)
    if not found and "." in record:
        return explanation(record, chosen)
    return found[0].comments[name] if found else ""


def sections() -> dict[str, str]:
    """The main file's sections as dotted names, each with its first option."""
    keys = reversed(list(_source("", "config").values))  # the first one stays
    return {key[:at]: key for key in keys for at, sign in enumerate(key) if sign == "."}


def check_known(name: str, *, added: bool = False) -> None:
    """Refuse an option in a section of the main file that it does not have, such as a misspelt one of an experiment.

    added: it comes from the command line, and nothing reads it; then one beside the sections is refused too.
    """
    main = _source("", "config").values
    section, _, key = name.partition(".")
    parts = {name[:at] for at, sign in enumerate(f"{name}.") if sign == "."}
    if parts & {*main, *FREE} or not (section in sections() if key else added):
        return
    near = " or ".join(f"{key}=" for key in similar(name))
    raise UserError(f"{name} is not an option; {f'did you mean {near}? ' if near else ''}--help lists all options")


def check_type(name: str, value: Any) -> None:
    """Refuse a value of another kind than every default of this option, for numbers and switches.

    Limits and amounts are left to those that take them, "250KB" too.
    """
    amount = name.startswith("step.") and name.rpartition(".")[2] in AMOUNTS and isinstance(value, str)
    if ".limits." in name or amount:
        return
    found = sources(mentioning=f"{name.rpartition('.')[2]}:")  # to parse them all takes most of a second
    defaults = [source.values[name] for source in found if source.values.get(name) not in (None, "???")]
    if not defaults or value is None or any(_fits(value, default) for default in defaults):
        return
    hint = f" ({explanation(name)})" if explanation(name) else ""
    raise UserError(f"{name}={value} is not {_kind(defaults[0])}, like {name}={_show(defaults[0])}{hint}")


def check_file(name: str, value: Any) -> None:
    """Refuse a number or a list where an option names a file, a folder or a place."""
    if name.rpartition(".")[2] in FILES and not isinstance(value, str | None):
        example = value[0] if isinstance(value, list) and value else value
        raise UserError(f"{name}={value} is no path; write {name}=./{example} for what is called {example}")


def help_text(
    command: str, about: str, sections: Sequence[str], config: Mapping[str, Any], flags: Mapping[str, str]
) -> str:
    """What --help prints: general options, then each section's choices and options with values and explanations."""
    parts = [f"{command} [name=value ...]\n\n{about}", "Options of every command\n" + "\n".join(_top(config))]
    chosen = config["hydra"]["runtime"]["choices"]
    parts += ["\n".join(_section(section, config, chosen)) for section in sections]
    return "\n\n".join([*parts, "Flags\n" + "\n".join(_line(f"  {name}", text) for name, text in flags.items())])


def _top(config: Mapping[str, Any]) -> list[str]:
    lines = [_option(key, config[key]) for key in sources()[0].values if "." not in key and key in config]
    return lines + _choices("experiment", [config["hydra"]["runtime"]["choices"].get("experiment")])


def _section(section: str, config: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[str]:
    options = config.get(section) or {}
    picked = (
        [chosen[section]] if section in chosen else list(options)
    )  # Hydra names no choices where a run takes several
    yield f"{section}: {explanation(section)}".removesuffix(": ")
    if section in groups():
        yield from _choices(section, picked)
    for name, value in flatten(options, section):
        yield _option(name, value, picked)


def _choices(group: str, picked: Sequence[Any]) -> list[str]:
    about = {source.name: source.about for source in sources() if source.group == group}
    names = [*about, *(name for name in picked if name and name not in about)]
    return [_line(f"{'*' if name in picked else ' '} {group}={name}", about.get(name, "")) for name in names]


def _option(name: str, value: Any, chosen: Sequence[Any] = ()) -> str:
    return _line(f"  {name}={_show(value)}", explanation(name, chosen))


def _line(left: str, right: str) -> str:
    """An entry and its explanation, wrapped to the terminal; a long entry has a line of its own."""
    room = max(40, shutil.get_terminal_size((120, 24)).columns - WIDTH - 4)
    indent = "\n" + " " * (WIDTH + 4)
    gap = indent if len(left) > WIDTH and right else "  "
    return f"  {left:{WIDTH}}{gap}{indent.join(textwrap.wrap(right, room))}".rstrip()


def _show(value: Any) -> str:
    if isinstance(value, list):
        records = any(isinstance(entry, Mapping) for entry in value)
        return f"[{len(value)} entries]" if records else f"[{','.join(map(_show, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value may stand where the default stands: a switch for a switch, a number for a number."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    return not isinstance(default, (int, float)) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _kind(default: Any) -> str:
    return "true or false" if isinstance(default, bool) else "a number"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; what starts with "_" is Hydra's own and left out."""
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, name)
        elif not str(key).startswith("_"):
            yield name, value


@cache
def _source(group: str, name: str) -> Source:
    text = _texts()[group, name]
    head = re.match(r"# @package (\S+)\n", text)
    package = (head[1] if head else group).replace("_global_", "")
    about = re.search(r"^# (?!@package)(.*)$", text.split("\n\n")[0], re.MULTILINE)
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    options = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    values, comments = dict(flatten(options, package)), dict(_comments(text, package))
    return Source(group, name, options.get("description") or (about[1] if about else ""), values, comments)


def _comments(text: str, package: str) -> Iterator[tuple[str, str]]:
    """(dotted name, comment) of each key of block style with a comment at the end of its line."""
    path: list[tuple[int, str]] = [(-1, package)] if package else []
    for match in filter(None, map(KEY.match, text.splitlines())):
        indent = len(match["indent"])
        path = [entry for entry in path if entry[0] < indent] + [(indent, match["key"])]
        if match["comment"]:
            yield ".".join(key for _, key in path), match["comment"]

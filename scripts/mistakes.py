"""Mistakes on the command line and in YAML files, said in one line: the rule, the value, the remedy."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import yaml
from hydra.errors import (
    CompactHydraException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ofa.errors import UserError
from scripts.options import explanation, groups, owners, similar

REFUSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
ALL = "--help lists all options"


class UsageError(Exception):
    """A mistake in the flags of a command."""


def explain(error: BaseException) -> str | None:
    """The line that answers a user's mistake; None where the error is a bug, which needs its traceback."""
    causes = list(chain(error))
    for cause in causes:
        if isinstance(cause, (UserError, UsageError)):
            return str(cause)
        if isinstance(cause, yaml.MarkedYAMLError):
            return _broken_yaml(cause)
        if isinstance(cause, MissingMandatoryValue):
            return _missing_value(cause)
    if isinstance(error, InstantiationException):
        return _instantiation(error, causes)
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write name=value, quoting signs as in name=\"'a (1), b'\"; {ALL}"
    if isinstance(error, HydraException):
        return _composition(error, causes)
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"a group takes the name of one of its choices, or a list of them; {ALL}"
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run, --multirun"):
        return f"give one of --multirun, --cfg, --info and --help at a time; {ALL}"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; make room or choose another run=<folder>"
    if isinstance(error, OSError) and error.errno in REFUSED:
        place = error.filename or "a file"
        return f"cannot read or write {place}: {error.strerror}; mend its permissions or name another file or folder"
    if isinstance(error, BrokenProcessPool):
        return "a worker was ended, as the system does where memory is short; give this again with fewer workers="
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _broken_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark else "a YAML file"
    return f"{place}: {error.problem or error.context}; mend the YAML there"


def _missing_value(error: MissingMandatoryValue) -> str:
    name = error.full_key or _first_line(error).rpartition(" ")[2]
    about = explanation(name)
    return f"{name} has no value; give {name}=<value>" + (f" ({about})" if about else "")


def _instantiation(error: InstantiationException, causes: list[BaseException]) -> str | None:
    """A target that is not there or does not take an option is a mistake in a YAML file; what it raises is not."""
    fault = next((faulty_argument(cause) for cause in causes[1:]), None)
    key = re.search(r"full_key: (\S+)", str(error))
    place = key[1] if key else "the configuration"
    if fault:
        return f"{place} {fault}; {ALL}"
    if str(error).startswith(("Error locating target", "Expected a callable target")):
        remedy = "name an importable class or function as its _target_ (PYTHONPATH=. for one of this folder)"
        return f"{place}: {_first_line(error)}; {remedy}"
    return None


def faulty_argument(error: BaseException) -> str | None:
    """What is wrong where something was called with an option that it does not take, or without one that it needs."""
    if unknown := re.search(r"unexpected keyword argument '(.+?)'", str(error)):
        return f"has no option {unknown[1]!r}; remove it from the YAML file or the command line"
    if lacking := re.search(r"missing \d+ required \S+ arguments?: (.+)", str(error)):
        return f"lacks {lacking[1]}; give it in the YAML file or on the command line"
    return None


def _missing_config(error: MissingConfigException) -> str:
    wanted = re.search(r"Could not (?:find|load) '(.+)/(.+?)'", str(error))
    if not wanted:
        return f"{_first_line(error)}; {ALL}"
    options = error.options or groups().get(wanted[1], [])
    return f"{wanted[1]}={wanted[2]} is not known; choose from {', '.join(sorted(options))}"


def _composition(error: HydraException, causes: list[BaseException]) -> str:
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if not unknown:
        return "; ".join(dict.fromkeys(_first_line(cause) for cause in causes if isinstance(cause, _SAYING)))
    place = unknown[1].removeprefix("/")
    if "@" in place and owners(place):
        return f"{place} is not an option here, it belongs to {', '.join(owners(place))}; {ALL}"
    name = place.partition("@")[0]
    inner = next(
        (found[1] for cause in causes if (found := re.match(r"Key '(.+?)' is not in struct", str(cause)))), None
    )
    if inner and inner not in name.split("."):  # a dict is merged into the one that is there
        return f"{name} has no {inner} to change; write '+{name}={{{inner}: <value>}}' to add it; {ALL}"
    if owners(name) and name.startswith("schedule."):  # all make the same thing, with all options
        return f"{name} is not among the options of this schedule; write +{name}=<value> to add it; {ALL}"
    if owners(name):
        return f"{name} is not an option here, it belongs to {' and '.join(owners(name))}; {ALL}"
    if re.fullmatch(r"device\.[^.]+\.limits\.[^.]+", name):
        return f"{name} is no limit of this device so far; write +{name}=<value> to add it; {ALL}"
    near = [f"{key}=" for key in similar(name) if key != name]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    kind = "is a section, name one of its options" if name in groups() else "is not an option"
    return f"{name} {kind}; {hint}{ALL}"


_SAYING = (CompactHydraException, OmegaConfBaseException)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

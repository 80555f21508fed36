"""What every command shares: Hydra's configuration, help, and mistakes answered in one line.

    @stage_command("data", "space", "schedule")
    def main(cfg: DictConfig) -> None:
        \"""Train the supernet.\"""

makes `main()` the command and leaves `main(cfg)` a plain call.  Exit status: 0 done, 1 the run cannot go on, 2 the
command line or a YAML file is wrong, 130 interrupted.  OFA_DEBUG=1 shows the traceback of a mistake too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `python scripts/search.py` puts this folder first on the path, where search.py would hide the package `search`.  Here
# and not in __init__.py, which never runs where another package has left a folder `scripts` in site-packages.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]

# OpenMP's threads spin while they wait for one another, which takes several times as long where another process wants
# one of their cores.  It is read once, when PyTorch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ruff: noqa: E402
import argparse
import functools
import importlib.metadata
import inspect
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ofa.errors import UserError
from ofa.kinds import check_kinds
from scripts.mistakes import UsageError, chain, explain, faulty_argument
from scripts.options import check_file, check_hidden, check_known, check_type, flatten, groups, help_text, sections
from scripts.stage import NOTHING, next_command, plain

Function = Callable[[DictConfig], Any]
MANY = ("agent", "device", "predictor", "runtime", "step")  # sections of parts, each under a name of its own
OURS = ("ofa.", "predictors.", "search.", "scripts.")  # packages whose classes are called as they are made
FLAGS = {
    "--help,-h": "print this text for the options given beside it",
    "--cfg,-c job": "print the whole configuration and stop",
    "--resolve": "with --cfg: print values in place of ${...}",
    "--package,-p": "with --cfg: print one section alone",
    "--multirun,-m": "one run per value, each in a folder of its own, as in -m seed=0,1,2",
    "--config-dir,-cd FOLDER": "more YAML files, such as FOLDER/device/mine.yaml for device=mine",
    "--shell-completion,-sc": 'the Tab key completes options after eval "$(ofa-run -sc install=bash)"',
    "--info,-i": "print where the configuration comes from",
    "--hydra-help": "print Hydra's own options",
    "--version": "print the version and stop",
}


def stage_command(*sections: str) -> Callable[[Function], Callable[..., Any]]:
    """Turn a function of the configuration into a command; `sections` are the parts of it that --help explains.

    A function may return options that the next command needs besides this one's.
    """

    def decorate(function: Function) -> Callable[..., None]:
        @functools.wraps(function)
        def main(cfg: DictConfig | None = None) -> Any:
            return _command(function, sections) if cfg is None else function(cfg)

        return main

    return decorate


def _command(function: Function, sections: tuple[str, ...]) -> None:
    stage = Path(inspect.getfile(function)).stem.rstrip("_")  # import_.py, since import is a keyword
    command, ran = f"ofa-{stage}", False
    more: list[str] = []

    @functools.wraps(function)
    def job(cfg: DictConfig) -> None:
        nonlocal ran, more
        with one_line_errors(command):
            prepare(cfg)
            more = function(cfg) or []
        ran = True

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is open is closed
    with one_line_errors(command):
        _register_help(command, inspect.getdoc(function) or "", sections)
        _run(job, _parser(command))
        if ran and os.environ.get("RANK", "0") == "0" and (line := next_command(stage, *more)):
            print(f"next: {line}")
        sys.stdout.flush()


def _run(job: Function, parser: argparse.ArgumentParser) -> None:
    """Hydra's entry point with a parser that Python 3.14 accepts; errors reach the caller instead of the screen."""
    version.setbase("1.3")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        given = parser.parse_intermixed_args()
        if given.config_dir:
            check_hidden(given.config_dir)
        _run_hydra(given, parser, job, "pkg://conf", "config")
    except SystemExit as end:
        if end.code:
            raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def _parser(command: str) -> argparse.ArgumentParser:
    """Hydra's flags, those that make sense here."""
    parser = _Parser(command, add_help=False, allow_abbrev=False)
    installed = importlib.metadata.version("ofa-nas")
    kinds: dict[str, dict[str, Any]] = {
        "--version": {"action": "version", "version": f"ofa-nas {installed}"},
        "--cfg": {"choices": ["job", "hydra", "all"]},
        "--config-dir": {},
        "--package": {},
        "--info": {"nargs": "?", "const": "all"},
    }
    parser.add_argument("overrides", nargs="*", help="name=value")
    for names, text in FLAGS.items():
        flag, *short = names.split(" ")[0].split(",")
        parser.add_argument(flag, *short, help=text, **kinds.get(flag, {"action": "store_true"}))
    parser.set_defaults(run=False, config_path=None, config_name=None)
    return parser


def _register_help(command: str, about: str, sections: tuple[str, ...]) -> None:
    asked = {"-h", "--help"}.intersection(sys.argv)

    def text(*, _root_: DictConfig) -> str:
        if not asked:  # Hydra resolves the text of every command, and reading all comments takes most of a second
            return ""
        config: Any = OmegaConf.to_container(_root_, resolve=False)
        return help_text(command, about, sections, config, FLAGS).replace("$", "$$")

    OmegaConf.register_new_resolver("ofa_help", text, replace=True)


def prepare(cfg: DictConfig) -> None:
    """Check the values given on the command line, give each job of a sweep its own run folder, set the threads."""
    hydra = HydraConfig.get()
    given = [override for override in hydra.overrides.task if not override.startswith(("+", "~"))]
    added = [o.lstrip("+").partition("=")[0] for o in hydra.overrides.task if o.startswith("+")]
    for name in (override.partition("=")[0] for override in given):
        if OmegaConf.select(cfg, name) is not None:
            check_type(name, OmegaConf.select(cfg, name))
    _check_sections(cfg)
    _check_parts(cfg)
    options: Any = OmegaConf.to_container(cfg, resolve=False)
    for name, value in flatten(options):
        if not _made(options, name):  # which answers for its options itself
            check_known(name, added=name in added and f"${{{name}}}" not in str(options))
        check_file(name, value)
    if cfg.step:
        _check_steps([*hydra.overrides.hydra, *hydra.overrides.task])
    _check_place(cfg)
    swept = [override.replace("/", "_") for override in given if override not in sys.argv]
    own = any(o.startswith("run=") and (o not in sys.argv or "$" in o) for o in given)  # a folder for each job
    if hydra.mode == RunMode.MULTIRUN and swept and not own:
        cfg.run = str(Path(cfg.run, ",".join(swept)))
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed} must be a whole number, 0 or more")
    use_threads(cfg.threads)


def _check_place(cfg: DictConfig) -> None:
    """Raise UserError where a run has no name or no folder."""
    for name, example in (("name", "mine"), ("run", "runs/mine")):
        if cfg[name] in (None, ""):
            raise UserError(
                f"{name}={'null' if cfg[name] is None else ''} is empty; give one, such as {name}={example}"
            )


def _made(options: Mapping[str, Any], name: str) -> bool:
    """Whether an option is in a section that names what takes it."""
    for key in name.split(".")[:-1]:
        if key not in options:  # of the user's own with dots in it, such as the name of a layer
            break
        options = options[key]
    return "_target_" in options


def _check_steps(overrides: list[str]) -> None:
    """Raise UserError where the command line or a YAML file names a step twice, of which Hydra silently keeps one."""
    composed = GlobalHydra.instance().config_loader().compute_defaults_list("config", overrides, RunMode.RUN)
    found = Counter((str(entry.config_path), entry.package) for entry in composed.defaults)
    if twice := [path for (path, _), times in found.items() if path.startswith("step/") and times > 1]:
        name = twice[0].removeprefix("step/")
        raise UserError(
            f"step names {name} twice; name each step once, and "
            f"add +step@step.{name}_again={name} to run it again at the end"
        )


def _check_sections(cfg: DictConfig) -> None:
    """Raise UserError for a section of the main file that is null, or something else without options."""
    for name, option in sections().items():
        if not isinstance(value := OmegaConf.select(cfg, name), DictConfig):
            given = "null" if value is None else value
            raise UserError(f"{name}={given} has no options, and some are needed; leave it out, or give {option}=")


def _check_parts(cfg: DictConfig) -> None:
    """Raise UserError for a section without parts, and for an option where a part should be, as without # @package."""
    for section in MANY:
        if section not in cfg:
            raise UserError(f"{section} has no value; choose from {section}={', '.join(groups()[section])}")
        parts: Any = OmegaConf.to_container(cfg[section], resolve=False)
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise UserError(
                    f"{section}.{name}={part} belongs to no {section}; "
                    f"a YAML file of one begins with # @package {section}.<name>"
                )


def use_threads(threads: int | None) -> None:
    """Limit the CPU threads of libraries that load from now on, and of PyTorch if it is there already."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UserError(f"threads={threads} must be at least 1, or null for all cores")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def make(cfg: Mapping[str, Any] | DictConfig, *arguments: Any, **options: Any) -> Any:
    """Call what a section of the configuration names as its `_target_`, with its options as plain Python values.

    `arguments` and `options` are added untouched; Hydra would turn a dataclass among them into a dict.
    """
    from hydra.utils import instantiate

    section = plain(cfg)  # raises for an option that has no value, which Hydra would leave out
    if "_target_" not in section:
        raise UserError(f"a section with {', '.join(map(str, cfg))} has no _target_; name its class or function there")
    _check_section(section)
    try:
        return instantiate(cfg, _convert_="all", _partial_=True)(*arguments, **options)
    except TypeError as error:
        fault = faulty_argument(error) or ""
        if "lacks" in fault or any(repr(key) in fault for key in map(str, cfg)):  # others are not the user's
            raise UserError(f"{cfg['_target_']} {fault}") from error
        if fault and not str(cfg["_target_"]).startswith(OURS):
            said = f"{cfg['_target_']} {fault.partition(';')[0]}, with which it is called"
            raise UserError(f"{said}; CONTRIBUTING.md says what a class takes") from error
        raise


def _check_section(section: Mapping[str, Any]) -> None:
    """Raise UserError for a number or switch of another kind than the section's target takes, or one inside it."""
    from hydra.utils import instantiate

    for value in section.values():
        if isinstance(value, Mapping):
            _check_section(value)
    if "_target_" in section:
        with suppress(InstantiationException):  # of a target that is not there, which is answered when it is called
            check_kinds(instantiate({"_target_": section["_target_"]}, _partial_=True).func, section)


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Answer a user's mistake with one line and an exit status; let every other error through."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        anew = "restart=true" in sys.argv and NOTHING not in interrupt.args
        stop(command, f"stopped; start the same command {'without restart=true' if anew else 'again'} to continue", 130)
    except BrokenPipeError:  # whoever read the output has had enough, as in `ofa-run --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("RANK", "0") != "0" and "closed by peer" in str(error):
            raise SystemExit(1) from None  # another process of torchrun's ended, and said why
        message = explain(error)
        if message is None or os.environ.get("OFA_DEBUG") == "1":
            raise
        stop(command, message, 1 if any(isinstance(cause, UserError) for cause in chain(error)) else 2)


def stop(command: str, message: str, status: int) -> NoReturn:
    """End the process with one line on stderr."""
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)

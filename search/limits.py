"""Limits of a search by the names of its predictors, as people write them (see `ofa.limits`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ofa.errors import UserError
from ofa.limits import UNITS, parse_limit, reach, show

__all__ = ["known_name", "parse_limit", "parse_limits", "reach", "refuse_measured", "show"]
ALIASES = {"size": "weight_bytes"}  # as people call it


def known_name(name: str, known: Iterable[str]) -> str:
    """The predictor that `name` means, its unit may be left out; raises UserError that lists the known ones."""
    known = list(known)
    name = ALIASES[name] if ALIASES.get(name) in known and name not in known else name
    matches = [k for k in known if name == k or name in (k.removesuffix(f"_{unit}") for unit in UNITS)]
    if len(matches) != 1:
        raise UserError(f"{name!r} is not known; choose from {', '.join(known)}")
    return matches[0]


def parse_limits(limits: Mapping[str, float | str], known: Iterable[str]) -> dict[str, float]:
    """Limits by the full names of their predictors, in those names' units."""
    names = {name: known_name(name, known) for name in limits}
    for name, full in names.items():
        if twice := [other for other in names if names[other] == full and other != name]:
            raise UserError(f"{name} and {twice[0]} are one limit, {full}; give one of them")
    return {full: parse_limit(full, limits[name]) for name, full in names.items()}


def refuse_measured(limits: Iterable[str], measured: Iterable[str]) -> None:
    """Raise UserError for a limit of a measured value: only a measurement would tell whether a network meets it."""
    if limited := [name for name in limits if name in set(measured)]:
        raise UserError(f"limit {limited[0]} is of a measured value; leave it out, it is maximised anyway")

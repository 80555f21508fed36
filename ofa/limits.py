"""Amounts as people write them: 6e6, "60M", "1,000,000", "250KB", "5ms", "800µs", "90%".

A prefix is decimal, as on a data sheet of a disk: 1 kB = 1,000 bytes, 1 MB = 1,000,000 bytes; 1 KiB = 1,024 and 1 MiB =
1,048,576 bytes.  All in capitals or in small letters, a unit is read where one alone can be meant; "Mb" is megabits,
which are refused.  What a number counts is told by the end of its name: `_bytes`, `_ms`, `_uj`;
an accuracy is a share.
"""

from __future__ import annotations

import math
import re

from ofa.errors import UserError

COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
BYTES = {f"{prefix}B": scale for prefix, scale in COUNTS.items()} | {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
UNITS = {
    "bytes": COUNTS | BYTES,
    "ms": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
    "uj": {"": 1.0, "nJ": 1e-3, "uJ": 1.0, "mJ": 1e3, "J": 1e6, "MJ": 1e12},
}
COSTS = ("macs", "params", "flops")
SHARES = {"": 1.0, "%": 1e-2}
THOUSANDS = r"[1-9]\d{0,2}(?:[,_]\d{3})+(?:\.\d*)?"
NUMBER = re.compile(rf"\s*([-+]?(?:{THOUSANDS}|[\d.]+(?:[eE][-+]?\d+)?))\s*([a-zA-Z%]*)\s*")
MICRO = str.maketrans("µμ", "uu")  # the micro sign and the Greek letter


def parse_limit(name: str, value: float | str | None, *, unit: str | None = None) -> float:
    """A limit in the unit of its name; raises UserError for another unit, what is not positive, and shares above 1.

    unit: "bytes", "ms" or "uj" where the name does not tell.
    """
    if value is None:
        raise UserError(f"limit {name} has no value; leave it out to have none, as with ~device.<name>.limits.{name}")
    units = SHARES if sought(name) < 0 else UNITS.get(unit or name.rsplit("_", 1)[-1], COUNTS)
    match = NUMBER.fullmatch(str(value).translate(MICRO))
    try:
        if match is None:
            raise ValueError
        number = float(match[1].replace(",", "")) * _scale(units, match[2])
    except ValueError:
        known = ", ".join(unit for unit in units if unit)
        raise UserError(f"limit {name}={value} is not understood; write a number, or one followed by {known}") from None
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"limit {name}={value} must be above 0; leave the limit out to have none")
    if sought(name) < 0 and number > 1:
        raise UserError(f"limit {name}={value} is a share, at most 1; write it like 0.9 or 90%")
    return number


def _scale(units: dict[str, float], unit: str) -> float:
    """What a unit counts; raises ValueError for one that is not known, or may be two that differ in case alone."""
    if unit in units:
        return units[unit]
    alike = [scale for name, scale in units.items() if unit in (name.lower(), name.upper())]
    if len(alike) != 1:
        raise ValueError
    return alike[0]


def sought(name: str, otherwise: int = 1) -> int:
    """Which way a value is better: -1 for an accuracy, the more the better, 1 for a cost.

    otherwise: the answer for a name that tells neither, one that is not of `COSTS` and ends in no unit.
    """
    if name.startswith("accuracy"):
        return -1
    return 1 if name in COSTS or name.rsplit("_", 1)[-1] in UNITS else otherwise


def keeps(name: str, value: float, limit: float) -> bool:
    """Whether a value is within its limit: an accuracy at least that, every cost at most."""
    return sought(name) * value <= sought(name) * limit


def beyond(name: str, value: float, limit: float) -> str:
    """A value that does not keep its limit, for a message."""
    return f"{name} {value:g} {'<' if sought(name) < 0 else '>'} {limit:g}"


def side(name: str) -> str:
    """On which side of its limit a value may be, in words."""
    return "at least" if sought(name) < 0 else "at most"


def show(value: float) -> str:
    """A value for a message: whole from 1,000 on, four digits below."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def reach(value: float, sign: int) -> str:
    """A value for a message, as `show` rounds it, but never to a better one; sign: -1 where more is better, else 1."""
    shown = float(show(value).replace(",", ""))
    if sign * shown < sign * value:
        digits = 0 if abs(value) >= 1000 else 3 - math.floor(math.log10(abs(value)))
        shown += sign * 10.0**-digits
    return show(shown)

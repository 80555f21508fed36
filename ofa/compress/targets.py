"""How small a network is to become: a share of what it costs now, or an amount with its unit."""

from __future__ import annotations

from ofa.errors import UserError
from ofa.limits import parse_limit

Target = float | str


def check_target(name: str, target: Target, unit: str | None = None) -> None:
    """Raise UserError unless `target` is a share above 0 and at most 1, or an amount above that; unit: see `amount`."""
    amount(name, target, 1.0, unit)


def amount(name: str, target: Target, now: float, unit: str | None = None) -> float:
    """The target in the unit that `name` ends with, or `unit`; numbers up to 1 are shares of what it is `now`."""
    if isinstance(target, str):
        return parse_limit(name, target, unit=unit)
    if not target > 0:
        raise UserError(f"{name}={target} must be above 0: a share of the network's, or an amount such as 250_000")
    if target > 1 and target != int(target) and not name.endswith("_ms"):
        raise UserError(f"{name}={target} is neither a share, at most 1, nor a whole number of its unit, as 250_000 is")
    return target * now if target <= 1 else float(target)

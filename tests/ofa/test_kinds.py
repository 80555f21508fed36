"""Options of the kinds that a signature names."""

from __future__ import annotations

from typing import Any

import pytest

from ofa.errors import UserError
from ofa.kinds import check_kinds


def target(
    n: int,
    part: UserError,
    x: float | None = None,
    on: bool = False,
    either: int | str = 0,
    text: str = "",
    many: tuple[int, ...] = (),
    some: float | tuple[float, ...] | None = None,
    pairs: tuple[tuple[int, ...], ...] = (),
    free: Any = 0,
    perhaps: UserError | None = None,
    *rest: int,
) -> None:
    """Takes an option of each kind."""


@pytest.mark.parametrize(
    "options",
    [
        *({"n": 1, "x": 2, "on": True}, {"x": None}, {"x": 0.5}, {"either": 2.5}, {"y": "a"}),
        *({"many": [1, 2]}, {"many": (1,)}, {"many": 1}, {"many": []}),
        *({"some": [1, 0.5]}, {"some": 0.5}, {"some": None}, {"pairs": [[1.5]]}),
        *({"free": None}, {"perhaps": None}, {"part": 3}),
    ],
)
def test_what_fits_is_taken_and_other_types_are_left_to_the_target(options: dict[str, object]) -> None:
    check_kinds(target, options)
    check_kinds(dict, options)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"n": 2.5}, "target has n=2.5; give a whole number"),
        ({"n": True}, "give a whole number"),
        ({"n": None}, "give a whole number"),
        ({"x": "a"}, "give a number or null"),
        ({"x": [1]}, "give a number or null"),
        ({"on": 1}, "give true or false"),
        ({"many": [1, 2.5]}, r"target has many=\[1, 2.5\]; give a whole number or a list of them"),
        ({"many": "ab"}, "give a whole number or a list of them"),
        ({"part": None}, "target has part=None; leave that out, or give its options"),
        ({"text": None}, "target has text=None; give a text"),
        ({"some": [1, "a"]}, "give a number or null or a list of them"),
    ],
)
def test_an_option_of_another_kind_is_refused_with_the_rule(options: dict[str, object], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        check_kinds(target, options)


def test_annotations_may_be_types() -> None:
    def typed(n: object) -> None: ...

    typed.__annotations__["n"] = int
    check_kinds(typed, {"n": 3})
    with pytest.raises(UserError, match="give a whole number"):
        check_kinds(typed, {"n": 3.5})

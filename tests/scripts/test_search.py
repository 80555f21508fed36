"""What ofa-search says of the network that it chose."""

from __future__ import annotations

import pytest

from ofa.space import load_space
from predictors import Macs
from scripts.search import _choose
from search.agents import RandomSearch
from search.loop import run_search
from search.problem import Problem


@pytest.mark.parametrize(("names", "said"), [(["macs"], "macs 139,920"), (["macs", "accuracy"], "accuracy 139,920")])
def test_a_search_without_accuracy_is_told_by_its_objective(
    names: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    space = load_space("digits_mbv3")
    problem = Problem(dict.fromkeys(names, Macs(space)), {"macs": 1}, {"macs": 139_920})
    found = run_search(RandomSearch(space), problem, 2, 1)
    chosen = _choose({"name": "Board"}, {("random", 0): found})
    assert chosen["predicted"] == dict.fromkeys(names, 139_920)
    assert capsys.readouterr().out.endswith(f", predicted {said}\n")

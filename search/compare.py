"""Agents beside each other: hypervolume against evaluations for every agent and seed, and what they reach.

All results are of one problem, so their hypervolumes are counted up to the same reference point.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from search.result import SearchResult

Results = Mapping[tuple[str, int], SearchResult]  # by agent and seed


def curves(results: Results) -> pd.DataFrame:
    """Rows (agent, seed, evaluations, hypervolume), at most 50 for each search."""
    rows = [
        {"agent": agent, "seed": seed, "evaluations": evaluations, "hypervolume": volume}
        for (agent, seed), result in results.items()
        for evaluations, volume in result.curve()
    ]
    return pd.DataFrame(rows)


def finals(results: Results) -> pd.DataFrame:
    """Rows (agent, seed, the best first objective, hypervolume, seconds), one for each search."""
    rows = []
    for (agent, seed), result in results.items():
        name = next(iter(result.objectives))
        best = float(result.evaluations[name][result.chosen])
        rows.append(
            {"agent": agent, "seed": seed, name: best, "hypervolume": result.hypervolume(), "seconds": result.seconds}
        )
    return pd.DataFrame(rows)


def summary(results: Results) -> list[str]:
    """A line for each agent: mean and spread over its seeds, the agent of the largest mean hypervolume first."""
    table = finals(results)
    name = table.columns[2]
    order = table.groupby("agent")["hypervolume"].mean().sort_values(ascending=False).index
    lines = [f"{'agent':12} {name:>22} {'hypervolume':>26} {'seconds':>8} {'seeds':>5}"]
    for agent in order:
        part = table[table["agent"] == agent]
        cells = [f"{part[c].mean():.5g} ± {_two_digits(part[c].std(ddof=0))}" for c in (name, "hypervolume")]
        lines.append(f"{agent:12} {cells[0]:>22} {cells[1]:>26} {part['seconds'].mean():8.2f} {len(part):5}")
    return lines


def _two_digits(value: float) -> str:
    """A spread to two digits, 950 and not 9.5e+02."""
    return f"{float(f'{value:.2g}'):g}"

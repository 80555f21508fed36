"""The agents and devices of conf/ are what the search takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from search.problem import Problem
from tests.search.toy import SPACE

CONF = Path(__file__).parents[2] / "conf"
PREDICTORS = {
    name: lambda genes: np.ones(len(genes)) for name in ("macs", "weight_bytes", "peak_memory_bytes", "latency_ms")
}


def files(group: str) -> list[Path]:
    found = sorted((CONF / group).glob("*.yaml"))
    assert found
    return found


@pytest.mark.parametrize("path", files("agent"), ids=lambda path: path.stem)
def test_an_agent_file_makes_an_agent(path: Path) -> None:
    assert path.read_text().startswith(f"# @package agent.{path.stem}\n")
    agent = instantiate(OmegaConf.load(path), SPACE, seed=3, n_objectives=2, _convert_="all")
    assert agent.space is SPACE
    assert "seed=3, n_objectives=2" in repr(agent)
    assert agent.ask(2).shape == (2, len(SPACE.genes))


@pytest.mark.parametrize("path", files("device"), ids=lambda path: path.stem)
def test_a_device_file_limits_what_predictors_know(path: Path) -> None:
    assert path.read_text().startswith(f"# @package device.{path.stem}\n")
    device = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(device, dict)
    assert set(device) - {"runtimes", "core"} == {"name", "description", "limits"}
    bounds = Problem(PREDICTORS, {"macs": 1}, device["limits"]).bounds
    assert bounds == device["limits"]  # plain numbers under full names, as every later stage reads them

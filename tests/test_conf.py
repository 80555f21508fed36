"""Every YAML file under conf/: it composes, what it names exists and takes its options, each option is explained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from omegaconf import OmegaConf

from ofa.space import Space, load_space
from scripts.cli import make
from scripts.mistakes import explain
from scripts.options import explanation, groups, sources

CONF = Path(__file__).parents[1] / "conf"
LISTS = ("agent", "device", "runtime", "step")  # groups of which a run takes several
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
SUPPLIED = ("space", "seed", "table", "classes")  # arguments that a stage adds to what a YAML file says


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


def section(group: str, choice: str) -> Any:
    """What a choice adds to the configuration."""
    cfg = compose("config", [f"{group}=[{choice}]" if group in LISTS else f"{group}={choice}"])
    return cfg[group][choice] if group in LISTS else cfg[group]


def targets(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every record with a `_target_` in a plain configuration."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_every_file_is_a_choice_of_its_group() -> None:
    found = {path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml")}
    known = {f"{group}/{choice}" for group, choice in CHOICES} | {"config", "hydra/help/ofa"}
    assert found == known


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_experiment_composes_and_names_its_run(experiment: str) -> None:
    cfg = compose("config", [f"experiment={experiment}"])
    assert cfg.run == f"runs/{experiment}"
    assert {"space", "data", "schedule", "predictor", "agent", "device", "compress", "export"} <= set(cfg)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_what_a_file_names_exists_and_takes_its_options(group: str, choice: str) -> None:
    cfg = compose("config", [f"{group}=[{choice}]" if group in LISTS else f"{group}={choice}"])
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    for node in targets(plain):
        options = {key: value for key, value in node.items() if not key.startswith("_")}
        inspect.signature(get_method(node["_target_"])).bind_partial(**options)


@pytest.mark.parametrize("space", groups()["space"])
def test_space_is_made(space: str) -> None:
    made = make(section("space", space))
    assert isinstance(made, Space)
    assert made.to_dict() == load_space(space).to_dict()


@pytest.mark.parametrize(
    ("group", "choice"), [pair for pair in CHOICES if pair[0] in ("schedule", "distill", "compress", "export", "step")]
)
def test_settings_are_made(group: str, choice: str) -> None:
    settings = section(group, choice)
    assert "_target_" not in settings or make(settings) is not None


@pytest.mark.parametrize("agent", groups().get("agent", []))
def test_agent_is_made_and_proposes(agent: str) -> None:
    space = load_space("digits_mbv3")
    made = make(section("agent", agent), space=space, seed=0)
    assert made.ask(3).shape == (3, len(space.genes))


@pytest.mark.parametrize("data", groups()["data"])
def test_data_is_made_or_its_folder_asked_for(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no images are, unlike the folder of one who uses the project
    if data == "digits":
        assert len(make(section("data", data)).classes) == 10
        return
    with pytest.raises(Exception, match="path") as caught:
        make(section("data", data))
    assert "path" in (explain(caught.value) or "")


@pytest.mark.parametrize("device", groups().get("device", []))
def test_device_limits_only_what_is_predicted(device: str) -> None:
    settings = section("device", device)
    assert settings.name.lower() == device and settings.description
    assert settings.limits and set(settings.limits) <= set(compose("config").predictor)


def test_every_file_and_option_is_explained() -> None:
    assert not [f"{source.group}/{source.name}" for source in sources() if not source.about]
    numbers = {name for source in sources() for name, value in source.values.items() if isinstance(value, (int, float))}
    assert not {name for name in numbers if not explanation(name)}

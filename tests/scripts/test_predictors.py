"""Latency from look-up tables or measured networks, and energy, chosen on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from numpy.typing import NDArray

from ofa.files import read_json, write_json
from ofa.space import Genes, Space, load_space
from predictors import Energy, LearnedLatency, LutLatency, Macs
from predictors.fitting import fit_accuracy
from scripts.parts import fitted, learner
from search.problem import Problem
from tests.predictors.lut_tables import write_tables


class MeanAccuracy:
    """An accuracy predictor of one's own: every network is as good as those measured are in the mean."""

    def __init__(self, space: Space, seed: int = 0, shrink: float = 1.0) -> None:
        self.space, self.seed, self.shrink, self.mean = space, seed, shrink, 0.0

    def fit(self, genes: Genes, accuracy: NDArray[np.float64]) -> MeanAccuracy:
        self.mean = self.shrink * float(np.mean(accuracy))
        return self

    def predict(self, genes: Genes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.full(len(genes), self.mean), np.ones(len(genes))

    def __call__(self, genes: Genes) -> NDArray[np.float64]:
        return self.predict(genes)[0]

    def save(self, path: Path) -> None:
        write_json(path, {"space": self.space.to_dict(), "mean": self.mean})

    @staticmethod
    def load(path: Path) -> MeanAccuracy:
        values = read_json(path)
        found = MeanAccuracy(load_space(values["space"]))
        found.mean = values["mean"]
        return found


EXACT = ("macs", "energy_uj", "latency_ms")


def predictors(space: Space, *overrides: str) -> dict[str, Any]:
    """What a search would use, without the parts that ofa-fit makes."""
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", list(overrides))
    cfg.predictor = {name: options for name, options in cfg.predictor.items() if name in EXACT}
    return fitted(cfg, space)


def test_latency_comes_from_a_folder_of_tables(tmp_path: Path) -> None:
    space = load_space("digits_mbv3")
    write_tables(tmp_path, space)
    made = predictors(space, "predictor=[default,latency_lut]", f"predictor.latency_ms.folder={tmp_path}")
    assert isinstance(made["latency_ms"], LutLatency)
    genes = space.sample(5, np.random.default_rng(0))
    steps = 2 + space.values(genes, "depth").sum(axis=1) + 3  # stem, blocks, convolution, pool, classifier
    np.testing.assert_array_equal(made["latency_ms"](genes), steps)


def test_latency_comes_from_measured_networks(tmp_path: Path) -> None:
    space = load_space("digits_mbv3").restrict(depth=1)
    genes = np.unique(space.sample(40, np.random.default_rng(0)), axis=0)
    rows = ["r,d,ks,e,board,other"]
    for arch, macs in zip(space.decode(genes), Macs(space)(genes), strict=True):
        lists = ("-".join(map(str, values)) for values in (arch.depth, arch.kernel, arch.expand))
        rows.append(f"{arch.resolution},{','.join(lists)},{1e-6 * macs},{2e-6 * macs}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options = [f"predictor.latency_ms.table={tmp_path / 'table.csv'}", "predictor.latency_ms.column=board"]
    one = space.restrict(width=[1.0])
    made = predictors(one, "predictor=[default,latency_learned]", *options, "predictor.latency_ms.donors=[other]")
    assert isinstance(made["latency_ms"], LearnedLatency)
    assert len(made["latency_ms"].donors) == 1


def test_accuracy_is_learned_by_a_class_of_ones_own(tmp_path: Path) -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(20, np.random.default_rng(0))
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("config", [f"run={tmp_path}", "predictor=[macs,accuracy]"])
    cfg.predictor.accuracy = {"_target_": f"{__name__}.MeanAccuracy", "shrink": 0.5}
    found, report, _ = fit_accuracy(learner(cfg, space), genes, np.linspace(0, 1, 20), repeats=2)
    assert isinstance(found, MeanAccuracy)
    assert (report["model"], report["cross_validation"], report["rmse"]["mean"] > 0) == ("MeanAccuracy", {}, True)
    found.save(tmp_path / "fit/accuracy.json")
    loaded = fitted(cfg, space)["accuracy"]
    assert isinstance(loaded, MeanAccuracy)
    np.testing.assert_allclose(loaded(genes), 0.25)


def test_energy_is_an_objective_and_a_limit() -> None:
    space = load_space("digits_mbv3")
    made = predictors(space, "predictor=[macs,energy_uj]")
    assert isinstance(made["energy_uj"], Energy)
    genes = space.sample(20, np.random.default_rng(0))
    joules = made["energy_uj"](genes)
    found = Problem(made, {"macs": 1, "energy_uj": 1}, {"energy_uj": float(np.median(joules))}).evaluate(genes)
    np.testing.assert_array_equal(found.violation > 0, joules > np.median(joules))

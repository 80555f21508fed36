"""Latency learned from whole networks: made-up devices whose rule is known, real measurements, donors, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.space import Genes, Space, load_space
from ofa.table import layer_macs, layer_table
from predictors import LearnedLatency, Macs
from predictors.latency_features import LatencyFeatures, layer_operations, layer_traffic
from predictors.learned_latency import learn_from_table
from predictors.power_mean import fit_power_mean, undisturbed
from predictors.scores import kendall_tau, within
from predictors.tables import read_table
from scripts.benchmarks.predictors_latency_learned import main

TABLE = "tables/ofa_mbv3_w1.0_latency.csv"
Float = NDArray[np.float64]


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("ofa_mbv3_w1.0")


def disturbed(ms: Float, seed: int, *, noise: float = 0.01, share: float = 0.15) -> Float:
    """Measurements of which a share waited for something else: up to twice the time."""
    rng = np.random.default_rng(seed)
    waited = (rng.random(len(ms)) < share) * rng.random(len(ms))
    return np.asarray(ms * np.exp(noise * rng.standard_normal(len(ms))) * (1 + waited))


def roofline(space: Space, genes: Genes) -> Float:
    """A device that hides computing behind launching, or the other way round."""
    depth = space.values(genes, "depth").sum(axis=1)
    return np.maximum(0.5 * depth, Macs(space)(genes) / 3e7)


def test_a_network_counted_by_hand_has_so_many_operations() -> None:
    space = load_space("digits_mbv3")
    table = layer_table(space, space.smallest())
    # stem: conv, bn, act; depthwise, bn, act, project, bn, shortcut.  Blocks: 3 convolutions with bn, 2 activations;
    # squeeze-excite: pool, 2 convolutions, 2 activations, product.  Head: conv, bn, act; pool; linear
    assert layer_operations(table).sum() == 3 + 6 + 8 + 2 * (8 + 6) + 3 + 1 + 1
    image = int(space.resolution[0])
    assert layer_traffic(table)[0, 0] == image**2 + image**2 * table.cout[0, 0]


def test_stage_features_add_up_to_the_network(space: Space) -> None:
    genes = space.sample(20, np.random.default_rng(0))
    features = LatencyFeatures(space)
    stages = features(genes)[:, features.groups[5]].sum(axis=1)  # MACs of the stages
    inside = [name.startswith("stages") for name in layer_table(space, genes).names]
    np.testing.assert_array_equal(stages, layer_macs(layer_table(space, genes))[:, inside].sum(axis=1))


@pytest.mark.parametrize("power", [0, 1, 8])
def test_the_power_mean_that_made_the_data_is_found(power: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) * 0.5
    y = x[:, [0, 2]] @ [0.6, 0.4] if power == 0 else np.log(np.exp(power * x[:, [0, 2]]) @ [1.0, 1.0]) / power
    y += 0.002 * rng.standard_normal(60)
    y[::7] += rng.random(9)
    model = fit_power_mean(x, y)
    clean = np.arange(60) % 7 != 0
    assert np.abs(model(x) - y)[clean].max() < 0.03
    best = model.members[int(np.argmax(model.shares))]
    assert best.power == power
    assert (best.weights >= 0).all()
    np.testing.assert_array_equal(np.flatnonzero(best.weights), [0, 2])


def test_a_disturbed_measurement_is_recognised() -> None:
    residuals = np.append(np.random.default_rng(0).normal(size=50), 9.0)
    assert not undisturbed(residuals)[-1]
    assert undisturbed(residuals)[:50].mean() > 0.9


def test_twenty_disturbed_networks_teach_a_roofline(space: Space) -> None:
    genes = space.sample(1020, np.random.default_rng(1))
    ms = roofline(space, genes)
    learned = LearnedLatency(space).fit(genes[:20], disturbed(ms[:20], seed=2))
    assert kendall_tau(learned(genes[20:]), ms[20:]) > 0.85
    assert within(learned(genes[20:]), ms[20:]) > 0.9


def test_shuffled_measurements_make_all_networks_alike(space: Space) -> None:
    """The order that is left is that of the costs, none of which makes a network faster; the latency hardly moves."""
    genes = space.sample(400, np.random.default_rng(1))
    ms = roofline(space, genes)
    shuffled = np.random.default_rng(3).permutation(ms[:200])
    found = LearnedLatency(space).fit(genes[:200], shuffled)(genes[200:])
    assert np.log(found).std() < 0.35 * np.log(ms).std()


def test_a_donor_teaches_what_no_cost_tells(space: Space) -> None:
    """Both devices are slow where stage 1 has kernel 7: 20 networks show little of that, the other's 150 do."""
    genes = space.sample(800, np.random.default_rng(4))
    slow = (genes[:, space.columns("kernel")][:, 4:8] == 2).sum(axis=1)
    base = Macs(space)(genes) ** 0.5 * (1 + 0.3 * slow)
    donor = LearnedLatency(space).fit(genes[:150], disturbed(1e-3 * base[:150], seed=5))
    ms = 3e-4 * base**1.2
    few = disturbed(ms[150:170], seed=6)
    taught = LearnedLatency(space, [donor]).fit(genes[150:170], few)(genes[170:])
    alone = LearnedLatency(space).fit(genes[150:170], few)(genes[170:])
    assert kendall_tau(taught, ms[170:]) > kendall_tau(alone, ms[170:]) + 0.05


class Misleading(LearnedLatency):
    """A donor whose latencies have nothing to do with the network, over a factor of seven."""

    def __call__(self, genes: Genes) -> Float:
        return np.asarray(np.exp(np.sin(1e4 * genes @ np.random.default_rng(0).normal(size=genes.shape[1]))))


def test_a_donor_that_misleads_costs_next_to_nothing(space: Space) -> None:
    for seed in range(8):
        genes = space.sample(420, np.random.default_rng((7, seed)))
        ms = roofline(space, genes)
        few = disturbed(ms[:20], seed, noise=0.1)
        alone, misled = (
            kendall_tau(LearnedLatency(space, donors).fit(genes[:20], few)(genes[20:]), ms[20:])
            for donors in ((), (Misleading(space),))
        )
        assert misled > alone - 0.02


def test_powers_that_the_samples_do_not_tell_apart_all_count(data_folder: Path, space: Space) -> None:
    """Of these 20 measurements the likeliest power alone ranks 3,000 networks hardly better than chance."""
    genes, ms = read_table(data_folder / TABLE, space, "latency_ms_2080ti_1")
    few = np.random.default_rng((0, 7)).permutation(len(ms))[:20]
    assert kendall_tau(LearnedLatency(space).fit(genes[few], ms[few])(genes), ms) > 0.35


@pytest.mark.parametrize(
    ("column", "tau"), [("2080ti_1", 0.56), ("2080ti_32", 0.66), ("2080ti_64", 0.95), ("titan_rtx_1", 0.86)]
)
def test_measured_gpus_are_predicted_better_than_by_depth_or_macs(
    data_folder: Path, space: Space, column: str, tau: float
) -> None:
    genes, ms = read_table(data_folder / TABLE, space, f"latency_ms_{column}")
    order = np.random.default_rng(77).permutation(len(ms))
    train, test = order[:200], order[200:]
    found = kendall_tau(LearnedLatency(space).fit(genes[train], ms[train])(genes[test]), ms[test])
    depth = space.values(genes[test], "depth").sum(axis=1)
    assert found > tau
    assert found > max(kendall_tau(depth, ms[test]), kendall_tau(Macs(space)(genes[test]), ms[test])) - 0.01


def test_the_deviation_is_that_of_undisturbed_measurements(space: Space) -> None:
    genes = space.sample(300, np.random.default_rng(1))
    ms = disturbed(roofline(space, genes), seed=2, noise=0.03, share=0.1)
    mean, std = LearnedLatency(space).fit(genes[:200], ms[:200]).predict(genes[200:])
    away = np.abs(ms[200:] - mean) / std
    assert 0.5 < np.median(away) < 1.0  # 0.67 for a normal distribution


def test_a_stored_predictor_answers_as_before(space: Space, tmp_path: Path) -> None:
    genes = space.sample(80, np.random.default_rng(0))
    donor = LearnedLatency(space).fit(genes[:30], roofline(space, genes[:30]))
    learned = LearnedLatency(space, [donor]).fit(genes[30:], 2 * roofline(space, genes[30:]))
    learned.save(tmp_path / "latency.json")
    again = LearnedLatency.load(tmp_path / "latency.json")
    np.testing.assert_allclose(again(genes), learned(genes), rtol=1e-12)
    assert again.to_dict() == learned.to_dict()


def test_a_table_with_the_measurements_of_other_devices_is_learned_from(tmp_path: Path, space: Space) -> None:
    genes = space.sample(60, np.random.default_rng(0))
    rows = ["r,d,ks,e,fast,slow"]
    for arch, ms in zip(space.decode(genes), roofline(space, genes), strict=True):
        full = [v for s, d in enumerate(arch.depth) for v in [*_part(arch.kernel, arch.depth, s), *[3] * (4 - d)]]
        wide = [v for s, d in enumerate(arch.depth) for v in [*_part(arch.expand, arch.depth, s), *[3] * (4 - d)]]
        lists = ("-".join(map(str, values)) for values in (arch.depth, full, wide))
        rows.append(f"{arch.resolution},{','.join(lists)},{ms},{3 * ms}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows))
    read, ms = read_table(path, space, "slow")
    np.testing.assert_array_equal(read, genes)
    learned = learn_from_table(space, path, "slow", donors=["fast"])
    assert kendall_tau(learned(genes), ms) > 0.9


def _part(values: tuple[float, ...], depth: tuple[int, ...], stage: int) -> tuple[float, ...]:
    start = sum(depth[:stage])
    return values[start : start + depth[stage]]


def test_mistakes_are_answered_with_rule_value_and_remedy(space: Space, tmp_path: Path) -> None:
    genes = space.sample(12, np.random.default_rng(0))
    with pytest.raises(UserError, match="learned nothing yet"):
        LearnedLatency(space)(genes)
    with pytest.raises(UserError, match="9 measured networks are too few"):
        LearnedLatency(space).fit(genes[:9], np.ones(9))
    for wrong in (0.0, -3.0, np.inf, np.nan):
        with pytest.raises(UserError, match=f"milliseconds above 0 for each of 12 architectures, not .* {wrong} among"):
            LearnedLatency(space).fit(genes, np.append(np.ones(11), wrong))
    with pytest.raises(UserError, match=r"for each of 12 architectures, not \(11,\) numbers$"):
        LearnedLatency(space).fit(genes, np.ones(11))
    donor = LearnedLatency(space).fit(genes, np.ones(12))
    with pytest.raises(UserError, match="donor 0 is of other genes than those of"):
        LearnedLatency(space.restrict(resolution=1), [donor])
    (tmp_path / "broken.json").write_text(json.dumps({"donors": []}))
    with pytest.raises(UserError, match="lacks 'space'"):
        LearnedLatency.load(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"none\.csv does not exist"):
        read_table(tmp_path / "none.csv", space, "ms")
    (tmp_path / "table.csv").write_text("r,d,ks,e\n128,2,3,x\n")
    with pytest.raises(UserError, match="lacks the column ms; it has r, d, ks, e"):
        read_table(tmp_path / "table.csv", space, "ms")
    (tmp_path / "table.csv").write_text("r,d,ks,e,ms\n128,2,3,x,1\n")
    with pytest.raises(UserError, match=r"table\.csv, row 1: e 'x' is no number, nor several as"):
        read_table(tmp_path / "table.csv", space, "ms")


def test_the_benchmark_of_donors_runs(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genes = space.sample(50, np.random.default_rng(0))
    ms = Macs(space)(genes) / 1e7
    lines = ["ks,e,d,r,latency_ms_a,latency_ms_b"]
    for arch, value in zip(space.decode(genes), ms, strict=True):
        lists = ("-".join(map(str, values)) for values in (arch.kernel, arch.expand, arch.depth))
        lines.append(f"{','.join(lists)},{arch.resolution},{value},{value + 2}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    given = ["transfer", "--table", str(table), "--samples", "30", "--few", "12", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", ["predictors_latency_learned.py", *given])
    main()
    assert "12 + all others" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar_mbv3", "cifar_conv", "ofa_resnet50"])
def test_shortcuts_of_every_block_kind_are_operations(name: str) -> None:
    space = load_space(name)
    table = layer_table(space, space.largest())
    there = table.active[0]
    joined = {block for block, held in zip(table.block[there], table.shortcut[there], strict=True) if held}
    others = np.array([act != "none" for act in table.act]) + 2 * np.array([".se.reduce" in n for n in table.names])
    assert joined
    assert layer_operations(table).sum() == (1 + table.bn + others)[there].sum() + len(joined)


def test_a_price_of_one_kernel_and_a_rule_for_some_networks_are_learned(space: Space) -> None:
    rng = np.random.default_rng(0)
    genes = rng.permutation(np.unique(space.sample(300, rng), axis=0))
    train, test = genes[:160], genes[160:]
    relative = Macs(space)(genes) / Macs(space)(genes).mean()
    largest = max(space.block_choices("kernel")[0])
    wide = (space.used(genes) & (space.block_values(genes, "kernel") == largest)).sum(axis=1)
    high = space.values(genes, "resolution")[:, 0] >= 208
    for ms in (10 * relative + wide, 10 * relative * np.where(high, 2.0, 1.0)):
        ms = ms * np.exp(0.01 * rng.standard_normal(len(ms)))
        learned = LearnedLatency(space).fit(train, ms[:160])
        assert np.abs(learned(test) / ms[160:] - 1).mean() < 0.05

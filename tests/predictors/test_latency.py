"""Latency tables: which shapes a network has, measuring, resuming, refusing to mix devices, summing, correcting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from ofa.errors import UserError
from ofa.export.latency import device_card, interleaved, measure_models, measure_networks, measure_onnx
from ofa.space import Space, load_space
from ofa.table import layer_table
from predictors import Latency, LatencyTable, latency_table
from predictors.costs import layer_macs
from predictors.graphs import graphs
from predictors.latency import latency_from_table
from predictors.latency_table import measure_table
from predictors.shapes import Shape, code_of, shape_codes, shape_of, space_shapes


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits_mbv3").restrict(resolution=[12], width=[0.5], kernel=[3], expand=[2])


def made_up_table(space: Space, device: str = "here") -> LatencyTable:
    """Microseconds for every thousand MACs, and one for each operation."""
    timing = {"p10_ms": 0.0, "p90_ms": 0.0, "n": 1}
    work = {s: (s.size / s.stride) ** 2 * s.cin * s.cout * s.kernel**2 for s in space_shapes(space)}
    return LatencyTable({"machine": device}, {s: timing | {"median_ms": 1e-6 * w + 1e-3} for s, w in work.items()})


def test_codes_and_shapes_are_one_to_one() -> None:
    for shape in space_shapes(load_space("ofa_mbv3_w1.0")):
        assert shape_of(code_of(shape)) == shape
    with pytest.raises(UserError, match="too large for the latency table"):
        code_of(Shape("conv", "relu", 40_000, 8, 1, 1, 8))


def test_the_shapes_of_a_space_are_those_of_its_networks() -> None:
    space = load_space("digits_mbv3")
    drawn = shape_codes(layer_table(space, space.sample(20_000, np.random.default_rng(0))))
    assert {shape_of(code) for code in np.unique(drawn) if code} == set(space_shapes(space))


def test_squeeze_excite_is_one_operation_of_the_size_of_its_map(space: Space) -> None:
    gates = [shape for shape in space_shapes(space) if shape.op == "squeeze_excite"]
    assert {shape.size for shape in gates} == {3}
    assert not any(shape.act == "h_sigmoid" for shape in space_shapes(space))


def test_graphs_repeat_the_operation_n_times_more() -> None:
    shapes = (
        Shape("conv", "h_swish", 8, 24, 1, 1, 6),
        Shape("depthwise", "relu6", 16, 16, 5, 2, 9),
        Shape("linear", "none", 32, 10, 1, 1, 1),
        Shape("squeeze_excite", "relu", 16, 8, 1, 1, 5),
    )
    for shape in shapes:
        less, more, n = (graphs(shape)[i] for i in range(3))
        counts = [len([x for x in _nodes(model) if x in ("Conv", "Gemm")]) for model in (less, more)]  # type: ignore[arg-type]
        assert counts[1] - counts[0] == n * (2 if shape.op == "squeeze_excite" else 1)
        assert measure_onnx(more, repeats=3, warmup=1)["median_ms"] > 0  # type: ignore[arg-type]


def _nodes(model: bytes) -> list[str]:
    onnx.checker.check_model(onnx.load_from_string(model))
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def test_measuring_resumes_and_keeps_what_it_has(space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shapes = tmp_path / "latency.parquet", space_shapes(space)
    monkeypatch.setattr(latency_table, "SAVE_EVERY", 0.0)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_table(shapes, path, progress=stop)
    first = LatencyTable.load(path)
    assert 0 < len(first.times) == seen[0][0] < len(shapes) == seen[0][1]
    whole = measure_table(shapes, path)
    assert set(whole.times) == set(shapes)
    assert all(whole.times[shape] == timing for shape, timing in first.times.items())
    assert LatencyTable.load(path) == whole
    assert whole.device == device_card(threads=1)
    assert all(timing["median_ms"] >= 0 and timing["n"] >= 5 for timing in whole.times.values())


def test_another_device_or_number_of_threads_is_refused(space: Space, tmp_path: Path) -> None:
    path, shapes = tmp_path / "latency.parquet", space_shapes(space)[:2]
    table = measure_table(shapes, path)
    with pytest.raises(UserError, match="holds for threads 1, not 2"):
        measure_table(shapes, path, threads=2)
    replace(table, device=table.device | {"machine": "another"}).save(path)
    with pytest.raises(UserError, match="holds for machine another"):
        measure_table(shapes, path)
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="is no latency table"):
        measure_table(shapes, path)


def test_a_table_with_a_damaged_value_or_two_of_one_operation_is_refused(space: Space, tmp_path: Path) -> None:
    table, path = made_up_table(space), tmp_path / "table.parquet"
    table.save(path)
    whole, refused = path.read_bytes(), 0
    for place in range(8, len(whole) // 2, 50):  # the columns, before the file's own directory
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert LatencyTable.load(path) == table, "what it does not refuse it does not need"
        except UserError:
            refused += 1
    assert refused > 3
    path.write_bytes(whole)
    frame = pd.read_parquet(path)
    twice = pd.concat([frame, frame])
    twice.attrs = frame.attrs
    twice.to_parquet(path, index=False)
    with pytest.raises(UserError, match=rf"\({len(twice)} rows are of {len(frame)} operations\)"):
        LatencyTable.load(path)


@pytest.mark.parametrize("ms", [np.nan, np.inf, -1.0])
def test_a_table_with_a_time_that_is_none_is_refused(space: Space, tmp_path: Path, ms: float) -> None:
    table, path = made_up_table(space), tmp_path / "table.parquet"
    shape = next(iter(table.times))
    replace(table, times=table.times | {shape: table.times[shape] | {"median_ms": ms}}).save(path)
    with pytest.raises(UserError, match=rf"is no latency table \(Shape\(.*\) has {ms} ms\); delete it and measure"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"op": "pool"}, r".* has pool; choose from none, conv, .*"),
        ({"act": "gelu"}, ".* has gelu; .*"),
        ({"cin": -3}, ".*"),
    ],
)
def test_a_table_with_an_operation_that_no_layer_has_is_refused(
    space: Space, tmp_path: Path, odd: dict[str, Any], why: str
) -> None:
    table, path = made_up_table(space), tmp_path / "table.parquet"
    shape = next(iter(table.times))
    replace(table, times=table.times | {shape._replace(**odd): table.times[shape]}).save(path)
    with pytest.raises(UserError, match=rf"is no latency table \({why}\); delete it and measure"):
        latency_from_table(space, str(path))


def test_latency_is_the_sum_of_the_operations_of_a_network(space: Space) -> None:
    table = made_up_table(space)
    genes = space.sample(50, np.random.default_rng(0))
    for i, codes in enumerate(shape_codes(layer_table(space, genes))):
        by_hand = sum(table.times[shape_of(code)]["median_ms"] for code in codes if code)
        assert Latency(space, table)(genes[i : i + 1])[0] == pytest.approx(by_hand)


def test_the_correction_finds_overhead_and_slope(space: Space) -> None:
    genes = space.sample(30, np.random.default_rng(0))
    latency = Latency(space, made_up_table(space))
    true = 0.3 + 1.7 * latency(genes)
    latency.fit(genes[:5], true[:5])
    np.testing.assert_allclose(latency(genes), true, rtol=1e-6)
    with pytest.raises(UserError, match="2 or more networks"):
        latency.fit(genes[:1], true[:1])


def test_no_correction_ranks_networks_backwards_or_takes_less_than_no_time(space: Space) -> None:
    genes = space.sample(30, np.random.default_rng(0))
    total = Latency(space, made_up_table(space))(genes)
    order = np.argsort(total)[[0, len(total) // 2, -1]]
    falling = Latency(space, made_up_table(space)).fit(genes[order], total[order][::-1])
    assert falling.slope > 0
    assert np.array_equal(np.argsort(falling(genes)), np.argsort(total))
    for n in range(2, 20):
        level = Latency(space, made_up_table(space)).fit(genes[:n], np.full(n, 5.0))
        assert np.array_equal(np.argsort(level(genes)), np.argsort(total))
    steep = Latency(space, made_up_table(space)).fit(genes[order[1:]], total[order[1:]] - 0.9 * total[order[1]])
    assert steep(genes).min() > 0


def test_an_unknown_shape_is_named(space: Space) -> None:
    with pytest.raises(UserError, match=r"lacks Shape\(op='conv'.*; measure the shapes of space digits_mbv3"):
        Latency(load_space("digits_mbv3"), made_up_table(space))
    with pytest.raises(UserError, match="latency table lacks"):
        Latency(space, LatencyTable({}, {}))


def test_whole_networks_are_measured_in_turns(space: Space) -> None:
    rows = measure_networks(space, space.sample(2, np.random.default_rng(0)), repeats=6)
    assert [set(row) >= {"arch", "median_ms", "p10_ms", "p90_ms", "n", "threads", "machine"} for row in rows] == [
        True
    ] * 2
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["n"] == 6 for row in rows)


def test_a_slower_call_takes_longer() -> None:
    calls = [lambda n=n: sum(range(n)) for n in (1_000, 100_000)]
    fast, slow = np.median(interleaved(calls, repeats=9), axis=1)
    assert slow > 10 * fast


def test_a_broken_model_is_answered_by_name(tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot load .*torn\.onnx"):
        measure_onnx(tmp_path / "torn.onnx")
    with pytest.raises(UserError, match="threads 0 must be at least 1"):
        measure_models({"a": b""}, threads=0)


def test_macs_and_shapes_agree(space: Space) -> None:
    """Each convolution's shape holds all that its MACs depend on."""
    table = layer_table(space, space.largest())
    for layer, code in enumerate(shape_codes(table)[0]):
        shape = shape_of(code)
        if shape.op in ("conv", "depthwise", "linear"):
            side = (shape.size - 1) // shape.stride + 1
            groups = shape.cin if shape.op == "depthwise" else 1
            assert side**2 * shape.kernel**2 * shape.cin * shape.cout // groups == layer_macs(table)[0, layer]

"""Tables of measured networks: of every space, as once-for-all's and DyNAS-T's users write them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ofa.errors import UserError
from ofa.settings import arch_of
from ofa.space import Space, load_space
from predictors.costs import Macs
from predictors.learned_latency import LearnedLatency
from predictors.scores import kendall_tau
from predictors.tables import read_table
from scripts.benchmarks import predictors_latency_learned
from scripts.benchmarks.predictors_accuracy import read_measured
from tests.predictors.test_costs import SPACES

NAMES = {"depth": "d", "kernel": "ks", "expand": "e"}


def _joined(values: Iterable[Any]) -> str:
    return "-".join(f"{value:g}" for value in values)


def _rows(space: Space, genes: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Full-length lists, widths by position, a digit for each operation; columns in any order."""
    rows = []
    for i, row in enumerate(genes):
        lists = {column: _joined(space.values(row[None], name)[0]) for name, column in NAMES.items()}
        lists |= {"w": _joined(row[space.columns("width")]), "arch": "".join(map(str, row[space.columns("op")]))}
        rows.append({"value": i / 2, **lists, "r": int(space.values(row[None], "resolution")[0, 0])})
    return rows


@pytest.mark.parametrize("name", SPACES)
def test_a_table_of_any_space_is_read(tmp_path: Path, name: str) -> None:
    space = load_space(name)
    genes = space.sample(30, np.random.default_rng(0))
    frame = pd.DataFrame(_rows(space, genes))
    frame.to_csv(tmp_path / "table.csv", index=False)
    read, values = read_table(tmp_path / "table.csv", space, "value")
    np.testing.assert_array_equal(read, genes)
    np.testing.assert_array_equal(values, np.arange(30) / 2)
    chosen = [c for c in frame if frame[c].astype(str).str.len().min() > 0]
    frame[chosen].to_csv(tmp_path / "few.csv", index=False)
    np.testing.assert_array_equal(read_table(tmp_path / "few.csv", space, "value")[0], genes)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.filterwarnings("error")
def test_latency_is_learned_from_a_table_of_any_space(name: str) -> None:
    space = load_space(name)
    genes = space.sample(120, np.random.default_rng(0))
    ms = 1 + 5 * Macs(space)(genes) / Macs(space)(space.largest())[0]
    found = LearnedLatency(space).fit(genes[:80], ms[:80])
    assert kendall_tau(found(genes[80:]), ms[80:]) > 0.95


def test_settings_of_proxylessnas_may_leave_out_the_last_block() -> None:
    """once-for-all's code gives settings to the blocks from the first on; the last keeps its largest choices."""
    space = load_space("ofa_proxyless_w1.3")
    config: dict[str, Any] = {"ks": [3, 5, 7, 3] * 5, "e": [3, 4, 6, 4] * 5, "d": [2, 3, 4, 3, 2, 1], "r": 160}
    short = space.encode([arch_of(space, config)])
    full = space.encode([arch_of(space, config | {"ks": [*config["ks"], 7], "e": [*config["e"], 6]})])
    np.testing.assert_array_equal(short, full)
    with pytest.raises(UserError, match=r"kernel has 19 entries; give one for each"):
        space.encode([arch_of(space, config | {"ks": [3] * 19})])
    with pytest.raises(UserError, match=r"depth \(2, 3\) has 2 entries; ofa_proxyless_w1.3 has 5"):
        space.encode([arch_of(space, config | {"d": [2, 3]})])


@pytest.mark.parametrize("name", ["ofa_proxyless_w1.3", "mcunet", "ofa_mbv3_w1.0"])
def test_lists_of_active_blocks_are_those_of_their_networks(tmp_path: Path, name: str) -> None:
    """Also where as many blocks are active as a list without the last block has entries."""
    space = load_space(name)
    genes = space.sample(1500, np.random.default_rng(1))
    archs = space.decode(genes)
    settings: list[dict[str, Any]] = [
        {"r": a.resolution, "d": [*a.depth], "ks": [*a.kernel], "e": [*a.expand], "w": [*a.width]} for a in archs
    ]
    floats = [s | {"w": list(map(float, s["w"])) or None} for s in settings]  # an int is a position
    read = np.concatenate([space.encode([arch_of(space, s)]) for s in floats])
    np.testing.assert_array_equal(read, genes)
    frame = pd.DataFrame([s | {"value": i} for i, s in enumerate(settings)])
    frame.to_csv(tmp_path / "table.csv", index=False)
    np.testing.assert_array_equal(read_table(tmp_path / "table.csv", space, "value")[0], genes)


def test_operations_that_lost_a_leading_zero_are_read(tmp_path: Path) -> None:
    space = load_space("nas_bench_macro")
    genes = space.sample(300, np.random.default_rng(0))
    frame = pd.DataFrame({"arch": ["".join(map(str, a.op)) for a in space.decode(genes)], "value": range(300)})
    frame.to_csv(tmp_path / "text.csv", index=False)
    pd.read_csv(tmp_path / "text.csv").to_csv(tmp_path / "numbers.csv", index=False)
    assert (tmp_path / "text.csv").read_text() != (tmp_path / "numbers.csv").read_text()
    np.testing.assert_array_equal(read_table(tmp_path / "numbers.csv", space, "value")[0], genes)
    for form in ("'{}", '"{}"', "{}.0"):  # of spreadsheets
        (tmp_path / "form.csv").write_text("arch,value\n" + "".join(f"{form.format(o)},1\n" for o in frame["arch"]))
        np.testing.assert_array_equal(read_table(tmp_path / "form.csv", space, "value")[0], genes)
    (tmp_path / "short.csv").write_text("arch,value\n0120120,1\n")
    with pytest.raises(UserError, match=r"short.csv, row 1: op has 7 entries; give one for each"):
        read_table(tmp_path / "short.csv", space, "value")


@pytest.mark.parametrize("form", ["{}", "[{}]", "({},)", "['{}']"])
@pytest.mark.parametrize("sign", ["-", ", ", " ", "|", "_", "', '"])
def test_lists_are_read_as_people_write_them(tmp_path: Path, form: str, sign: str) -> None:
    space = load_space("ofa_mbv3_w1.0")
    lists = {"d": [2, 3, 4, 2, 3], "ks": [3, 5, 7, 3] * 5, "e": [3, 4, 6, 3] * 5}
    row = {name: form.format(sign.join(map(str, values))) for name, values in lists.items()}
    pd.DataFrame([row | {"r": 160, "value": 1}]).to_csv(tmp_path / "table.csv", index=False)
    expected = space.encode([arch_of(space, lists | {"r": 160})])
    np.testing.assert_array_equal(read_table(tmp_path / "table.csv", space, "value")[0], expected)


def test_one_setting_stands_for_all() -> None:
    space = load_space("ofa_mbv3_w1.0")
    arch = arch_of(space, {"ks": 7, "e": 6, "d": 4, "r": 224})
    np.testing.assert_array_equal(space.encode([arch]), space.largest())


def test_widths_are_positions_or_multipliers() -> None:
    space = load_space("ofa_resnet50")
    config = {"d": 0, "e": 0.2, "r": 128}
    by_position = space.encode([arch_of(space, config | {"w": [0, 1, 2, 0, 1, 2]})])
    by_value = space.encode([arch_of(space, config | {"w": [0.65, 0.8, 1.0, 0.65, 0.8, 1.0]})])
    np.testing.assert_array_equal(by_position, by_value)
    mixed = space.encode([arch_of(space, config | {"w": [0.65, 0.8, 1, 0.65, 0.8, 1]})])
    np.testing.assert_array_equal(mixed, by_value)  # a 1 beside a fraction is no position
    for wrong in (3, 0.7, -1):
        what = rf"width {wrong} of .* is no position among \(0.65, 0.8, 1.0\) of ofa_resnet50"
        with pytest.raises(UserError, match=what):
            arch_of(space, config | {"w": [wrong] * 6})


def test_lists_in_brackets_are_read(tmp_path: Path) -> None:
    space = load_space("ofa_mbv3_w1.0")
    row = {"r": 224, "d": [4] * 5, "ks": [7] * 20, "e": [6] * 20, "top1": 0.8}
    pd.DataFrame([row]).to_csv(tmp_path / "table.csv", index=False)
    np.testing.assert_array_equal(read_table(tmp_path / "table.csv", space, "top1")[0], space.largest())


def test_what_a_table_lacks_is_named(tmp_path: Path) -> None:
    space = load_space("ofa_resnet50")
    frame = pd.DataFrame(_rows(space, space.sample(3, np.random.default_rng(0))))
    frame.drop(columns="w").to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(UserError, match=r"table.csv lacks the column w; it has value, "):
        read_table(tmp_path / "table.csv", space, "value")
    frame["r"] = [128, None, 128]
    frame.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(UserError, match=r"table.csv, row 2: r '' is no number, nor several as 3-5-7"):
        read_table(tmp_path / "table.csv", space, "value")


def _table(tmp_path: Path, space: Space, **columns: Any) -> tuple[Path, np.ndarray[Any, Any]]:
    """A table of four networks in which some columns are others."""
    genes = space.sample(4, np.random.default_rng(0))
    pd.DataFrame(_rows(space, genes)).assign(**columns).to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv", genes


@pytest.mark.parametrize(
    "form", [{"sep": ";", "decimal": ","}, {"sep": ";"}, {"sep": "\t"}, {"lineterminator": "\r\n"}]
)
def test_tables_of_other_programs_are_read(tmp_path: Path, form: dict[str, Any]) -> None:
    """Excel writes semicolons and decimal commas in half of Europe, and a mark of the byte order everywhere."""
    space = load_space("mcunet")
    path, genes = _table(tmp_path, space)
    pd.read_csv(path, dtype={"r": str}).to_csv(path, index=False, encoding="utf-8-sig", **form)
    read, values = read_table(path, space, "value")
    np.testing.assert_array_equal(read, genes)
    np.testing.assert_array_equal(values, [0, 0.5, 1, 1.5])


def test_spaces_behind_commas_are_no_part_of_names(tmp_path: Path) -> None:
    space = load_space("mcunet")
    path, genes = _table(tmp_path, space)
    path.write_text(path.read_text().replace(",", ", "))
    np.testing.assert_array_equal(read_table(path, space, "value")[0], genes)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"value": [None, 1, np.inf, 2]}, r"row 3: value inf is no finite number; leave the entry empty"),
        ({"value": [None, "70%", 1, 2]}, r"row 2: value '70%' is no finite number; leave the entry empty"),
        ({"d": ["9", None, "2", "2"], "value": [None, 1, 2, 3]}, r"row 2: d '' is no number, nor several"),
        ({"r": [128, 128, 128, 999], "value": 1}, r"row 1: resolution 128 \(resolution\) is not in space"),
        ({"value": None}, r"has no value in the column value; give one for each network that was measured"),
    ],
)
def test_the_row_of_a_mistake_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    space = load_space("ofa_mbv3_w1.0").restrict(resolution=[224])
    path, _ = _table(tmp_path, space, **columns)
    with pytest.raises(UserError, match=rf"table\.csv.* {message}|table\.csv {message}"):
        read_table(path, space, "value")


def _latencies(path: Path, *options: str) -> None:
    """The benchmark of learned latency on a table, one split."""
    with pytest.MonkeyPatch.context() as patch:
        given = ["own", "--table", str(path), "--space", "mcunet", "--repeats", "1", *options]
        patch.setattr(sys, "argv", ["predictors_latency_learned.py", *given])
        predictors_latency_learned.main()


def test_a_benchmark_of_latency_says_what_a_table_lacks(tmp_path: Path) -> None:
    """Networks measured twice count once: they would be on both sides of a split."""
    space = load_space("mcunet")
    path, _ = _table(tmp_path, space)
    with pytest.raises(UserError, match=r"table.csv has no column latency_ms...; name one of value, .* by --columns"):
        _latencies(path)
    with pytest.raises(UserError, match=r"table.csv: value 0 is no time; leave the entry empty"):
        _latencies(path, "--columns", "value")
    frame = pd.read_csv(path, dtype=str)
    pd.concat([frame.assign(value=frame["value"].astype(float) + 1)] * 4).to_csv(path, index=False)
    with pytest.raises(UserError, match=r"--samples 14 must leave at least 2 of 4 networks to test on"):
        _latencies(path, "--columns", "value", "--samples", "14")


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a CSV file \(.*Is a directory"):
        read_table(tmp_path, load_space("mcunet"), "value")


@pytest.mark.parametrize("name", ["r", "image_size"])
def test_a_benchmark_takes_its_resolutions_from_the_table(tmp_path: Path, name: str) -> None:
    """Resolutions that the space lacks, written with a point, one of them missing where nothing was measured."""
    space = load_space("ofa_mbv3_w1.0")
    path, genes = _table(tmp_path, space, r=[226.0, 226.0, 130.0, None], value=[1, 2, 3, None])
    pd.read_csv(path).rename(columns={"r": name}).to_csv(path, index=False)
    known, read, top1 = read_measured(path, "ofa_mbv3_w1.0", "value")
    assert known.resolution == (130, 226)
    np.testing.assert_array_equal(known.values(read, "resolution")[:, 0], [226, 226, 130])
    np.testing.assert_array_equal(read[:, 1:], genes[:3, 1:])
    np.testing.assert_array_equal(top1, [1, 2, 3])

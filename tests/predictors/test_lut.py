"""Look-up tables in once-for-all's format: published latencies, a second way of summing, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ofa.errors import UserError
from ofa.published import read_network
from ofa.space import Arch, Space, load_space
from ofa.table import layer_table
from ofa.units import space_spec
from predictors.lut import BlockTables, LutLatency, network_keys, spec_latency
from tests.predictors.lut_tables import write_tables
from tests.predictors.published import published_nets

EXPANDED = (
    "expanded_conv-input:{0}x{0}x{1}-output:{2}x{2}x{3}-expand:{4}-kernel:{5}-stride:{6}-idskip:{7}-se:{8}-hs:{9}"
)
WIDTHS, STRIDES = (24, 32, 48, 96, 136, 192), (2, 2, 2, 1, 2)  # of once-for-all's MobileNetV3, width 1.2
SE, HS = (0, 1, 0, 1, 1), (0, 0, 1, 1, 1)


@pytest.fixture(scope="module")
def folder(data_folder: Path) -> Path:
    return data_folder / "tables/note10_lut"


@pytest.fixture(scope="module")
def tables(folder: Path) -> BlockTables:
    return BlockTables.load(folder)


@pytest.fixture(scope="module")
def space(tables: BlockTables) -> Space:
    return load_space("ofa_mbv3_w1.2").restrict(resolution=sorted(tables.times))


def by_hand(table: dict[str, Any], arch: Arch) -> float:
    """The sum over one network, block by block, from its values and the YAML file of its resolution alone."""
    side, kernels, expands = (arch.resolution + 1) // 2, iter(arch.kernel), iter(arch.expand)
    keys = [f"Conv-input:{arch.resolution}x{arch.resolution}x3-output:{side}x{side}x24"]
    keys.append(EXPANDED.format(side, 24, side, 24, 24, 3, 1, 1, 0, 0))
    for stage, depth in enumerate(arch.depth):
        for block in range(depth):
            cin, stride = (WIDTHS[stage + 1], 1) if block else (WIDTHS[stage], STRIDES[stage])
            after = (side + stride - 1) // stride
            mid = int(cin * next(expands))
            shape = (side, cin, after, WIDTHS[stage + 1], mid, next(kernels), stride, int(block > 0))
            keys.append(EXPANDED.format(*shape, SE[stage], HS[stage]))
            side = after
    keys += [f"Conv_1-input:{side}x{side}x192-output:{side}x{side}x1152"]
    keys += [f"AvgPool2D-input:{side}x{side}x1152-output:1x1x1152"]
    keys += ["Conv_2-input:1x1x1152-output:1x1x1536", "Logits-input:1x1x1536-output:1000"]
    return float(sum(table[key]["mean"] for key in keys))


def _yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_networks_searched_with_the_tables_have_their_published_latency(data_folder: Path, tables: BlockTables) -> None:
    nets = [net for net in published_nets(data_folder, "ofa_specialized") if net["published"]["device"] == "note10"]
    wide = [net for net in nets if net["head"]["first_conv"][1] == 24]
    assert len(wide) == 2
    for net in wide:
        assert round(spec_latency(read_network(net)[0], tables)) == net["published"]["latency_ms"]


def test_genes_are_priced_as_their_networks_summed_by_hand(folder: Path, space: Space) -> None:
    few = space.restrict(resolution=[160, 196])
    genes = np.concatenate([few.sample(40, np.random.default_rng(0)), few.smallest(), few.largest()])
    files = {resolution: _yaml(folder / f"{resolution}_lookup_table.yaml") for resolution in few.resolution}
    expected = [by_hand(files[arch.resolution], arch) for arch in few.decode(genes)]
    np.testing.assert_allclose(LutLatency(few, folder)(genes), expected, rtol=1e-12)


def test_a_whole_space_and_single_networks_are_priced_alike(folder: Path, space: Space, tables: BlockTables) -> None:
    genes = space.sample(30, np.random.default_rng(1))
    one_by_one = [spec_latency(space_spec(space, arch), tables) for arch in space.decode(genes)]
    np.testing.assert_allclose(LutLatency(space, folder)(genes), one_by_one, rtol=1e-12)


def test_the_price_of_a_key_is_in_the_sum(tmp_path: Path, space: Space) -> None:
    """One percent more for the classifier of one resolution raises its networks by that, and no others."""
    write_tables(tmp_path, space.restrict(resolution=[160, 164]))
    few = space.restrict(resolution=[160, 164])
    genes = few.sample(50, np.random.default_rng(0))
    before = LutLatency(few, tmp_path)(genes)
    table = _yaml(tmp_path / "160_lookup_table.yaml")
    table["Logits-input:1x1x1536-output:1000"]["mean"] += 0.01
    (tmp_path / "160_lookup_table.yaml").write_text(yaml.safe_dump(table))
    np.testing.assert_allclose(LutLatency(few, tmp_path)(genes) - before, 0.01 * (genes[:, 0] == 0), atol=1e-12)


def test_a_table_may_have_plain_numbers_and_say_what_it_is_of(tmp_path: Path, folder: Path, space: Space) -> None:
    for path in folder.glob("*.yaml"):
        content = {key: entry["mean"] for key, entry in yaml.safe_load(path.read_text()).items()}
        (tmp_path / path.name).write_text(yaml.safe_dump({"device": "board"} | content))
    genes = space.sample(5, np.random.default_rng(0))
    np.testing.assert_array_equal(LutLatency(space, tmp_path)(genes), LutLatency(space, folder)(genes))


def test_at_one_millisecond_a_key_latency_counts_the_steps(tmp_path: Path) -> None:
    space = load_space("ofa_mbv3_w1.2").restrict(resolution=[160])
    write_tables(tmp_path, space)
    genes = space.sample(20, np.random.default_rng(0))
    steps = 2 + space.values(genes, "depth").sum(axis=1) + 4  # stem, blocks, last convolutions with pool and classifier
    np.testing.assert_array_equal(LutLatency(space, tmp_path)(genes), steps)


def proxyless_keys(arch: Arch) -> list[str]:
    """What one network of `ofa_proxyless_w1.3` is the sum of, from its values alone."""
    side, kernels, expands = (arch.resolution + 1) // 2, iter(arch.kernel), iter(arch.expand)
    block = "expanded_conv-input:{0}x{0}x{1}-output:{2}x{2}x{3}-expand:{4}-kernel:{5}-stride:{6}-idskip:{7}"
    keys = [f"Conv-input:{arch.resolution}x{arch.resolution}x3-output:{side}x{side}x40"]
    keys.append(block.format(side, 40, side, 24, 1, 3, 1, 0))
    cin = 24
    for cout, stride, depth in zip((32, 56, 104, 128, 248, 416), (2, 2, 2, 1, 2, 1), (*arch.depth, 1), strict=False):
        for i in range(depth):
            step = 1 if i else stride
            after = (side - 1) // step + 1
            keys.append(block.format(side, cin, after, cout, next(expands), next(kernels), step, int(i > 0)))
            side, cin = after, cout
    keys.append(f"Conv_1-input:{side}x{side}x416-output:{side}x{side}x1664")
    return [*keys, f"Logits-input:{side}x{side}x1664-output:1000"]


def test_networks_of_proxylessnas_are_priced_by_their_own_keys(tmp_path: Path) -> None:
    space = load_space("ofa_proxyless_w1.3").restrict(resolution=[160, 164])
    rng, tables = np.random.default_rng(0), {}
    write_tables(tmp_path, space, proxyless=True)
    for resolution in space.resolution:
        path = tmp_path / f"{resolution}_lookup_table.yaml"
        tables[resolution] = {key: {"mean": float(rng.uniform(0.1, 2))} for key in _yaml(path)}
        path.write_text(yaml.safe_dump(tables[resolution]))
        path.rename(tmp_path / f"phone_{resolution}.yaml")
    genes = np.concatenate([space.sample(40, rng), space.smallest(), space.largest()])
    expected = [
        sum(tables[arch.resolution][key]["mean"] for key in proxyless_keys(arch)) for arch in space.decode(genes)
    ]
    np.testing.assert_allclose(LutLatency(space, tmp_path)(genes), expected, rtol=1e-12)
    one = space.restrict(resolution=[164])
    np.testing.assert_array_equal(
        LutLatency(one, tmp_path / "phone_164.yaml")(one.largest()), LutLatency(space, tmp_path)(space.largest())
    )


def test_what_the_tables_lack_is_named_with_the_remedy(tmp_path: Path) -> None:
    space = load_space("ofa_mbv3_w1.2").restrict(resolution=[160])
    write_tables(tmp_path, space)
    with pytest.raises(UserError, match=r"160_lookup_table.yaml lacks the key Conv-input:160x160x3-output:80x80x16; "):
        LutLatency(load_space("ofa_mbv3_w1.0").restrict(resolution=[160]), tmp_path)
    with pytest.raises(
        UserError, match=r"resolution 164 has no table .* not interpolated; keep to the resolutions 160"
    ):
        LutLatency(load_space("ofa_mbv3_w1.2").restrict(resolution=[160, 164]), tmp_path)
    with pytest.raises(UserError, match=r"nowhere is no table and holds none \(\*.yaml\); name a folder"):
        BlockTables.load(tmp_path / "nowhere")
    resnet = load_space("ofa_resnet50")
    with pytest.raises(UserError, match=r"is of no block that once-for-all's look-up tables know, mbconv alone; use"):
        list(network_keys(layer_table(resnet, resnet.largest()), 0))
    table = tmp_path / "164.yaml"
    table.write_text("Conv-input:164x164x3-output:82x82x16: {std: 1}")
    with pytest.raises(UserError, match=r"164.yaml is no look-up table .*each key needs a mean"):
        BlockTables.load(tmp_path)
    table.write_text("Conv-input:164x164x3-output:82x82x16: {mean: true}")
    with pytest.raises(UserError, match=r"164.yaml is no look-up table .*'true'.* needs a mean"):
        BlockTables.load(tmp_path)
    table.write_text("Conv-input:164x164x3-output:82x82x16: {mean: 1}\n" * 2)
    with pytest.raises(UserError, match=r"164.yaml is no look-up table \(Conv-input\S+ is there twice\)"):
        BlockTables.load(tmp_path)
    for mean, shown in ((".nan", "'.nan'"), ("nan", "has nan ms"), ("-1.5", "has -1.5 ms"), (".inf", "'.inf'")):
        table.write_text(f"Conv-input:164x164x3-output:82x82x16: {{mean: {mean}}}")
        with pytest.raises(UserError, match=rf"164.yaml is no look-up table \(.*{shown}\); each key"):
            BlockTables.load(tmp_path)
    table.write_text("Conv: {mean: 1}")
    with pytest.raises(UserError, match=r"164.yaml tells no resolution; .* such as Conv-input:224x224x3"):
        BlockTables.load(tmp_path)
    table.write_text("Conv-input:160x160x3-output:80x80x24: {mean: 1}")
    with pytest.raises(UserError, match=r"164.yaml and .*160_lookup_table.yaml are both of resolution 160; remove one"):
        BlockTables.load(tmp_path)

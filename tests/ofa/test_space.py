"""Genes, architectures and the ways between them hold in every space."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ofa.errors import UserError
from ofa.settings import arch_of
from ofa.space import Arch, Layer, Space, Stage, load_space
from predictors.costs import Macs

NAMES = sorted(f.name.removesuffix(".yaml") for f in (files("conf") / "space").iterdir() if f.name.endswith(".yaml"))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=NAMES, scope="module")
def space(request: pytest.FixtureRequest) -> Space:
    return load_space(request.param)


class TestEverySpace:
    @given(seed=seeds)
    def test_encode_undoes_decode(self, space: Space, seed: int) -> None:
        genes = space.sample(8, np.random.default_rng(seed))
        assert np.array_equal(space.encode(space.decode(genes)), genes)

    @given(seed=seeds)
    def test_equal_networks_have_equal_genes_and_features(self, space: Space, seed: int) -> None:
        rng = np.random.default_rng(seed)
        genes = space.sample(8, rng)
        noise = (rng.random(genes.shape) * space.counts).astype(np.int8)
        other = np.where(space.active(genes), genes, noise).astype(np.int8)
        assert np.array_equal(space.canonical(other), genes)
        assert np.array_equal(space.onehot(other), space.onehot(genes))
        assert [str(a) for a in space.decode(other)] == [str(a) for a in space.decode(genes)]

    @given(seed=seeds)
    def test_one_hot_has_one_entry_for_each_active_gene(self, space: Space, seed: int) -> None:
        genes = space.sample(8, np.random.default_rng(seed))
        assert np.array_equal(space.onehot(genes).sum(1), space.active(genes).sum(1))

    @given(seed=seeds)
    def test_different_networks_have_different_features(self, space: Space, seed: int) -> None:
        genes = np.unique(space.sample(8, np.random.default_rng(seed)), axis=0)
        assert len(np.unique(space.onehot(genes), axis=0)) == len(genes)

    def test_a_space_survives_being_written_as_json(self, space: Space) -> None:
        assert load_space(space.to_dict()) == space

    def test_every_gene_value_is_sampled(self, space: Space) -> None:
        genes = space.sample(4000, np.random.default_rng(0))
        assert np.array_equal(genes.max(0), space.counts - 1)
        assert np.array_equal(genes.min(0), np.zeros(len(space.genes)))

    def test_full_length_lists_mean_the_same_network(self, space: Space) -> None:
        genes = space.sample(1, np.random.default_rng(3))
        arch, used = space.decode(genes)[0], space.active(genes)[0]
        lists = {}
        for name in ("kernel", "expand", "op"):
            values = iter(getattr(arch, name))
            lists[name] = tuple(next(values) if kept else 99 for kept in used[space.columns(name)])
        assert np.array_equal(space.encode([replace(arch, **lists)]), genes)  # type: ignore[arg-type]


def tiny() -> Space:
    stage = Stage(8, 1, (1, 2), (3, 5), (1, 2))
    return Space("tiny", (8, 16), (stage, stage), (), (), width=(0.5, 1.0))


def test_size_counts_every_distinct_network() -> None:
    space = tiny()
    every = np.stack(np.meshgrid(*[np.arange(c) for c in space.counts]), -1).reshape(-1, len(space.genes))
    assert space.size == len(np.unique(space.canonical(every.astype(np.int8)), axis=0))


def test_a_restricted_depth_keeps_squeeze_excite_of_the_blocks_that_stay() -> None:
    space = load_space("mcunet")
    small = space.restrict(depth=[0])
    assert all(len(stage.se) == stage.blocks[-1] for stage in small.stages if isinstance(stage.se, tuple))
    np.testing.assert_array_equal(Macs(small)(small.smallest()), Macs(space)(space.smallest()))


@pytest.mark.parametrize("choices", [{"expand": [1]}, {"expand": 1, "kernel": [3]}, {"depth": 1, "width": [0.5]}])
def test_networks_of_a_restricted_space_cost_what_they_do_in_the_whole_one(choices: dict[str, Any]) -> None:
    stage = Stage(8, 1, (1, 2), (3, 5), (0.5, 1))
    space = replace(tiny(), stages=(stage, replace(stage, channels=24)))
    small = space.restrict(**choices)
    genes = small.sample(20, np.random.default_rng(0))
    np.testing.assert_array_equal(Macs(small)(genes), Macs(space)(space.encode(small.decode(genes))))


def test_restrict_keeps_the_largest_choices() -> None:
    small = tiny().restrict(kernel=1, depth=1, resolution=[8])
    assert small.stages[0].kernel == (5,)
    assert small.stages[0].depth == (2,)
    assert small.resolution == (8,)
    assert small.width == (0.5, 1.0)
    assert tiny().restrict(kernel=np.int64(1), depth=np.int64(1), resolution=[8]) == small


def test_one_value_to_restrict_to_stands_in_a_list() -> None:
    with pytest.raises(UserError, match=r"width=0.5 must be how many choices to keep.*; width=\[0.5\]"):
        tiny().restrict(width=0.5)  # type: ignore[arg-type]
    assert tiny().restrict(width=[0.5]).width == (0.5,)


def test_a_choice_is_not_taken_for_how_many_to_keep() -> None:
    space = load_space("ofa_mbv3_w1.0")
    with pytest.raises(UserError, match=r"resolution=160 keeps the 160 largest of 25 choices; give resolution=\[160\]"):
        space.restrict(resolution=160)
    with pytest.raises(UserError, match=r"resolution=190 keeps the 190 largest of 25 choices; give resolution=\[190\]"):
        load_space("ofa_mbv3_w1.0").restrict(resolution=190)
    with pytest.raises(UserError, match=r"depth=4 keeps the 4 largest of 3 choices; give depth=\[4\]"):
        space.restrict(depth=4)
    assert space.restrict(kernel=3, width=2, op=1) == space, "schedules for larger spaces keep what there is"
    one = space.restrict(resolution=[160])
    assert one.restrict(resolution=160) == one


def test_arrays_make_the_same_architecture() -> None:
    arch = Arch(8, np.array([1, 1]), np.array([3, 3]), np.array([1, 1]), np.array([0.5]))  # type: ignore[arg-type]
    assert arch == ARCH
    assert hash(arch) == hash(ARCH)


def test_a_whole_side_of_a_table_is_one_of_pixels() -> None:
    arch = Arch(np.float64(224.0))
    assert isinstance(arch.resolution, int)
    assert Arch(224.5).resolution == 224.5, "for encode to refuse"


def test_numbers_drawn_with_numpy_can_be_written_as_json() -> None:
    one, three, half = np.int64(1), np.int64(3), np.float32(0.5)
    arch = Arch(np.int64(8), (one, one), [three, three], (one, one), half)  # type: ignore[arg-type]
    assert json.loads(json.dumps(arch.to_dict())) == ARCH.to_dict()
    space = replace(tiny(), resolution=np.array([8, 16]), width=(half, 1.0))
    assert json.loads(json.dumps(space.to_dict())) == json.loads(json.dumps(tiny().to_dict()))


ARCH = Arch(8, (1, 1), (3, 3), (1, 1), (0.5,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": (4, 3)}, "kernel 4 .* choose from"),
        ({"depth": (3, 1)}, "depth 3 .* choose from"),
        ({"resolution": 9}, "resolution 9 .* choose from"),
        ({"kernel": (3, 3, 3)}, "kernel has 3 entries"),
        ({"depth": (1,)}, "depth"),
    ],
)
def test_a_value_outside_the_space_is_named_with_the_choices(change: dict[str, object], words: str) -> None:
    tiny().encode([ARCH])
    with pytest.raises(UserError, match=words):
        tiny().encode([replace(ARCH, **change)])  # type: ignore[arg-type]


def test_a_list_of_what_cannot_be_chosen_is_left_out_or_what_is_fixed() -> None:
    space = load_space("ofa_resnet50")
    arch = Arch(224, (0,) * 5, expand=(0.2,) * 18)
    assert np.array_equal(space.encode([replace(arch, kernel=(3,) * 18)]), space.encode([arch]))
    with pytest.raises(UserError, match=r"kernel \(5, 5\) is given, but ofa_resnet50 has no choice of it; leave"):
        space.encode([replace(arch, kernel=(5, 5))])
    with pytest.raises(UserError, match=r"op \(1,\) is given, but ofa_resnet50 has no choice of it; leave op out"):
        space.encode([replace(arch, op=(1,))])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "choose from .* or give a Path of another file"),
        ({"name": "x", "colour": 1}, "colour"),
        ({"name": "x"}, "lacks"),
        (None, "space None is no record"),
        ({"_target_": "mine.Space", "name": "x"}, "_target_=mine.Space cannot be made; leave _target_ out"),
        (Path("nothing"), "nothing cannot be read as a space .*No such file"),
    ],
)
def test_a_wrong_space_is_explained(name: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_space(name)  # type: ignore[arg-type]


def test_a_space_is_read_from_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"_target_": "ofa.space.Space"} | load_space("digits_mbv3").to_dict()))
    assert load_space(path) == load_space("digits_mbv3")
    path.write_text(path.read_text().replace("bn_eps: 1.0e-05", "bn_eps: 1e-3"))
    assert load_space(path).bn_eps == 0.001, "as Hydra reads it"
    path.write_text("name: [")
    with pytest.raises(UserError, match=r"mine.yaml cannot be read as a space \(while parsing"):
        load_space(path)


@pytest.mark.parametrize("genes", [np.zeros((1, 3), np.int8), np.full((1, 12), 5, np.int8)])
def test_wrong_genes_are_explained(genes: np.ndarray) -> None:
    with pytest.raises(UserError):
        tiny().validate(genes)


def test_genes_that_are_no_array_are_refused() -> None:
    genes = tiny().smallest().tolist()
    for take in (tiny().validate, tiny().decode):
        with pytest.raises(UserError, match=r"genes are a list; give an array, np.array\(genes, dtype=np.int8\)"):
            take(genes)


@pytest.mark.parametrize("archs", [ARCH, [ARCH.to_dict()], None])
def test_what_is_no_list_of_architectures_is_refused(archs: object) -> None:
    with pytest.raises(UserError, match=r"is no list of architectures; give \[Arch"):
        tiny().encode(archs)  # type: ignore[arg-type]


def test_genes_that_are_no_whole_numbers_are_refused() -> None:
    genes = tiny().smallest() + 0.5
    with pytest.raises(UserError, match="genes are of float64; give choices as whole numbers"):
        tiny().validate(genes)
    with pytest.raises(UserError, match="genes are of float64"):
        tiny().decode(genes)


def test_unknown_dimension_is_an_error() -> None:
    with pytest.raises(UserError, match="choose from"):
        tiny().restrict(colour=1)
    with pytest.raises(UserError, match="leaves none"):
        replace(tiny(), stages=(tiny().stages[0], replace(tiny().stages[1], kernel=(5, 7)))).restrict(kernel=[3])


@pytest.mark.parametrize(
    ("name", "values", "strange"),
    [("kernel", [3, 9], 9), ("kernel", [9], 9), ("resolution", [8, 9], 9), ("width", [0.6, 1], 0.6)],
)
def test_a_value_to_restrict_to_that_no_stage_has_is_named(name: str, values: list[float], strange: float) -> None:
    with pytest.raises(UserError, match=rf"{name} \[{strange}\] is not in space tiny; choose from \["):
        tiny().restrict(**{name: values})


OPS: dict[str, Any] = {"kernel": 3, "expand": 3, "op": (0,), "ops": (Layer("skip"),)}


@pytest.mark.parametrize("kind", ["mbconv", "bottleneck"])
def test_a_block_without_batch_norm_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"layer {kind} always has batch norm; leave bn out, or give kind: conv"):
        Layer(kind, 8, bn=False)


@pytest.mark.parametrize("kind", ["conv", "bottleneck", "linear", "skip"])
def test_squeeze_excite_where_there_is_none_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"layer {kind} has no squeeze-excite; leave se out, or give kind: mbconv"):
        Layer(kind, 8, se=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": (0, 1), "stride": 2}, "without a block"),
        ({"depth": (0, 1), "channels": 16}, "stage 1 may keep no block, but makes 16 channels of 8"),
        ({"blocks": (1,)}, "blocks .* must say for each depth"),
        ({"kernel": (3, 4)}, "must all be odd"),
        ({"block": "dense"}, "block 'dense' is not known; choose from conv, mbconv, bottleneck"),
        ({"block": "conv"}, "kernel .* cannot be chosen in a stage of conv"),
        ({"se": (True,)}, "se .* has 1 entries; give one for each of 2 blocks"),
        ({"kernel": 3, "expand": 3, "op": (0, 2), "ops": (Layer("skip"),)}, "op .* must be positions in ops, 0 to 0"),
        ({"block": "bottleneck", "kernel": 3, "se": True}, "a stage of bottleneck has no squeeze-excite; leave its se"),
        (OPS | {"se": (False, True)}, "a stage of ops has no squeeze-excite"),
        (OPS | {"ops": (Layer("maxpool"),)}, "kind='maxpool'.* cannot be chosen; an operation is a block or skip"),
        (OPS | {"ops": (Layer("conv", channels=9),)}, "channels=9.* cannot be chosen"),
        (OPS | {"ops": (Layer("conv", bn=False),)}, "bn=False.* cannot be chosen"),
        ({"act": "swish"}, "activation 'swish' of a stage is not known; choose from none, relu, relu6, h_swish"),
        ({"block": "conv", "kernel": 3, "expand": 4}, "a stage of conv takes no expand; leave expand=4 out"),
        (OPS | {"expand": 4}, "a stage of ops, each of which has its own, takes no expand; leave expand=4 out"),
        (OPS | {"expand": 1, "act": "relu6"}, "a stage of ops, .*, takes no act; leave act=relu6 out"),
    ],
)
def test_a_stage_that_cannot_be_built_is_explained(change: dict[str, Any], words: str) -> None:
    space = tiny()
    with pytest.raises(UserError, match=words):
        replace(space, stages=(space.stages[0], replace(space.stages[1], **({"blocks": ()} | change))))


@pytest.mark.parametrize("value", [16.5, math.nan, "big", True, [16, 20.5], [16, "big"], None])
def test_a_resolution_that_is_no_whole_number_is_refused(value: object) -> None:
    space, words = load_space("digits_mbv3"), r"Space has resolution=.*; give a whole number or a list of them"
    with pytest.raises(UserError, match=words):
        load_space(space.to_dict() | {"resolution": value})
    with pytest.raises(UserError, match=words):
        replace(space, resolution=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, "two", True, ["two"], [1, 2.5]])
@pytest.mark.parametrize("name", ["depth", "kernel", "blocks", "op"])
def test_a_choice_of_a_stage_that_is_no_whole_number_is_refused(name: str, value: object) -> None:
    values = load_space("digits_mbv3").to_dict()
    first, *others = values["stages"]
    with pytest.raises(UserError, match=rf"Stage has {name}=.*; give a whole number or a list of them"):
        load_space(values | {"stages": [first | {name: value}, *others]})


def test_one_operation_may_stand_without_a_list() -> None:
    stage = Stage(8, depth=2, op=1, ops=(Layer("skip"), Layer("conv", kernel=3)))  # type: ignore[arg-type]
    assert stage == replace(stage, op=(1,))
    assert hash(stage) == hash(replace(stage, op=(1,)))


def changed(part: str, change: dict[str, Any]) -> dict[str, Any]:
    """The space digits_mbv3 as a dict with a change: of the space itself, or of the first record of a part."""
    values = load_space("digits_mbv3").to_dict()
    if part == "space":
        return values | change
    first, *others = values[part]
    return values | {part: [first | change, *others]}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("space", {"resolution": [0]}, "Space has resolution=(0,); give 1 or more"),
        ("space", {"resolution": -8}, "Space has resolution=(-8,); give 1 or more"),
        ("space", {"classes": 0}, "Space has classes=0; give 1 or more"),
        ("space", {"in_channels": -1}, "Space has in_channels=-1; give 1 or more"),
        ("space", {"width": 0}, "Space has width=(0,); give a number above 0"),
        ("space", {"width": [-0.5, 1]}, "Space has width=(-0.5, 1); give a number above 0"),
        ("space", {"width": float("nan")}, "Space has width=(nan,); give a number above 0"),
        ("space", {"bn_eps": 0}, "Space has bn_eps=0; give a number above 0"),
        ("stem", {"stride": 0}, "Layer has stride=0; give 1 or more"),
        ("stem", {"channels": -3}, "Layer has channels=-3; give 0 or more"),
        ("stem", {"kernel": -3}, "Layer has kernel=-3; give 1 or more"),
        ("stem", {"kernel": 4}, "kernel 4 must be odd"),
        ("stem", {"expand": 0}, "Layer has expand=0; give a number above 0"),
        ("stem", {"width": -1}, "Layer has width=-1; give 0 or more"),
        ("stages", {"stride": 0}, "Stage has stride=0; give 1 or more"),
        ("stages", {"channels": -3}, "Stage has channels=-3; give 1 or more"),
        ("stages", {"kernel": 0}, "Stage has kernel=0; give 1 or more"),
        ("stages", {"kernel": [-1, 3]}, "Stage has kernel=(-1, 3); give 1 or more"),
        ("stages", {"expand": [0, 2]}, "Stage has expand=(0, 2); give a number above 0"),
        ("stages", {"expand": float("inf")}, "Stage has expand=inf; give a number above 0"),
        ("stages", {"depth": [-1]}, "Stage has depth=(-1,); give 0 or more"),
        ("stages", {"depth": [0, 1], "blocks": [-1, 1]}, "Stage has blocks=(-1, 1); give 0 or more"),
        ("stages", {"width": -1}, "Stage has width=-1; give 0 or more"),
    ],
)
def test_a_number_below_its_least_is_refused(part: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_space(changed(part, change))


@pytest.mark.parametrize("kinds", [["linear"], ["linear", "pool"], ["maxpool", "linear"]])
def test_a_linear_layer_of_a_whole_map_is_refused(kinds: list[str]) -> None:
    with pytest.raises(UserError, match=r"head \[.* has no pool in front of its linear layer; give {kind: pool}"):
        load_space(changed("space", {"head": [{"kind": kind} for kind in kinds]}))


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        ({"kind": "linear", "kernel": 3}, "kernel=3"),
        ({"kind": "linear", "act": "relu"}, "act=relu"),
        ({"kind": "linear", "channels": 10}, "channels=10"),
        ({"kind": "pool", "act": "relu"}, "act=relu"),
        ({"kind": "pool", "stride": 2}, "stride=2"),
        ({"kind": "pool", "width": 1}, "width=1"),
        ({"kind": "maxpool", "kernel": 3, "stride": 2, "channels": 24}, "channels=24"),
        ({"kind": "conv", "channels": 8, "expand": 3}, "expand=3"),
        ({"kind": "skip", "act": "relu"}, "act=relu"),
    ],
)
def test_a_field_that_a_kind_of_layer_has_no_use_for_is_refused(layer: dict[str, Any], field: str) -> None:
    """A linear layer of kernel 3 had been counted nine times, a pool of other channels had given a wrong network."""
    name = field.split("=")[0]
    with pytest.raises(UserError, match=f"layer {layer['kind']} takes no {name}; leave {field} out"):
        load_space(changed("space", {"head": [layer]}))
    del layer[name]
    Layer(**layer)


@pytest.mark.parametrize(
    ("part", "kinds", "words"),
    [
        ("stem", ["skip"], "layer skip does nothing where it cannot be chosen; leave it out, or give it in ops"),
        ("stem", ["linear"], "a linear layer is the classifier; give one, as the last layer of the head"),
        ("head", ["pool", "linear", "pool"], "a linear layer is the classifier; give one, as the last layer"),
        ("head", ["pool", "linear", "linear"], "a linear layer is the classifier; give one, as the last layer"),
    ],
)
def test_a_layer_in_the_wrong_place_is_refused(part: str, kinds: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_space(changed("space", {part: [{"kind": kind} for kind in kinds]}))


def test_a_width_multiplier_that_scales_nothing_is_refused() -> None:
    """Its gene would tell equal networks apart."""
    values = load_space("digits_mbv3").to_dict()
    gap = [stage | {"width": 2 * s} for s, stage in enumerate(values["stages"])]
    with pytest.raises(UserError, match="width multiplier 1 scales nothing; number them 0, 1, 2"):
        load_space(values | {"stages": gap})
    one = load_space(values | {"stages": gap, "width": [1.0]})
    assert one.size, "with one choice there is nothing to tell"
    whole = load_space("digits_mbv3")
    np.testing.assert_array_equal(Macs(one)(one.largest()), Macs(whole)(whole.largest()))


@pytest.mark.parametrize("part", ["stem", "head"])
def test_a_fixed_convolution_without_channels_is_refused(part: str) -> None:
    with pytest.raises(UserError, match="layer conv has no channels; give channels=1 or more"):
        load_space(changed("space", {part: [{"kind": "conv", "kernel": 3}]}))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("space", {"stages": None}, "stages=None must be a list of records; give [{name: value, ...}, ...]"),
        ("space", {"stem": 3}, "stem=3 must be a list of records"),
        ("space", {"head": {"kind": "pool"}}, "head={'kind': 'pool'} must be a list of records"),
        ("space", {"stages": "none"}, "stages=none must be a list of records"),
        ("stages", {"before": None}, "before=None must be a list of records"),
        ("stages", {"ops": 3}, "ops=3 must be a list of records"),
        ("stages", {"block": ["conv"]}, "block ['conv'] is not known; choose from conv"),
    ],
)
def test_a_part_that_is_no_list_of_records_is_named(part: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load_space(changed(part, change))


def test_fields_that_a_record_lacks_are_named() -> None:
    values = changed("space", {"stages": [{"stride": 2}]})
    with pytest.raises(UserError, match=r"a stage record lacks channels; give channels: \.\.\."):
        load_space(values)


def test_a_stage_of_bottlenecks_that_changes_nothing_may_be_left_out() -> None:
    stage = {"channels": 32, "depth": [0, 1], "block": "bottleneck", "kernel": 3, "expand": [0.25, 0.5]}
    head = [{"kind": "pool"}, {"kind": "linear"}]
    stem = [{"kind": "conv", "channels": 32, "kernel": 3, "stride": 2, "act": "relu"}]
    space = load_space({"name": "x", "resolution": [32], "width": [1.0], "stem": stem, "stages": [stage], "head": head})
    assert space.size == 3
    assert len(set(Macs(space)(space.sample(30, np.random.default_rng(0))).tolist())) == 3


@pytest.mark.parametrize("genes", [np.zeros(3, np.int8), np.zeros((2, 3)), [[0, 1]], 0.5, 99])
def test_networks_are_not_made_canonical_of_what_is_none(genes: Any) -> None:
    space = load_space("digits_mbv3")
    genes = np.full((1, len(space.genes)), genes) if isinstance(genes, float | int) else genes
    for use in (space.canonical, space.onehot):
        with pytest.raises(UserError, match="gene"):
            use(genes)


def test_settings_are_read_as_arrays_of_any_precision() -> None:
    space = load_space("ofa_resnet50")
    archs = [
        Arch(224, (2,) * 5, expand=expand, width=width)  # type: ignore[arg-type]
        for expand, width in (
            ((0.35,) * 18, (0.65,) * 6),
            (np.full(18, 0.35, np.float32), np.full(6, 0.65, np.float32)),
            (np.full(18, 0.35), np.full(6, 0.65, np.float64)),
        )
    ]
    genes = space.encode(arch for arch in archs)
    assert (genes == genes[0]).all()
    settings = {"d": [2] * 5, "e": np.full(18, 0.35, np.float32)}
    for width in ([0, 1, 2, 0, 1, 2], np.array([0, 1, 2, 0, 1, 2], np.float64), [0.65, 0.8, 1, 0.65, 0.8, 1]):
        assert arch_of(space, settings | {"w": width}).width == (0.65, 0.8, 1.0, 0.65, 0.8, 1.0)
    with pytest.raises(UserError, match=r"width 0\.65 of \[0\.65, 2.*\] is no position .* give positions alone, or"):
        arch_of(space, settings | {"w": [0.65, 2, 0, 0, 0, 0]})


def test_the_names_of_once_for_all_stand_for_the_same_spaces() -> None:
    for name in ("ofa_mbv3_d234_e346_k357_w1.2", "ofa_proxyless_d234_e346_k357_w1.3"):
        assert load_space(name) == load_space(name.replace("_d234_e346_k357", ""))
    with pytest.raises(UserError, match=r"space 'ofa_mbv3_d234_e346_k357' is not known; choose from .*ofa_mbv3_w1\.0"):
        load_space("ofa_mbv3_d234_e346_k357")

"""Peak memory against published figures and against a walk over the network written a second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ofa.errors import UserError
from ofa.published import read_network
from ofa.space import load_space
from ofa.spec import NetSpec, Unit
from ofa.table import layer_table, spec_table
from ofa.units import space_spec
from predictors import PeakMemory
from predictors.memory import MODELS, peak_memory
from tests.predictors.published import published_nets, read_genes

FAMILIES = (
    *("digits_mbv3", "cifar_mbv3", "cifar_conv", "ofa_mbv3_w1.0", "ofa_mbv3_w1.2"),
    *("ofa_proxyless_w1.3", "ofa_resnet50", "mcunet", "nas_bench_macro", "cifar_pool"),
)


def mcunet_peak(spec: NetSpec) -> int:
    """In + out + held over the convolutions and max pools of a network, walked unit by unit."""
    side, peak = spec.resolution, 0
    for unit in spec.units:
        after = (side - 1) // unit.stride + 1
        if unit.kind in ("conv", "maxpool"):
            peak = max(peak, unit.cin * side**2 + unit.cout * after**2)
        elif unit.kind == "mbconv":
            held = unit.cin * side**2 if unit.shortcut else 0
            expand = (unit.cin + unit.mid) * side**2 if unit.expand else 0
            depthwise = unit.mid * (side**2 + after**2) + (held if unit.expand else 0)
            peak = max(peak, expand, depthwise, (unit.mid + unit.cout) * after**2 + held)
        side = 1 if unit.kind == "pool" else after
    return peak


def test_published_mcunet_peaks_agree_within_a_kilobyte(data_folder: Path) -> None:
    for net in published_nets(data_folder, "mcunet"):
        peak = peak_memory(spec_table(read_network(net)[0]), bits=net.get("bits", 8))
        assert abs(int(peak[0]) / 1024 - net["published"]["peak_act_kB"]) < 1, net["name"]


def test_every_row_of_the_published_peak_table_is_reproduced(data_folder: Path) -> None:
    frame = pd.read_csv(data_folder / "tables/ofa_mbv3_w1.0_imagenet_peak.csv")
    space = load_space("ofa_mbv3_w1.0")
    assert len(frame) == 1000
    predicted = PeakMemory(space, "elements_plus_weights")(read_genes(space, frame))
    np.testing.assert_array_equal(predicted, frame.peak_elems)


@pytest.mark.parametrize(
    "name", ["digits_mbv3", "cifar_mbv3", "cifar_conv", "cifar_pool", "ofa_mbv3_w1.0", "ofa_proxyless_w1.3", "mcunet"]
)
def test_the_default_model_equals_a_walk_over_the_network(name: str) -> None:
    space = load_space(name)
    genes = space.sample(100, np.random.default_rng(1))
    walked = [mcunet_peak(space_spec(space, arch)) for arch in space.decode(genes)]
    np.testing.assert_array_equal(PeakMemory(space)(genes), walked)


@pytest.mark.parametrize("name", ["ofa_mbv3_w1.0", "ofa_resnet50", "mcunet", "nas_bench_macro"])
@pytest.mark.parametrize("model", MODELS)
def test_look_up_equals_the_largest_layer(model: str, name: str) -> None:
    space = load_space(name)
    genes = space.sample(300, np.random.default_rng(2))
    expected = peak_memory(layer_table(space, genes), model=model)
    np.testing.assert_array_equal(PeakMemory(space, model)(genes), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_liveness_equals_what_is_recorded_on_the_running_network(name: str) -> None:
    import torch

    from ofa.liveness import peak_elements
    from ofa.static import build

    space = load_space(name)
    genes = np.concatenate([space.smallest(), space.sample(3, np.random.default_rng(5))])
    recorded = [
        peak_elements(build(space, arch), torch.randn(1, space.in_channels, arch.resolution, arch.resolution))
        for arch in space.decode(genes)
    ]
    np.testing.assert_array_equal(PeakMemory(space, "liveness")(genes), recorded)


@pytest.mark.parametrize("stride", [1, 2])
def test_liveness_counts_the_indices_of_a_maximum_pool(stride: int) -> None:
    import torch

    from ofa.liveness import peak_elements
    from ofa.static import build_spec

    units = (Unit("maxpool", 8, 8, 3, stride), Unit("conv", 8, 8, stride=2), Unit("pool", 8, 8), Unit("linear", 8, 5))
    spec = NetSpec(units, 15, 8, 5)
    recorded = peak_elements(build_spec(spec), torch.randn(1, 8, 15, 15))
    assert peak_memory(spec_table(spec), model="liveness")[0] == recorded


@pytest.mark.parametrize("name", FAMILIES)
def test_liveness_counts_at_least_what_the_other_models_do(name: str) -> None:
    space = load_space(name)
    genes = space.sample(100, np.random.default_rng(6))
    assert (PeakMemory(space, "liveness")(genes) >= PeakMemory(space, "mcunet")(genes)).all()


def test_depthwise_in_place_never_needs_more() -> None:
    space = load_space("cifar_mbv3")
    genes = space.sample(300, np.random.default_rng(3))
    inplace, plain = PeakMemory(space, "inplace")(genes), PeakMemory(space)(genes)
    assert (inplace <= plain).all()
    assert (inplace < plain).any()


def test_bytes_follow_the_width_of_an_element() -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(20, np.random.default_rng(4))
    elements = PeakMemory(space)(genes)
    np.testing.assert_array_equal(PeakMemory(space, bits=32)(genes), 4 * elements)
    np.testing.assert_array_equal(PeakMemory(space, bits=4)(genes), (elements + 1) // 2)


@pytest.mark.parametrize("bits", [0, -8, 65, 4.5])
def test_a_width_that_no_element_has_is_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"bits {bits} must be 1 to 64"):
        PeakMemory(load_space("digits_mbv3"), bits=bits)


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="'tflite' is not known; choose from mcunet, inplace, elements_plus_weights, liveness"
    ):
        PeakMemory(load_space("digits_mbv3"), "tflite")

"""Energy per inference against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ofa.errors import UserError
from ofa.space import load_space
from ofa.spec import NetSpec, Unit
from ofa.table import spec_table
from ofa.units import space_spec
from predictors.energy import Energy, _elements, spec_energy

CONV = Unit("conv", 3, 8, 3, 2, act="relu")  # 8x8x3 to 4x4x8
BLOCK = Unit("mbconv", 8, 8, 3, 1, mid=16, act="relu", expand=True, shortcut=True)  # 4x4x8 to 4x4x8
NET = NetSpec((CONV, BLOCK, Unit("pool", 8, 8), Unit("linear", 8, 10, bn=False)), 8, 3, 10)

MACS = 16 * 9 * 3 * 8 + 16 * (8 * 16 + 9 * 16 + 16 * 8) + 8 * 10
PARAMS = (9 * 3 * 8 + 16) + (8 * 16 + 32) + (9 * 16 + 32) + (16 * 8 + 16) + (8 * 10 + 10)  # with batch norm, bias
MOVED = (64 * 3 + 16 * 8) + 16 * ((8 + 16) + (16 + 16) + (16 + 8)) + 16 * 8 + (8 + 10)  # the shortcut once more


@pytest.mark.parametrize(("bits", "mac"), [(8, 0.3), (16, 1.5), (32, 4.6)])
def test_energy_is_the_sum_written_out_by_hand(bits: int, mac: float) -> None:
    picojoules = mac * MACS + bits / 8 * (12.5 * MOVED + 162.5 * PARAMS)
    assert spec_energy(NET, bits=bits) == pytest.approx(picojoules / 1e6, rel=1e-12)


def test_where_the_numbers_lie_decides_what_they_cost() -> None:
    def energy(activations: str, weights: str) -> float:
        return spec_energy(NET, activations=activations, weights=weights)

    assert energy("dram", "sram") == pytest.approx((0.3 * MACS + 162.5 * MOVED + 12.5 * PARAMS) / 1e6, rel=1e-12)
    assert energy("sram", "sram") < energy("sram", "dram") < energy("dram", "dram")


def test_the_shortcut_of_a_convolution_is_read_once_more_too() -> None:
    for kind, layers in (("conv", 1), ("mbconv", 3)):
        with_it = Unit(kind, 8, 8, 3, 1, mid=16 * (layers > 1), act="relu", expand=layers > 1, shortcut=True)
        rest = Unit("pool", 8, 8), Unit("linear", 8, 10, bn=False)
        specs = (NetSpec((unit, *rest), 4, 8, 10) for unit in (with_it, replace(with_it, shortcut=False)))
        more, fewer = (_elements(spec_table(spec)).sum() for spec in specs)
        assert more - fewer == 8 * 4 * 4


def test_without_its_shortcut_a_block_reads_less() -> None:
    plain = Unit("mbconv", 8, 8, 3, 1, mid=16, act="relu", expand=True)
    less = NetSpec((CONV, plain, *NET.units[2:]), 8, 3, 10)
    assert spec_energy(NET) - spec_energy(less) == pytest.approx(12.5 * 16 * 8 / 1e6)


def test_genes_cost_what_their_networks_cost() -> None:
    space = load_space("digits_mbv3")
    genes = space.sample(40, np.random.default_rng(0))
    specs = [space_spec(space, arch) for arch in space.decode(genes)]
    np.testing.assert_allclose(Energy(space, 16)(genes), [spec_energy(spec, bits=16) for spec in specs], rtol=1e-12)


def test_unknown_widths_and_memories_are_refused() -> None:
    space = load_space("digits_mbv3")
    with pytest.raises(UserError, match="bits 4 has no published energy; choose from 8, 16, 32"):
        Energy(space, 4)
    with pytest.raises(UserError, match=r"weights=flash is no memory .*; choose from sram, dram"):
        Energy(space, weights="flash")

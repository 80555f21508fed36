"""Packed networks: exact, as small as counted by hand, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ofa.compress.bits import LANE, canonical_codes, code_lengths, decode, encode, stream_bytes
from ofa.compress.codings import relative_indices
from ofa.compress.packed import load_packed, pack, packed_sizes, save_packed, size_table, unpack
from ofa.errors import UserError
from tests.ofa.nets import random_net


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    pairs = zip(a.values(), b.values(), strict=True)
    return list(a) == list(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bytes(x.contiguous().numpy().data) == bytes(y.numpy().data)
        for x, y in pairs
    )


def coding_of(tensors: dict[str, Tensor], folder: Path, name: str = "weight") -> tuple[str, int]:
    save_packed(folder / "net.ofap", tensors)
    assert same(tensors, load_packed(folder / "net.ofap")[0])
    row = next(row for row in packed_sizes(folder / "net.ofap") if row.name == name)
    return row.coding, row.size


@pytest.mark.parametrize("scale", [0.5, 1e-30])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_values_that_no_whole_number_gives_are_kept_beside_a_scale(value: float, scale: float) -> None:
    tensors = {"weight": torch.full((40,), value), "weight_scale": torch.tensor([scale])}
    assert same(tensors, unpack(pack(tensors))[0])
    assert same(
        tensors | {"weight": torch.tensor([value])}, unpack(pack(tensors | {"weight": torch.tensor([value])}))[0]
    )


# -- streams -----------------------------------------------------------------------------------------------------------


def test_code_lengths_are_those_of_the_textbook_example() -> None:
    counts = np.array([45, 13, 12, 16, 9, 5])  # Cormen et al., Introduction to Algorithms, fig. 16.3: 224 bits
    lengths = code_lengths(counts)
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    assert counts @ lengths == 224


def test_canonical_codes_are_those_of_rfc_1951() -> None:
    lengths = np.array([3, 3, 3, 3, 3, 2, 4, 4])  # sec. 3.2.2, letters A to H
    assert canonical_codes(lengths).tolist() == [0b010, 0b011, 0b100, 0b101, 0b110, 0b00, 0b1110, 0b1111]


def test_a_code_is_never_longer_than_fifteen_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci))
    assert lengths.max() <= 15
    assert (0.5**lengths).sum() <= 1, "Kraft's inequality: the codes can be told apart"


@given(st.integers(1, 300), st.integers(0, 3 * LANE), st.floats(0.01, 3), st.integers(0, 99))
def test_a_stream_gives_back_its_symbols(number: int, n: int, spread: float, seed: int) -> None:
    drawn = np.random.default_rng(seed).exponential(spread * number / 4, n)
    symbols = np.minimum(drawn, number - 1).astype(np.int64)
    stream = encode(symbols, number)
    np.testing.assert_array_equal(decode(stream), symbols)
    counts = np.bincount(symbols, minlength=number)
    assert len(stream.data) + (len(stream.lengths) + 1) // 2 == min(stream_bytes(counts))


def test_huffman_comes_within_a_tenth_of_the_entropy() -> None:
    symbols = np.random.default_rng(0).binomial(15, 0.3, 100_000)
    share = np.bincount(symbols) / len(symbols)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(symbols) / 8
    assert entropy < len(encode(symbols, 16).data) < 1.1 * entropy


def test_relative_indices_are_those_of_deep_compression() -> None:
    # Han et al. 2016, fig. 2: nonzeros at 1, 4, 15 with 3 bits: differences 1, 3, 8 (a filler zero) and 3
    gaps, entries = relative_indices(np.array([1, 4, 15]), 3)
    assert gaps.tolist() == [1, 2, 7, 2]
    assert entries.tolist() == [1, 4, -1, 15]


# -- codings -----------------------------------------------------------------------------------------------------------


def test_random_weights_stay_dense(tmp_path: Path) -> None:
    assert coding_of({"weight": torch.randn(50, 20)}, tmp_path) == ("dense", 4000)


def test_values_of_half_precision_take_two_bytes_and_one_that_is_not_takes_all_four(tmp_path: Path) -> None:
    weight = torch.randn(50, 30).half().float()
    assert coding_of({"weight": weight}, tmp_path) == ("half", 3000)
    weight[7, 7] = 1 + 2**-11  # half precision has ten bits behind the point
    assert coding_of({"weight": weight}, tmp_path) == ("dense", 6000)


def test_four_equally_frequent_values_take_two_bits_each_and_their_table(tmp_path: Path) -> None:
    weight = torch.tensor([-1.5, 0.25, 0.5, 3.0]).repeat(1000).reshape(40, 100)
    assert coding_of({"weight": weight}, tmp_path) == ("codebook", 4 * 4 + 4000 * 2 // 8)


def test_skewed_values_are_in_huffman_codes(tmp_path: Path) -> None:
    weight = torch.tensor([1.0] * 1400 + [2.0] * 300 + [3.0] * 200 + [4.0] * 100)
    bits = 1400 * 1 + 300 * 2 + 200 * 3 + 100 * 3
    assert coding_of({"weight": weight}, tmp_path) == ("codebook huffman", 16 + 2 + 2 + -(-bits // 8))


def test_few_nonzeros_are_stored_with_relative_indices(tmp_path: Path) -> None:
    weight = torch.zeros(6400)
    weight[3::4] = torch.randn(1600)  # every gap is 3 zeros: two bits each, Huffman's one bit is shorter
    coding, size = coding_of({"weight": weight}, tmp_path)
    assert coding == "sparse dense huffman" and size == 1600 * 4 + 1600 // 8 + 2 + 2


def test_pruned_codebooks_are_sparse_with_indices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randint(1, 16, (200, 100)).float() * (torch.rand(200, 100) < 0.05)
    coding, size = coding_of({"weight": weight}, tmp_path)
    assert coding.startswith("sparse codebook")
    assert size < 1000 * (4 + 6) / 8 + 15 * 4 + 50


@pytest.mark.parametrize("channels", [1, 30])
def test_multiples_of_a_scale_are_whole_numbers(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scale = torch.rand(channels) + 0.01
    weight = scale.view(-1, 1, 1) * torch.randint(-127, 128, (30, 20, 9))
    plain = {"weight": weight}
    coding, size = coding_of(plain | {"weight_scale": scale}, tmp_path)
    assert coding == "scaled" and size == 30 * 20 * 9
    weight[3, 3, 3] *= 1 + 1e-6  # one value off: no multiple any more
    assert coding_of({"weight": weight, "weight_scale": scale}, tmp_path)[0] != "scaled"


def test_a_whole_network_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = dict(random_net().state_dict())
    size = save_packed(tmp_path / "net.ofap", state, {"about": [1, "a"]})
    tensors, metadata = load_packed(tmp_path / "net.ofap")
    assert same(state, tensors) and metadata == {"about": [1, "a"]}
    sizes = packed_sizes(tmp_path / "net.ofap")
    assert sum(row.size for row in sizes) == size == (tmp_path / "net.ofap").stat().st_size
    assert f"{size:,}" in size_table(sizes).splitlines()[-1]


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0, 2)])
def test_empty_and_single_values_come_back(shape: tuple[int, ...]) -> None:
    state = {
        "weight": torch.ones(shape),
        "count": torch.ones(shape, dtype=torch.int64),
        "half": torch.ones(shape).half(),
    }
    assert same(state, unpack(pack(state))[0])


def test_special_values_come_back_and_negative_zero_is_zero() -> None:
    weight = torch.tensor([float("inf"), float("nan"), -0.0, 0.0, 1e-45])
    back = unpack(pack({"weight": weight}))[0]["weight"]
    assert torch.equal(back.nan_to_num(7), weight.nan_to_num(7))
    assert not torch.signbit(back[2])


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_cut_and_every_changed_byte_is_noticed() -> None:
    weight = torch.randint(0, 3, (50, 7)).float()
    content = pack({"weight": weight, "bias": torch.randn(50)})
    for length in range(len(content)):
        with pytest.raises(UserError):
            unpack(content[:length])
    for at in range(len(content)):
        with pytest.raises(UserError):
            unpack(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_damage_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "net.ofap"
    with pytest.raises(UserError, match=r"net.ofap does not exist"):
        load_packed(path)
    path.write_bytes(pack({"weight": torch.ones(9)})[:-1])
    with pytest.raises(UserError, match=r"net.ofap is damaged or cut short .* write it again"):
        load_packed(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="not a packed network"):
        load_packed(path)
    path.write_bytes(b"OFAP\x09" + bytes(20))
    with pytest.raises(UserError, match="version 9"):
        load_packed(path)

"""Limits as people write them."""

from __future__ import annotations

import pytest

from ofa.errors import UserError
from search.limits import known_name, parse_limit, parse_limits, show

NAMES = ("macs", "peak_memory_bytes", "weight_bytes", "latency_ms", "energy_uj")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("macs", 6e6, 6_000_000),
        ("macs", "60M", 60_000_000),
        ("macs", "1.5 G", 1_500_000_000),
        ("macs", "6e6", 6_000_000),
        ("peak_memory_bytes", "250KB", 250_000),
        ("peak_memory_bytes", "250 kB", 250_000),
        ("peak_memory_bytes", "250KiB", 256_000),
        ("peak_memory_bytes", "64k", 64_000),
        ("weight_bytes", "1MB", 1_000_000),
        ("weight_bytes", "1MiB", 1_048_576),
        ("weight_bytes", "17 B", 17),
        ("latency_ms", "5ms", 5),
        ("latency_ms", "0.2 s", 200),
        ("latency_ms", "800us", 0.8),
        ("energy_uj", "2 mJ", 2000),
        ("energy_uj", "50uJ", 50),
        ("accuracy", 0.9, 0.9),
        ("accuracy", "90%", 0.9),
        ("accuracy_int8", "97.5 %", 0.975),
        ("latency_ms", "5µs", 0.005),
        ("latency_ms", "5 \N{GREEK SMALL LETTER MU}s", 0.005),
        ("energy_uj", "50µJ", 50),
        ("macs", "60m", 60_000_000),
        ("macs", "139,920", 139_920),
        ("macs", "1_500_000.5", 1_500_000.5),
        ("peak_memory_bytes", "250kb", 250_000),
        ("peak_memory_bytes", "1,024 KIB", 1_048_576),
        ("latency_ms", "5 MS", 5),
        ("energy_uj", "2 j", 2e6),
    ],
)
def test_a_limit_is_read_in_the_unit_of_its_name(name: str, text: float | str, value: float) -> None:
    assert parse_limit(name, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("macs", "60MB"),
        ("macs", "5ms"),
        ("weight_bytes", "1 Mb"),
        ("energy_uj", "2 mj"),  # of milli or mega
        ("macs", "1,50"),
        ("macs", "0,250"),
        ("macs", "1,2345"),
        ("latency_ms", "5 kB"),
        ("macs", "much"),
        ("macs", ""),
        ("macs", "90%"),
        ("accuracy", "0.9M"),
    ],
)
def test_another_unit_is_refused_with_the_known_ones(name: str, text: str) -> None:
    with pytest.raises(UserError, match=rf"{name}={text} is not understood; write a number, or one followed by "):
        parse_limit(name, text)


@pytest.mark.parametrize("value", [0, -3, "nan", float("nan"), "0 MB", "1.2.3"])
def test_what_is_no_positive_number_is_refused(value: float | str) -> None:
    with pytest.raises(UserError):
        parse_limit("weight_bytes", value)


def test_a_limit_without_a_value_is_answered_with_how_to_leave_it_out() -> None:
    with pytest.raises(UserError, match=r"limit macs has no value; .* ~device\.<name>\.limits\.macs"):
        parse_limit("macs", None)


@pytest.mark.parametrize("value", [90, "120%"])
def test_an_accuracy_above_1_is_answered_with_how_to_write_it(value: float | str) -> None:
    with pytest.raises(UserError, match=r"limit accuracy=.* is a share, at most 1; write it like 0\.9 or 90%"):
        parse_limit("accuracy", value)


def test_a_name_may_leave_out_its_unit() -> None:
    assert parse_limits({"peak_memory": "1KB", "latency": 5}, NAMES) == {"peak_memory_bytes": 1000, "latency_ms": 5}
    assert parse_limits({"energy": "1mJ"}, NAMES) == {"energy_uj": 1000}


@pytest.mark.parametrize("name", ["mac", "peak_memory_byte", "bytes", "latency_s", ""])
def test_a_misspelt_name_is_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="is not known; choose from macs, peak_memory_bytes, weight_bytes, latency_ms"):
        known_name(name, NAMES)


def test_a_limit_given_twice_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^latency and latency_ms are one limit, latency_ms; give one of them"):
        parse_limits({"latency": 5, "latency_ms": 6}, NAMES)


def test_numbers_are_shown_as_people_read_them() -> None:
    assert [show(value) for value in (6e6, 0.98123, 12.0)] == ["6,000,000", "0.9812", "12"]


def test_size_means_the_weights() -> None:
    assert parse_limits({"size": "1MB"}, NAMES) == {"weight_bytes": 1e6}
    with pytest.raises(UserError, match="'size' is not known; choose from macs"):
        parse_limits({"size": "1MB"}, ("macs",))

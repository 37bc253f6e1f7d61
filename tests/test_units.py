"""Counts, sizes and durations are read and printed as people write them."""

from __future__ import annotations

import pytest

from lowvram.units import (
    count_of,
    parse_bytes,
    parse_count,
    parse_memory,
    round_count,
    show_bytes,
    show_count,
    show_duration,
    show_duration_range,
    show_energy_range,
)


@pytest.mark.parametrize(
    "text, count",
    [
        ("1.2e9", 1_200_000_000),
        ("1.2B", 1_200_000_000),
        ("300M", 300_000_000),
        (65_536, 65_536),
        ("40k", 40_000),
        ("1_000", 1000),
    ],
    ids=str,
)
def test_counts_are_read_in_every_spelling(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text, size", [("12GB", 12 * 10**9), ("8 GiB", 2**33), ("1.5kib", 1536), (7, 7), ("3 TB", 3 * 10**12)], ids=str
)
def test_sizes_tell_decimal_from_binary(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["8GB", "8 GiB", "8", 8, 8.0, "8192MiB", "8192 mb", "8g", " 8.0gb ", "0.0078125TB"], ids=repr
)
def test_memory_is_sold_in_powers_of_two_whatever_the_label(text: str | float) -> None:
    assert parse_memory(text) == 2**33


@pytest.mark.parametrize("text", ["", "much", "8 kB", "0", "0GB", "-8GB", "8 GB RAM", "1e999"], ids=repr)
def test_what_is_no_memory_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a card's memory; write it like \"8GB\", \"8 GiB\" or"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["", "many", "12 parsecs", "-3", "1e", "5G5", "1e999", "1e300T", float("inf")])
def test_what_is_no_count_is_refused_with_an_example(text: str | float) -> None:
    with pytest.raises(ValueError, match="is not a count; write it like"):
        parse_count(text)


@pytest.mark.parametrize(
    "size, shown", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**33, "8.0 GiB"), (3 * 2**40, "3.00 TiB")]
)
def test_sizes_are_printed_in_binary_units(size: int, shown: str) -> None:
    assert show_bytes(size) == shown


@pytest.mark.parametrize("count, shown", [(512, "512"), (24_697_088, "24.7M"), (999_999, "1.0M"), (1.2e9, "1.20B")])
def test_counts_are_printed_short(count: float, shown: str) -> None:
    assert show_count(count) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [(-1, "0 s"), (45.4, "45 s"), (65, "1 min 05 s"), (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)
def test_durations_are_printed_in_their_two_largest_units(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


@pytest.mark.parametrize("text, count", [("16k", 16_000), ("1.1B", 1_100_000_000), ("0.07k", 70), (6.5536e4, 65_536)])
def test_counts_are_exact_where_floating_point_is_not(text: str | float, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["2.5", "1.2345k", 0.3, "1e-1"], ids=repr)
def test_a_count_that_is_no_whole_number_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"is not a count, because it is no whole number; write it like"):
        parse_count(text)


@pytest.mark.parametrize(
    "low_s, high_s, shown",
    [
        (0.0, 0.0, "0.0 s"),
        (41, 99, "41–99 s"),
        (50, 100, "0.8–1.7 min"),
        (2460, 5760, "41–96 min"),
        (2400, 6000, "0.7–1.7 h"),
        (20 * 3600, 47.9 * 3600, "20–48 h"),
        (20 * 3600, 48 * 3600, "0.8–2.0 days"),
        (354_000, 846_000, "4.1–9.8 days"),
        (86_400 * 100, 86_400 * 729, "100–729 days"),
        (86_400 * 100, 86_400 * 730, "0.3–2.0 years"),
        (86_400 * 10_000, 86_400 * 60_000, "27–164 years"),
        (3600 * 10, 3600 * 10.4, "10 h"),
    ],
)
def test_a_range_of_time_has_one_unit(low_s: float, high_s: float, shown: str) -> None:
    assert show_duration_range(low_s, high_s) == shown


@pytest.mark.parametrize(
    "low, high, shown",
    [
        (0.0, 0.0, "< 1 Wh"),
        (0.0003, 0.0009, "< 1 Wh"),
        (0.0004, 0.001, "0.4–1.0 Wh"),
        (0.02, 0.05, "20–50 Wh"),
        (0.2, 0.999, "200–999 Wh"),
        (0.4, 1.0, "0.4–1.0 kWh"),
        (31, 73.4, "31–73 kWh"),
    ],
)
def test_little_energy_is_not_shown_as_none(low: float, high: float, shown: str) -> None:
    assert show_energy_range(low, high) == shown


@pytest.mark.parametrize(
    "count, words, shown",
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2, ("row",), "2 rows"),
        (12_345, ("step",), "12,345 steps"),
        (1, ("copy", "copies"), "1 copy"),
        (3, ("copy", "copies"), "3 copies"),
    ],
)
def test_a_count_agrees_with_its_noun(count: int, words: tuple[str, ...], shown: str) -> None:
    assert count_of(count, *words) == shown


@pytest.mark.parametrize(
    "text, count",
    [(1234.5, 1234), ("1.23456789k", 1235), (42857142.857, 42_857_143), ("0.5M", 500_000), (7, 7)],
    ids=repr,
)
def test_a_run_files_count_is_rounded_to_the_nearest_whole_number(text: str | float, count: int) -> None:
    assert round_count(text) == count


@pytest.mark.parametrize("text", ["many", "-3", "1e999"])
def test_what_is_no_count_is_refused_also_where_it_would_be_rounded(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count; write it like"):
        round_count(text)

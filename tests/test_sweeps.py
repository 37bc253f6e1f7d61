"""The part of a sweep that the default run takes: it meets every value, and it is the same one in every process."""

from __future__ import annotations

import itertools

from tests.sweeps import choose_cases


def product(**axes: int) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*map(range, axes.values()))]


def test_every_value_of_every_parameter_is_met_by_as_few_cases_as_the_longest_has_values() -> None:
    for axes in ({"a": 6, "b": 4, "c": 2}, {"a": 3, "b": 3}, {"a": 1, "b": 5}):
        cases = product(**axes)
        chosen = choose_cases(cases)
        assert {pair for number in chosen for pair in cases[number].items()} == {
            pair for case in cases for pair in case.items()
        }
        assert len(chosen) == max(axes.values())
        assert chosen == choose_cases(cases)


def test_one_parameter_alone_keeps_all_of_its_cases() -> None:
    assert choose_cases(product(a=40)) == set(range(40))


def test_parameters_that_vary_together_are_one() -> None:
    cases = [{"name": number, "size": number, "is_wide": wide} for number in range(5) for wide in range(2)]
    assert len(choose_cases(cases)) == 5

"""Which cases of a sweep the default run takes: as few as meet every value of each parameter; the rest is nightly."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import pytest
from _pytest.mark import ParameterSet

# A product of parameters with no more cases than that runs whole.
MOST_CASES = 4


def choose_cases(cases: Sequence[Mapping[Hashable, Hashable]]) -> set[int]:
    """Return the positions of cases that together hold every value of every parameter, taken greedily from the first.

    cases: the values of the parameters, by name, of each case.  All are chosen where one parameter alone varies, since
    each case then has a value that no other has.
    """
    missing = {pair for case in cases for pair in case.items()}
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(missing & set(cases[number].items())), -number))
        chosen.add(best)
        missing -= set(cases[best].items())
    return chosen


def cover(cases: Iterable[tuple[Hashable, ...]]) -> list[ParameterSet]:
    """Return a table of cases whose columns are a product; what the default run need not take is marked nightly.

    The ids are the values, joined by hyphens.
    """
    table = list(cases)
    chosen = choose_cases([dict(enumerate(case)) for case in table])
    rest = {number: pytest.mark.nightly for number in range(len(table)) if number not in chosen}
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=rest.get(number, ()))
        for number, case in enumerate(table)
    ]


def values_of(item: pytest.Item) -> dict[Hashable, Hashable]:
    """Return what a case holds per decorator of its test, and per fixture with parameters.

    A decorator of several names is a table of cases, not a product. The objects themselves may have no hash.
    """
    params = dict(item.callspec.params)
    values: dict[Hashable, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
        values[names] = tuple(id(params.pop(name, None)) for name in names)
    return values | {name: id(value) for name, value in params.items()}


def mark_rest(items: Iterable[pytest.Item]) -> None:
    """Mark as nightly the cases of each test that a default run need not take.

    `@pytest.mark.default_cases("a", "b")` names the cases of an expensive test that it takes, by their ids.
    """
    sweeps: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu") or item.get_closest_marker("heavy"):
            continue  # these have a run of their own
        if named := item.get_closest_marker("default_cases"):
            if item.callspec.id not in named.args:
                item.add_marker(pytest.mark.nightly)
        elif hasattr(item, "callspec"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for sweep in sweeps.values():
        if len(sweep) > MOST_CASES:
            chosen = choose_cases([values_of(item) for item in sweep])
            for number, item in enumerate(sweep):
                if number not in chosen:
                    item.add_marker(pytest.mark.nightly)

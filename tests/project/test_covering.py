"""Which cases run: those that have every pair of two parameters' values."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

from tests.cases.covering import covering, leave_out


def cases_of(*sizes):
    return [dict(enumerate(values)) for values in product(*map(range, sizes))]


@pytest.mark.parametrize(("sizes", "strength", "most"), [
    ((3, 4), 2, 12), ((2, 2, 2), 2, 5), ((4, 3, 2), 2, 13), ((7, 3, 2, 2), 2, 24), ((3, 4), 1, 4), ((5, 2, 2), 1, 5),
    ((6,), 2, 6),
])  # fmt: skip
def test_everything_that_any_case_has_is_kept(sizes, strength, most):
    cases = cases_of(*sizes)
    kept = covering(cases, strength)
    assert kept == sorted({*kept})
    assert len(kept) <= most
    for axes in combinations(range(len(sizes)), min(strength, len(sizes))):
        for values in product(*(range(sizes[axis]) for axis in axes)):
            assert any(all(cases[i][a] == v for a, v in zip(axes, values, strict=True)) for i in kept)


def test_pairs_that_no_case_has_are_not_missed():
    cases = [case for case in cases_of(2, 2, 2) if not case[0] == case[1] == 1]
    assert len(covering(cases, 2)) == 5
    assert covering([case for case in cases if case[2] == 0], 2) == [0, 1, 2]
    assert covering([{}, {}], 2) == [0]


class Item:
    """What of pytest's items is looked at."""

    def __init__(self, name, *marks, **parameters):
        self.originalname, self.parent = name, SimpleNamespace(nodeid="module")
        self.marks = {mark.name: mark for mark in marks}
        if parameters:
            self.callspec = SimpleNamespace(params=parameters)

    def get_closest_marker(self, name):
        return self.marks.get(name)


def items_of(name, *marks):
    """Of three parameters with two values each. Lists are values, too."""
    return [Item(name, *marks, a=a, b=b, c=c) for a, b, c in product(([1], [2]), "xy", (False, True))]


ONE, GPU = pytest.mark.covering(1).mark, pytest.mark.gpu.mark


@pytest.mark.parametrize(("marks", "has_gpu", "count"), [
    ((), False, 4), ((), True, 4), ((ONE,), False, 2), ((GPU,), False, 2), ((GPU,), True, 8), ((GPU, ONE), True, 8),
])  # fmt: skip
def test_tests_are_covered_one_by_one(marks, has_gpu, count):
    mine, alone = items_of("test_a", *marks), Item("test_b")
    others = items_of("test_c")
    out = leave_out([*mine, alone, *others], has_gpu)
    assert len(mine) - len(out & {*mine}) == count
    assert len(others) - len(out & {*others}) == 4
    assert alone not in out


def test_what_options_leave_is_covered():
    """`-k` or a test's own name: what is asked for runs."""
    mine = items_of("test_a")
    for item in mine:
        assert leave_out([item], False) == set()
    assert leave_out(mine[:4], False) == set()


def test_values_instead_of_pairs():
    assert len(leave_out(items_of("test_a"), False, most=1)) == 6


def test_values_are_met_alike():
    """Of ten options, five meet one value of the other parameter."""
    kept = [case for i, case in enumerate(cases_of(2, 10)) if i in covering(cases_of(2, 10), 1)]
    assert sorted(case[0] for case in kept) == [0] * 5 + [1] * 5

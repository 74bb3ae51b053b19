"""Fewer cases of tests with many axes: those that have every pair of values of two, or every value of each."""

from collections import Counter
from itertools import combinations


def covering(cases, strength):
    """Which of some cases have every combination of so many axes' values that any of them has, in order.

    Args:
        cases: For each case, its axes' values by name, as numbers.
        strength: 1 for every value, 2 for every pair of two axes' values.

    Returns:
        Indices of the cases that stay; always the same for the same cases.
    """
    found = [set(combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    missing, kept, times = set().union(*found), [], Counter()
    while missing:
        # Of those that add most, one whose values others have least, so that none is met once and another always.
        best = max(
            range(len(found)),
            key=lambda i: (len(found[i] & missing), -sum(times[each] for each in found[i]), -i),
        )
        kept.append(best)
        times.update(found[best])
        missing -= found[best]
    return sorted(kept)


def leave_out(items, has_gpu, most=2):
    """Tests that need not run, as others of the same function have every pair of two of their parameters.

    With the mark `covering(1)`, or where `most` is 1, it is every value; so it is without a GPU for tests that need
    one, which then run only up to the kernels. With a GPU, these have what they cover chosen already, and all run.
    """
    tests, out = {}, set()
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        gpu, mark = item.get_closest_marker("gpu"), item.get_closest_marker("covering")
        if not (gpu and has_gpu):
            strength = 1 if gpu else mark.args[0] if mark else most
            tests.setdefault((item.parent.nodeid, item.originalname, strength), []).append(item)
    for (_, _, strength), same in tests.items():
        kept = set(covering(axes_of(same), strength))
        out |= {item for i, item in enumerate(same) if i not in kept}
    return out


def axes_of(items):
    """Each test's parameters, as numbers: in which order the values of each came first. Values need not be hashable."""
    numbers = {}
    return [
        {
            name: numbers.setdefault(name, {}).setdefault(id(value), len(numbers[name]))
            for name, value in item.callspec.params.items()
        }
        for item in items
    ]

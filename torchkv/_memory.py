"""Whether strided tensors share memory, and how much of it they reach."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import gcd

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvcore.contract.checks import overlap_error, self_overlap_error


def address_of(tensor: Tensor) -> int:
    """Where a tensor's first element lies, in bytes.

    Fake tensors have no memory. Their storages count as beginning at multiples of 16, each far from all others.
    """
    if isinstance(tensor, FakeTensor):
        return (tensor.untyped_storage()._cdata << 64) + tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr()


def check_apart(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raises a ValueError if two of the tensors share memory."""
    for (first, a), (second, b) in combinations(zip(names, tensors, strict=True), 2):
        if share_elements(a, b):
            raise overlap_error(first, second)


def check_results_apart(names: Sequence[str], results: Sequence[Tensor], inputs: Mapping[str, Tensor | None]) -> None:
    """Raises a ValueError if a result shares memory with another one or with an input."""
    check_apart(names, results)
    for name, result in zip(names, results, strict=True):
        for other, tensor in inputs.items():
            if tensor is not None and share_elements(result, tensor):
                raise overlap_error(name, other)


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether any byte of an element of `a` is one of `b`. Interleaved views of one buffer have none, for example."""
    distance = address_of(b) - address_of(a)
    if distance >= span(a) * a.element_size() or -distance >= span(b) * b.element_size():
        return False
    unit = gcd(a.element_size(), b.element_size(), distance)
    return _reachable(distance // unit, _differences(a, b, unit))


def check_distinct(name: str, tensor: Tensor) -> None:
    """Raises a ValueError if two elements of a tensor lie in one place."""
    if tensor.numel() == 0:
        return
    smaller: list[tuple[int, int, int]] = []  # axes with smaller strides, as `_reachable` has them
    reach = 0  # how far these go
    for stride, n in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        steps = range(1, min(n - 1, reach // stride) + 1) if stride else ()
        if stride == 0 or any(_reachable(stride * step, smaller) for step in steps):
            raise self_overlap_error(name, tensor.stride())
        smaller.insert(0, (stride, 1 - n, n - 1))
        reach += stride * (n - 1)


def span(tensor: Tensor) -> int:
    """Elements from the first to one past the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _differences(a: Tensor, b: Tensor, unit: int) -> list[tuple[int, int, int]]:
    """Steps (stride, least, most), in units of bytes, whose sums are all differences between places in `a` and `b`."""
    ranges: dict[int, list[int]] = {}
    for tensor, sign in ((a, 1), (b, -1)):
        units = tensor.element_size() // unit
        steps = [(n, s * units) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        for n, stride in [*steps, (units, 1)]:
            low_high = ranges.setdefault(stride, [0, 0])
            low_high[sign > 0] += sign * (n - 1)
    return [(stride, low, high) for stride, (low, high) in sorted(ranges.items(), reverse=True) if stride]


def _reachable(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether `distance` is a sum of `stride * i` with low <= i <= high for each step, widest stride first."""
    if not steps:
        return distance == 0
    (stride, low, high), rest = steps[0], steps[1:]
    least = sum(s * lo for s, lo, _ in rest)
    most = sum(s * hi for s, _, hi in rest)
    first = max(low, -((most - distance) // stride))  # ceil((distance - most) / stride)
    last = min(high, (distance - least) // stride)
    return any(_reachable(distance - stride * i, rest) for i in range(first, last + 1))

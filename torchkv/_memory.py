"""Whether two strided tensors share an element."""

from collections.abc import Sequence

from torch import Tensor


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether any element of `a` lies on one of `b`. Interleaved views of one buffer do not, for example."""
    size = a.element_size()
    distance = b.data_ptr() - a.data_ptr()
    if distance >= span(a) * size or -distance >= span(b) * size:
        return False
    if distance % size:
        return True
    return _reachable(distance // size, _differences(a, b))


def span(tensor: Tensor) -> int:
    """Elements from the first to one past the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _differences(a: Tensor, b: Tensor) -> list[tuple[int, int, int]]:
    """Steps (stride, least, most) whose sums are all differences between places in `a` and in `b`."""
    ranges: dict[int, list[int]] = {}
    for tensor, sign in ((a, 1), (b, -1)):
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
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

"""What the benchmarks share: the sizes of a cache, and the plain copies and products that are their limits."""

import torch

from benchmarks.timing import torch_time

BLOCK_SIZE = 16
SETS = 4  # inputs, and places in the cache, that calls take turns with, so that nothing stays in the L2 cache
COPY_BYTES = 2**28  # larger buffers copy slower on an H100


def copy_time(moved: int, sets: int = SETS) -> float:
    """Time of a plain copy, on torch's device, that reads and writes as many bytes in total."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = [torch.randint(0, 255, (2, moved // 2), dtype=torch.uint8, device=device) for _ in range(sets)]
    return torch_time([lambda b=b: b[1].copy_(b[0]) for b in buffers])


def bandwidth(nbytes: int = COPY_BYTES) -> float:
    """Bytes that a plain copy of this many reads and writes in a second, on torch's device."""
    return 2 * nbytes / copy_time(2 * nbytes, sets=1)


def product_rate(size: int = 8192) -> float:
    """Multiplications and additions that torch's product of two square bfloat16 matrices makes in a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn((size, size), dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / torch_time([lambda: a @ b])

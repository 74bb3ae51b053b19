"""What the benchmarks share: sizes of a cache, options, and the plain copies and products that are their limits."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

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


def parse(
    name: str, about: str | None, argv: list[str], divide: str = "smaller sizes, for a CPU"
) -> argparse.Namespace:
    """The options of a benchmark that times cases against a limit; `divide` says what that option divides."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    parser.add_argument("--cases", nargs="+", help="parts of the cases' names; default: all")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--no-jax", action="store_true", help="torch only")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help=divide)
    return parser.parse_args(argv)


def take_times(row: dict[str, Any], copy: float, calls: Mapping[str, Callable[[], float]]) -> None:
    """Adds to a row what a plain copy and each call take, and their ratios, or why a call failed, to `failed`."""
    times, row["failed"] = {"copy": copy}, {}
    for name, call in calls.items():
        try:
            times[name] = call()
        except Exception as error:  # a failure is a result: the others go on
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"        {name}: {row['failed'][name][:200]}", flush=True)
    row |= {f"{name}_us": seconds * 1e6 for name, seconds in times.items()}
    row |= {f"{name}_ratio": copy / seconds for name, seconds in times.items() if name != "copy"}

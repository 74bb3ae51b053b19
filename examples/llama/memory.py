"""Whether there is memory enough, asked before it is too late: Linux ends a process that takes more than there is."""

from pathlib import Path

_SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
"""Words of XLA, of CUDA and of torch's CPU allocator, which have no common error."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory."""
    return isinstance(error, MemoryError) or any(sign.lower() in str(error).lower() for sign in _SIGNS)


def check_host_memory(needed: int, free: int | None) -> None:
    """Compares bytes. Raises MemoryError if fewer are free than needed; None means that nobody knows."""
    if free is not None and needed > free:
        raise MemoryError(f"at least {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free")


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take, by Linux's book-keeping; None where there is none.

    Args:
        root: Where `proc` and `sys` lie.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = root / "sys/fs/cgroup"  # in a container, its own limit
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            found.append(int(limit) - int(used))
    except OSError:  # no container, or one of the old kind
        pass
    return min(found, default=None)

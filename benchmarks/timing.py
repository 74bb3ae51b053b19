"""Device time of torch calls and of JAX steps, in seconds per call."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 15


def torch_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of a call, over calls on inputs that differ: in a CUDA graph on a GPU, by the clock on a CPU."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return _by_clock(lambda: [call() for call in calls], REPEATS) / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def jax_time(step: Callable[[Any], Any], carry: Any, calls: int, loops: int) -> float:
    """Median time of a call in a jitted loop over a donated carry.

    Args:
        step: Makes `calls` calls, one after the other, on a carry.
        carry: What it starts from; consumed.
        calls: Calls in a step.
        loops: Steps in one jitted loop, enough to hide the launch of the program.
    """
    import jax

    program = jax.jit(lambda c: jax.lax.fori_loop(0, loops, lambda _, x: step(x), c), donate_argnums=0)
    carry = jax.block_until_ready(program(carry))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        carry = jax.block_until_ready(program(carry))
        times.append((time.perf_counter() - start) / loops / calls)
    return statistics.median(times)


def _by_clock(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

"""Device time of torch calls and of JAX steps, in seconds per call."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS = 15


def torch_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of a call, over calls on inputs that differ: in a CUDA graph on a GPU, by the clock on a CPU."""

    def once() -> None:
        for call in calls:
            call()

    once()
    if not torch.cuda.is_available():
        return _by_clock(once) / len(calls)
    rounds = _rounds(_graph_time(once, 1, repeats=3))
    return _graph_time(once, rounds, REPEATS) / rounds / len(calls)


def _graph_time(once: Callable[[], None], rounds: int, repeats: int) -> float:
    """Median time of a CUDA graph that holds `rounds` of the calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            once()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def host_time(call: Callable[[], Any]) -> float:
    """Median time that a call keeps the host busy, in bursts too short to fill the GPU's queue."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200)
    return statistics.median(times)


def jax_time(step: Callable[[Any, Any], Any], carry: Any, inputs: Any, calls: int, estimate: float) -> float:
    """Median time of a call in a jitted loop over a donated carry.

    Args:
        step: `(carry, inputs) -> carry`: makes `calls` calls, one after the other.
        carry: What it starts from; consumed.
        inputs: Arrays that every step reads; arguments of the program, for constants would be compiled in.
        calls: Calls in a step.
        estimate: About how long a call takes, in seconds: it sets the length of the loop.
    """
    import jax

    # A program takes the host about half a millisecond to start and to await: 150 ms of work hide it.
    loops = max(1, round(150e-3 / (estimate * calls))) if torch.cuda.is_available() else 1

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry: Any, inputs: Any) -> Any:
        return jax.lax.fori_loop(0, loops, lambda _, x: step(x, inputs), carry)

    carry = jax.block_until_ready(program(carry, inputs))
    times = []
    for _ in range(REPEATS // 3):
        start = time.perf_counter()
        carry = jax.block_until_ready(program(carry, inputs))
        times.append((time.perf_counter() - start) / loops / calls)
    return statistics.median(times)


def _rounds(seconds: float) -> int:
    """Rounds that take long enough for the clock, 5 ms, and for launches and gaps not to show."""
    return min(100, max(1, round(5e-3 / seconds)))


def _by_clock(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

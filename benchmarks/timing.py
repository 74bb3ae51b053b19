"""Device time of torch calls and of JAX steps, in seconds per call."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

REPEATS = 15
JAX_REPEATS = 5


class Timer(NamedTuple):
    """What times calls of one kind again and again.

    Attributes:
        measure: Makes the calls, and gives the seconds that one took.
        about: What one took at first.
    """

    measure: Callable[[], float]
    about: float


def torch_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of a call, over calls on inputs that differ: in a CUDA graph on a GPU, by the clock on a CPU."""
    return median(torch_timer(calls).measure, REPEATS)


def torch_timer(calls: Sequence[Callable[[], Any]], seconds: float = 5e-3) -> Timer:
    """A timer of calls on inputs that differ: of a CUDA graph on a GPU, by the clock on a CPU.

    Args:
        calls: What is timed.
        seconds: How long the graph takes at least: launches and gaps must not show.
    """

    def once() -> None:
        for call in calls:
            call()

    once()
    if not torch.cuda.is_available():
        about = median(lambda: _by_clock(once) / len(calls), 3)
        return Timer(lambda: _by_clock(once) / len(calls), about)
    about = median(_graph(once, 1), 3)
    rounds = max(1, round(seconds / max(about, 50e-6)))  # a graph of too many is slow to make
    graph = _graph(once, rounds)
    return Timer(lambda: graph() / rounds / len(calls), about / len(calls))


def _graph(once: Callable[[], None], rounds: int) -> Callable[[], float]:
    """Captures `rounds` of the calls in a CUDA graph. The function replays it, and gives the seconds that it took."""
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

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return replay


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
    """Median time of a call in a jitted loop. Arguments are those of `jax_timer`."""
    return median(jax_timer(step, carry, inputs, calls, estimate).measure, JAX_REPEATS)


def jax_timer(
    step: Callable[[Any, Any], Any], carry: Any, inputs: Any, calls: int, estimate: float, seconds: float = 150e-3
) -> Timer:
    """A timer of calls in a jitted loop over a donated carry.

    Args:
        step: `(carry, inputs) -> carry`: makes `calls` calls, one after the other.
        carry: What it starts from; consumed.
        inputs: Arrays that every step reads; arguments of the program, for constants would be compiled in.
        calls: Calls in a step.
        estimate: About how long a call takes, in seconds: it sets the length of the loop.
        seconds: How long the loop takes. A program takes the host about half a millisecond to start and to await.
    """
    import jax

    loops = max(1, round(seconds / (estimate * calls))) if torch.cuda.is_available() else 1

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry: Any, inputs: Any) -> Any:
        return jax.lax.fori_loop(0, loops, lambda _, x: step(x, inputs), carry)

    carry = jax.block_until_ready(program(carry, inputs))

    def measure() -> float:
        nonlocal carry
        start = time.perf_counter()
        carry = jax.block_until_ready(program(carry, inputs))
        return (time.perf_counter() - start) / loops / calls

    return Timer(measure, estimate)


def in_turns(timers: Mapping[str, Timer], turns: int) -> dict[str, list[float]]:
    """Times of each: A B C, B C A, C A B, …, so that all have the same share of a clock that drifts."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for turn in range(turns):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            times[name].append(timers[name].measure())
    return times


def median(measure: Callable[[], float], repeats: int) -> float:
    """Of what it gives."""
    return statistics.median(measure() for _ in range(repeats))


def _by_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

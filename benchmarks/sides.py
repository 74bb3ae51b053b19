"""A case of attention by several implementations, timed in turns: what `prefill` and `mla` share.

The clock of a GPU drifts by several per cent within a run, so all that is compared is timed in turns, and a ratio is
the median of the turns' ratios.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks import attention_torch, hlo, peers, report
from benchmarks.attention_inputs import TOLERANCE, Case, Inputs
from benchmarks.attention_jax import JaxInputs
from benchmarks.timing import Timer, in_turns, torch_timer
from torchkv._triton.launch import target

SECONDS = 0.1  # of a turn, on a GPU
TURNS = 5


class Side(NamedTuple):
    """An implementation that is ready to be timed.

    Attributes:
        timer: Of its calls.
        out: Its result for the first set of inputs.
        about: What else a row says of it.
    """

    timer: Timer
    out: torch.Tensor
    about: dict[str, Any]


def measure(case: Case, named: Sequence[str], turns: int, seconds: float = SECONDS) -> dict[str, Any]:
    """A row: times and errors of the sides of these names, and how many times as fast as the others ours are.

    Args:
        case: What is computed.
        named: Of `SIDES`, "torchkv" first.
        turns: How often each is timed; 0 compiles only.
        seconds: How long each turn of a side takes, on a GPU.
    """
    inputs = Inputs(case)
    row: dict[str, Any] = {"case": case.name, "batch": case.batch, "context": case.context, "queries": case.queries}
    row |= {"sequences_of_queries": case.long, "block_size": case.block_size, "causal": case.causal}
    row |= {"heads": [case.q_heads, case.kv_heads], "head_sizes": [case.head_size, case.head_size_v]}
    row |= {"sliding_window": case.sliding_window, "soft_cap": case.soft_cap, "layout": str(inputs.layout)}
    row |= {"bytes": case.read, "flops": case.flops, "failed": {}}
    sides: dict[str, Side] = {}
    for name in named:
        try:
            side = SIDES[name](inputs, seconds, sides)
            error = inputs.error(side.out)
        except Exception as problem:  # a failure is a result: the others go on
            row["failed"][name] = f"{type(problem).__name__}: {str(problem)[:500]}"
            continue
        sides[name] = side
        row |= {f"{name}_{key}": value for key, value in side.about.items()}
        row[f"{name}_error"] = error
        if not error <= TOLERANCE:
            row["failed"][name] = f"off by {error:.2g} of the largest element"
        if "torchkv" in sides and name != "torchkv":
            row[f"{name}_apart"] = _apart(side.out, sides["torchkv"].out)
    times = in_turns({name: side.timer for name, side in sides.items()}, turns)
    return row | (_figures(case, times) if turns else {})


def _apart(out: torch.Tensor, other: torch.Tensor) -> float:
    """How far two results lie apart, as a part of the second's norm."""
    expected = other.float()
    return float((out.to(expected) - expected).norm() / expected.norm())


def _figures(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians; `spread` is what lies between the fastest and the slowest turn, as a part of the median."""
    row = {}
    for name, each in times.items():
        middle = median(each)
        row[f"{name}_us"] = middle * 1e6
        row[f"{name}_tflops"] = case.flops / middle / 1e12
        row[f"{name}_spread"] = (max(each) - min(each)) / middle
    for ours in ("torchkv", "jaxkv"):
        for name in times.keys() - {ours}:
            if ours in times:
                row[f"{ours}_vs_{name}"] = median(b / a for a, b in zip(times[ours], times[name], strict=True))
    return row


# ---- the sides


def _torch_side(calls: peers.Calls, seconds: float, **about: Any) -> Side:
    out = calls[0]()
    return Side(torch_timer(calls, seconds), out, about)


def _torchkv(inputs: Inputs, seconds: float, sides: dict[str, Side]) -> Side:
    """The op of torchkv."""
    about: dict[str, Any] = {"kernel": "torch"}
    if inputs.device == "cuda":
        plan = attention_torch.plan_of(inputs, target())
        about = {"kernel": plan.attend.name, "splits": plan.splits}
    return _torch_side(attention_torch.ours(inputs), seconds, **about)


def _other(inputs: Inputs, seconds: float, sides: dict[str, Side]) -> Side:
    """The op of torchkv with the kernel for every GPU, where it is not chosen."""
    if inputs.device != "cuda":
        raise ValueError("needs a GPU")
    kernel, chosen = (attention_torch.plan_of(inputs, target(), gluon=g).attend.name for g in (False, True))
    if kernel == chosen:
        raise ValueError(f"{chosen} is the kernel for every GPU")
    return _torch_side(attention_torch.with_kernel_for_every_gpu(inputs), seconds, kernel=kernel)


def _jaxkv(inputs: Inputs, seconds: float, sides: dict[str, Side]) -> Side:
    """The op of jaxkv, in a jitted loop."""
    arrays = JaxInputs(inputs)
    ((_, attend, given),) = arrays.ours()
    out, text = arrays.run(attend, given)
    about = sides["torchkv"].timer.about if "torchkv" in sides and inputs.device == "cuda" else 1e-3
    return Side(arrays.timer(attend, given, about, seconds), out, {"kernels": _kernels(text)})


def _kernels(text: str) -> str:
    """What a program of JAX launches."""
    try:
        return hlo.counted(hlo.kernels(text))
    except ValueError as error:  # of a text that is not as expected; times mean the same without
        return f"unknown: {error}"


def _flashinfer(inputs: Inputs, seconds: float, sides: dict[str, Side]) -> Side:
    peer = peers.flashinfer_mla if inputs.layout.latent else peers.flashinfer
    return _torch_side(peer(inputs), seconds)


def _sdpa(inputs: Inputs, seconds: float, sides: dict[str, Side]) -> Side:
    """Attention of torch on K and V that lie in sequence, by the fastest of its kernels."""
    found, failed = [], []
    for name, calls in peers.fused_sdpa(inputs):
        try:
            found.append((torch_timer(calls).about, name, calls))
        except RuntimeError as error:  # this one cannot do it
            failed.append(f"{name}: {error}")
    if not found:
        raise RuntimeError("; ".join(failed))
    _, name, calls = min(found, key=lambda each: each[0])
    return _torch_side(calls, seconds, kernel=name)


SIDES: dict[str, Callable[[Inputs, float, dict[str, Side]], Side]] = {
    "torchkv": _torchkv,
    "jaxkv": _jaxkv,
    "other": _other,
    "flashinfer": _flashinfer,
    "sdpa": _sdpa,
}
"""By name: given inputs, the seconds of a turn, and the sides before it."""


# ---- the command


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options that benchmarks of such rows have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    made.add_argument("--json", help="where to write the results")
    made.add_argument("--cases", nargs="+", help="names, or parts of names")
    made.add_argument("--no-peers", action="store_true", help="this package only")
    made.add_argument("--no-jax", action="store_true", help="torch only")
    made.add_argument("--turns", type=int, default=TURNS, metavar="N", help="how often each is timed; 0 only compiles")
    made.add_argument("--divide", type=int, default=1, metavar="N", help="smaller sizes, for a CPU")
    made.add_argument("--build", action="store_true", help="compile all kernels in several processes, and stop")
    return made


def run(
    name: str,
    cases: Sequence[Case],
    peers_of_case: Sequence[str],
    args: argparse.Namespace,
    complete: Callable[[Case, dict[str, Any]], None],
    **extra: Any,
) -> list[dict[str, Any]]:
    """Measures the cases that were asked for, prints and saves their rows.

    Args:
        name: The benchmark's.
        cases: All.
        peers_of_case: The sides beside torchkv, jaxkv and the other kernel.
        args: Of `parser`.
        complete: Adds what the benchmark knows to a row of a case, which is as it is without `--divide`.
        extra: What else is saved.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too
    # CUDA graphs are captured before JAX runs: what its threads do meanwhile could spoil them.
    named = ["torchkv", "other", *([] if args.no_peers else peers_of_case), *([] if args.no_jax else ["jaxkv"])]
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in chosen(cases, args.cases):
        row = measure(case.divided(args.divide), named, args.turns)
        complete(case, row)
        rows.append(row)
        times = "  ".join(f"{key[:-3]} {row[key]:.1f}" for key in (f"{n}_us" for n in named) if key in row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}, µs: {times}", flush=True)
        for side, what in row["failed"].items():
            print(f"        {side}: {what[:200]}", flush=True)
        report.save(args.json, rows, benchmark=name, turns=args.turns, peers=peers.versions(), **extra)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def chosen(cases: Sequence[Case], parts: Sequence[str] | None) -> Iterator[Case]:
    """Cases whose names are, or have, one of the parts. What is a name stands for that case only."""
    names = {case.name for case in cases}
    for case in cases:
        if parts is None or any(p == case.name or (p not in names and p in case.name) for p in parts):
            yield case


def build(name: str, cases: Sequence[Case], args: argparse.Namespace, processes: int = 7) -> None:
    """Runs the benchmark without timing anything, in several processes: what they compile is kept on disk."""
    names = [case.name for case in chosen(cases, args.cases)]
    command = [sys.executable, "-m", "benchmarks", name, "--turns", "0", "--divide", str(args.divide)]
    command += ["--no-peers"] * args.no_peers + ["--no-jax"] * args.no_jax

    def compile_some(some: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--cases", *some], capture_output=True, text=True)

    shares = [names[i::processes] for i in range(min(processes, len(names)))]
    with ThreadPoolExecutor(len(shares)) as pool:
        for some, ended in zip(shares, pool.map(compile_some, shares), strict=True):
            print(f"{', '.join(some)}: exit code {ended.returncode}\n{ended.stdout}", flush=True)
            if ended.returncode:
                print(ended.stderr[-2000:], flush=True)

"""Slots of new tokens, against what a graph takes to start a kernel, beside what torch and XLA make of the same.

`uv run python -m benchmarks slots [--json FILE]`. Times are microseconds of a call: in a CUDA graph of torch's, in a
jitted loop of JAX's. `empty` is a kernel of torch's that writes as many integers, and nothing else.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch

import torchkv
from benchmarks import report
from benchmarks.common import BLOCK_SIZE, SETS, parse
from benchmarks.timing import jax_time, torch_time
from kvcore.oracle.slots import slot_mapping as oracle_mapping


class Case(NamedTuple):
    """New tokens of sequences.

    Attributes:
        name: In results.
        query_lens: Of each sequence.
        context: Positions of each, before its new ones.
        starts: Whether query_start_loc is given; without, each has one.
    """

    name: str
    query_lens: tuple[int, ...]
    context: int = 8192
    starts: bool = True


CASES = (
    Case("decode 64, no starts", (1,) * 64, starts=False),
    Case("decode 256, no starts", (1,) * 256, starts=False),
    Case("decode 256", (1,) * 256),
    Case("decode 4096", (1,) * 4096, 512),
    Case("prefill 64 x 128", (128,) * 64),
    Case("prefill 1 x 8192", (8192,)),
    Case("prefill 1, decode 255", (7937,) + (1,) * 255),
    Case("prefill 64 x 8192", (8192,) * 64, 0),
)


def divided(case: Case, by: int) -> Case:
    """Fewer sequences and positions, for a CPU."""
    lens = case.query_lens[: max(1, len(case.query_lens) // by)]
    return case._replace(query_lens=tuple(max(1, n // by) for n in lens), context=case.context // by)


def arrays_of(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Block tables, starts or None, and lengths."""
    rng = np.random.default_rng(seed)
    lens = np.array(case.query_lens, np.int32) + np.int32(case.context)
    tables = rng.integers(0, 2**20, (len(lens), -(-int(lens.max()) // BLOCK_SIZE)), np.int32)
    starts = np.concatenate([[0], np.cumsum(case.query_lens)]).astype(np.int32) if case.starts else None
    return tables, starts, lens


def in_torch(arrays: Any, num_tokens: int) -> Any:
    """What users write without the op: a dozen kernels, as many again with starts."""
    tables, starts, lens = arrays
    if starts is None:
        seq, position = torch.arange(num_tokens, device=lens.device), lens - 1
    else:
        token = torch.arange(num_tokens, device=lens.device)
        seq = torch.searchsorted(starts, token, right=True) - 1
        position = lens[seq] - starts[seq + 1] + token
    return tables[seq, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def torch_times(case: Case, sets: list[Any]) -> dict[str, float]:
    device, count = ("cuda" if torch.cuda.is_available() else "cpu"), sum(case.query_lens)
    inputs: list[Any] = [[None if a is None else torch.from_numpy(a).to(device) for a in arrays] for arrays in sets]

    def by_op(arrays: Any) -> torch.Tensor:
        tables, starts, lens = arrays
        return torchkv.slot_mapping(tables, starts, lens, BLOCK_SIZE, count)

    check(case, sets[0], by_op(inputs[0]))
    check(case, sets[0], in_torch(inputs[0], count))
    out = torch.zeros(count, dtype=torch.int32, device=device)
    return {
        "empty": torch_time([out.zero_] * SETS),
        "torch": torch_time([lambda x=x: by_op(x) for x in inputs]),
        "torch_ops": torch_time([lambda x=x: in_torch(x, count) for x in inputs]),
    }


def jax_times(case: Case, sets: list[Any], estimate: float) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    import jaxkv

    count, again = sum(case.query_lens), 8 if torch.cuda.is_available() else 1
    inputs = [tuple(None if a is None else jnp.asarray(a) for a in arrays) for arrays in sets]

    def by_op(arrays: Any, backend: Any, added: Any = 0) -> Any:
        tables, starts, lens = arrays
        return jaxkv.slot_mapping(tables, starts, lens + added, BLOCK_SIZE, count, backend=backend)

    def step_of(backend: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            for _ in range(again):  # the next calls depend on these, whose slots are 0 or more; once a round: kernels
                found = [by_op(arrays, backend, carry) for arrays in given]
                carry = sum(jnp.minimum(slots[0], 0) for slots in found)
            return carry

        return step

    for backend in (None, "xla"):
        found = jax.jit(by_op, static_argnums=1)(inputs[0], backend)
        check(case, sets[0], torch.from_numpy(np.asarray(found).copy()))
    calls = again * len(inputs)
    return {
        name: jax_time(step_of(backend), jnp.int32(0), inputs, calls, estimate)
        for name, backend in (("jax", None), ("jax_xla", "xla"))
    }


def check(case: Case, arrays: Any, found: torch.Tensor) -> None:
    """Raises unless the slots are the oracle's."""
    tables, starts, lens = arrays
    want = oracle_mapping(tables, starts, lens, BLOCK_SIZE, sum(case.query_lens))
    if not np.array_equal(found.cpu().numpy(), want):
        raise ValueError(f"{case.name}: the slots are others than the oracle's")


def main(argv: list[str]) -> None:
    args = parse("slots", __doc__, argv)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for full in CASES:
        if args.cases and not any(part in full.name for part in args.cases):
            continue
        case = divided(full, args.divide)
        sets = [arrays_of(case, seed) for seed in range(SETS)]
        row: dict[str, Any] = {
            "case": case.name, "sequences": len(case.query_lens), "tokens": sum(case.query_lens),
            "context": case.context, "starts": case.starts,
        }  # fmt: skip
        times = torch_times(case, sets)
        if not args.no_jax:
            times |= jax_times(case, sets, times["torch"])
        row |= {f"{name}_us": seconds * 1e6 for name, seconds in times.items()}
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="slots", block_size=BLOCK_SIZE)
    names = ("empty", "torch", "torch_ops", *(() if args.no_jax else ("jax", "jax_xla")))
    print(report.table(rows, {"case": "s", **{f"{name}_us": ".2f" for name in names}}))

"""Gathers of keys and values out of the cache against the limit: a plain copy of the same bytes, in the same run.

`uv run python -m benchmarks gather [--json FILE]`. Columns: `ratio` is the copy's time over the op's, 1 being the
limit. What is gathered is bfloat16.
"""

import time
from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.attention_inputs import Case, Inputs
from benchmarks.attention_jax import JaxInputs
from benchmarks.common import BLOCK_SIZE, SETS, copy_time, parse, take_times
from benchmarks.timing import jax_time, torch_time

BATCH, CONTEXT = 16, 4096
CASES = (
    Case("bf16", BATCH, CONTEXT),
    *(Case(name, BATCH, CONTEXT, kv_cache_dtype=name) for name in ("fp8", "int8", "int4", "nvfp4")),
    *(
        Case(f"{name}, token head", BATCH, CONTEXT, kv_cache_dtype=name, per_token_head=True)
        for name in ("fp8", "int8", "int4")
    ),
)


def moved(case: Case) -> int:
    """Bytes read, scales among them, and written."""
    return case.read + 2 * case.batch * case.context * case.kv_heads * (case.head_size + case.head_size_v)


def check(inputs: Inputs, name: str, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raises unless the first sequence of the first set is what torch's own operations give, bit for bit."""
    for got, expected in zip(found, inputs.gathered(0, torch.bfloat16), strict=True):
        if not torch.equal(got[0], expected):
            raise ValueError(f"{inputs.case.name}: {name} gathers something else")


def torch_seconds(inputs: Inputs) -> float:
    """Time of a call of torchkv."""

    def gather(tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.cache.gather(tables, inputs.seq_lens, inputs.case.context)

    check(inputs, "torchkv", gather(inputs.tables[0]))
    return torch_time([lambda t=t: gather(t) for t in inputs.tables])


def jax_seconds(inputs: Inputs, estimate: float) -> float:
    """Time of a call of jaxkv; `estimate` is about what it takes."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    again = 8 if inputs.device == "cuda" else 1
    arrays, options, context = JaxInputs(inputs), inputs.cache.spec.reading, inputs.case.context

    def gather(tables: Any, seq_lens: Any, cache: Any) -> Any:
        caches, scales = cache
        return jaxkv.gather_kv(caches, tables, seq_lens, context, **options, **scales)

    def step(seq_lens: Any, given: Any) -> Any:
        tables, cache = given
        for _ in range(again):  # 32 calls, as for writes
            keys = [gather(each, seq_lens, cache)[0] for each in tables]
            # Never true, but it makes the next calls depend on these. Once a round: it is a kernel, if a small one.
            seq_lens = seq_lens + sum(jnp.isnan(key[0, 0, 0, 0]).astype(seq_lens.dtype) for key in keys)
        return seq_lens

    cache = arrays.caches, {name: arrays.more[name] for name in ("k_scale", "v_scale")}
    key, value = jax.jit(gather)(arrays.tables[0], arrays.seq_lens, cache)
    check(inputs, "jaxkv", (torch.from_dlpack(key[:1]), torch.from_dlpack(value[:1])))
    carry, given = jnp.copy(arrays.seq_lens), (arrays.tables, cache)
    return jax_time(step, carry, given, again * len(arrays.tables), estimate)


def main(argv: list[str]) -> None:
    args = parse("gather", __doc__, argv)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.cases and not any(part in case.name for part in args.cases):
            continue
        case = case.divided(args.divide)
        inputs = Inputs(case, SETS)
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "context": case.context}
        row |= {"layout": str(inputs.layout), "heads": case.kv_heads, "head_size": case.head_size}
        row |= {"head_size_v": case.head_size_v, "kv_cache_dtype": case.kv_cache_dtype}
        row |= {"per_token_head": case.per_token_head, "bytes": moved(case)}
        copy = copy_time(row["bytes"])
        calls = {"torch": partial(torch_seconds, inputs)}
        if not args.no_jax:
            calls["jax"] = partial(jax_seconds, inputs, copy if inputs.device == "cuda" else 1e-3)
        take_times(row, copy, calls)
        row["copy_tb_s"] = row["bytes"] / copy / 1e12
        rows.append(row)
        print(f"{time.perf_counter() - started:4.0f} s  {case.name}", flush=True)
        report.save(args.json, rows, benchmark="gather", block_size=BLOCK_SIZE)
    columns = {"case": "s", "copy_tb_s": ".2f", "copy_us": ".2f", "torch_us": ".2f", "jax_us": ".2f"}
    print(report.table(rows, columns | {"torch_ratio": ".3f", "jax_ratio": ".3f"}))

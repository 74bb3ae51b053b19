"""What a layer of a decode loop costs, with the way into the cache written in several ways.

`uv run python -m benchmarks loop [--json FILE]`. Three tables, in microseconds:

- `write`: a layer of a jitted decode loop of 32 layers, 8 heads of 128, bfloat16: the projection to K and V, the write,
  reading back, tanh. `none` is the same loop without the write.
- `front`: the projection to query, K and V, then norm, rotation, quantisation and the write, for 32 query heads.
  `over_none` columns are what the front adds; `xla` is the fastest of those without jaxkv.
- `torch`: a call of `torchkv.rope_and_cache` in a CUDA graph, against a plain copy of its bytes (`ratio` is the copy's
  time over the op's), separate kernels, and FlashInfer where it is installed.

Below each row are the kernels that XLA launches for a layer.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import hlo, loop_layer, loop_torch, report
from benchmarks.loop_forms import BLOCK_SIZE, FRONTS, WRITES, Form, Shape

ROUNDS = 7
SECONDS = 0.1  # of a run: the start of a program, about half a millisecond, does not show
TABLES = ("write", "front", "torch")


class Program:
    """The loop with one form, in two stages: tracing holds Python, compiling can run beside others."""

    def __init__(self, form: Form, shape: Shape, steps: int, unrolled: bool, inputs: Any) -> None:
        def run(x: Any, caches: Any, inputs: Any) -> Any:
            return loop_layer.loop(form, shape, steps, unrolled, x, caches, inputs)

        self.form, self.shape, self.inputs = form, shape, inputs
        self.layers, self.loops = steps * shape.layers, 1 if unrolled else 2
        self.times: list[float] = []
        state = jax.eval_shape(lambda: (loop_layer.make_hidden(shape), loop_layer.make_caches(form, shape)))
        self.lowered = jax.jit(run, donate_argnums=(0, 1)).lower(*state, inputs)

    def compile(self) -> "Program":
        self.compiled = self.lowered.compile()
        return self

    @property
    def kernels(self) -> str:
        """What a layer launches; of layers that are not a loop, what all of them launch."""
        return hlo.counted(hlo.kernels(self.compiled.as_text() or "", self.loops))

    def start(self) -> None:
        """Makes the state, and runs once."""
        self.state = loop_layer.make_hidden(self.shape), loop_layer.make_caches(self.form, self.shape)
        self.run()
        self.times.clear()

    def run(self) -> None:
        jax.block_until_ready(self.state)
        started = time.perf_counter()
        self.state = jax.block_until_ready(self.compiled(*self.state, self.inputs))
        self.times.append((time.perf_counter() - started) / self.layers)

    @property
    def finite(self) -> bool:
        return bool(jnp.isfinite(self.state[0]).all())


def measure(forms: Sequence[Form], shape: Shape, unrolled: bool) -> dict[str, Any]:
    """Microseconds of a layer with each form, their kernels, and what failed. The forms take turns."""
    forms = [form for form in forms if shape.tokens == 1 or form.name != "xla_row"]
    inputs = loop_layer.make_inputs(shape)
    failed = loop_layer.differences(forms, shape, inputs)
    about = 10e-6 + 30e-9 * shape.tokens
    steps = max(1, round(SECONDS / about / shape.layers)) if torch.cuda.is_available() else 2
    programs = [Program(form, shape, steps, unrolled, inputs) for form in forms if form.name not in failed]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(Program.compile, programs))
    for program in programs:
        program.start()
    for _ in range(ROUNDS if torch.cuda.is_available() else 1):
        for program in programs:
            program.run()
    row: dict[str, Any] = {"failed": failed, "kernels": {p.form.name: p.kernels for p in programs}}
    for program in programs:
        if program.finite:
            row[f"{program.form.name}_us"] = statistics.median(program.times) * 1e6
        else:
            failed[program.form.name] = "makes hidden states that are not finite"
    return row


def compare(row: dict[str, Any]) -> None:
    """Adds the fastest form without jaxkv, and what fronts take over none."""
    rivals = {name[:-3]: row[name] for name in row if name.startswith("xla_") and name.endswith("_us")}
    if rivals:
        row["best_xla"] = min(rivals, key=rivals.__getitem__)
        row["xla_us"] = rivals[row["best_xla"]]
    for name in ("jaxkv_steps", "jaxkv_fused", "jaxkv_heads", "xla"):
        if f"{name}_us" in row and "none_us" in row:
            row[f"{name}_over_none_us"] = row[f"{name}_us"] - row["none_us"]
    ours = "jaxkv_fused" if "jaxkv_fused_us" in row else "jaxkv_heads"
    if row.get("xla_over_none_us") and f"{ours}_over_none_us" in row:
        row["vs_xla"] = row[f"{ours}_over_none_us"] / row["xla_over_none_us"]


def show(row: dict[str, Any], seconds: float) -> None:
    """Prints a row of a loop: each form's time and kernels."""
    how = {key: row[key] for key in ("tokens", "kv_cache_dtype", "layers")}
    print(f"{seconds:4.0f} s  {row['table']}: {', '.join(f'{key} {value}' for key, value in how.items())}")
    for name, kernels in row["kernels"].items():
        if f"{name}_us" in row:
            print(f"        {name:20} {row[f'{name}_us']:8.2f} µs  {kernels}")
    for name, what in row["failed"].items():
        print(f"        {name:20} failed: {what[:300]}")
    print(flush=True)


def main(argv: list[str]) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks loop", description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="of a step; default: 1 to 2,048 or 8,192")
    parser.add_argument("--caches", nargs="+", choices=["auto", "fp8"], default=["auto", "fp8"], help="of `front`")
    parser.add_argument(
        "--layers", nargs="+", choices=["loop", "unrolled"], default=["loop", "unrolled"],
        help="a loop over layers, whose index is traced, or a program that has all layers",
    )  # fmt: skip
    parser.add_argument("--norm", action=argparse.BooleanOptionalAction, default=True, help="norms of heads in `front`")
    parser.add_argument("--forms", nargs="+", help="parts of the forms' names; default: all")
    parser.add_argument("--small", action="store_true", help="a model of two layers, for a CPU")
    parser.add_argument("--json", help="where to write the results")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        report.save(
            args.json, rows, benchmark="loop", block_size=BLOCK_SIZE, flashinfer=loop_torch.flashinfer_version()
        )

    small: dict[str, Any] = {"layers": 2, "heads": 2, "head_size": 16} if args.small else {}
    for table, forms in (("write", WRITES), ("front", FRONTS)):
        if table not in args.tables:
            continue
        wanted = [f for f in forms if not args.forms or any(part in f.name for part in args.forms)]
        for tokens in args.tokens or [1, 8, 64, 256, 2048]:
            shape = Shape(tokens, q_heads=0, **small)
            shapes = [shape]
            if table == "front":
                shape = replace(shape, q_heads=4 * shape.heads, norm=args.norm)
                shapes = [replace(shape, kv_cache_dtype=each) for each in args.caches]
            for shape in shapes:
                for layers in args.layers:
                    gc.collect()
                    row: dict[str, Any] = {"table": table, "tokens": tokens, "kv_cache_dtype": shape.kv_cache_dtype}
                    row |= {"layers": layers, "norm": table == "front" and shape.norm, "heads": shape.heads}
                    row |= {"q_heads": shape.q_heads, "head_size": shape.head_size, "num_layers": shape.layers}
                    row |= measure(wanted, shape, layers == "unrolled")
                    compare(row)
                    add(row)
                    show(row, time.perf_counter() - started)
    if "torch" in args.tables:
        sizes = args.tokens or ([1, 8, 64, 256, 2048, 8192] if gpu else [16])
        for row in loop_torch.measured(sizes, small=args.small):
            add(row)
            print(f"{time.perf_counter() - started:4.0f} s  torch: {row['case']}, {row['tokens']} tokens", flush=True)
    print_tables(rows)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """All rows, without kernels."""
    first = {"tokens": "d", "layers": "s", "kv_cache_dtype": "s"}
    for table, forms in (("write", WRITES), ("front", FRONTS)):
        found = [row for row in rows if row["table"] == table]
        ours = "jaxkv_heads" if table == "write" else "jaxkv_fused"
        columns = first | {f"{form.name}_us": ".2f" for form in forms}
        columns |= {f"{ours}_over_none_us": ".2f", "xla_over_none_us": ".2f", "vs_xla": ".3f", "best_xla": "s"}
        if found:
            print(f"\n{table}\n{report.table(found, columns)}")
    found = [row for row in rows if row["table"] == "torch"]
    if found:
        times = [key for row in found for key in row if key.endswith(("_us", "_ratio"))]
        columns = {"tokens": "d", "case": "s"} | {
            key: ".2f" if key.endswith("_us") else ".3f" for key in dict.fromkeys(times)
        }
        print(f"\ntorch\n{report.table(found, columns)}")
        for row in found:
            for name, what in row["failed"].items():
                print(f"{row['tokens']:6} {row['case']}, {name}: {what[:200]}")

"""Attention over a paged cache against its limit, beside other implementations, in the same run.

`uv run python -m benchmarks attention [--json FILE]`. Columns: `us` is the time of a call; `ratio`, for decode, is the
time that a plain device copy takes for the bytes of K and V, over the call's: 1 is the limit; `tflops` is for prefill.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers, report
from benchmarks.attention_inputs import TOLERANCE, Case, Inputs
from benchmarks.attention_jax import JaxInputs
from benchmarks.attention_torch import ours
from benchmarks.common import BLOCK_SIZE, COPY_BYTES, bandwidth
from benchmarks.timing import torch_time
from kvcore.formats import KV_CACHE_DTYPES

SIZES = ((64, 8192), (8, 32768), (1, 131072), (256, 1024))
PEERS = ("flashinfer", "gather_sdpa", "contiguous_sdpa", "flash_attn", "pallas", "xla_gather")


def cases() -> Iterator[Case]:
    """The most telling first: a run that is cut short has them."""
    for batch, context in SIZES:
        more = ("flex",) if context == 8192 else ()  # its compiler takes long
        yield Case("decode", batch, context, peers=PEERS + more, series=batch == 8)
    prefill = ("flashinfer", "gather_sdpa", "contiguous_sdpa")
    yield Case("prefill", 1, 8192, queries=4096, peers=prefill)
    yield Case("mixed", 64, 4096, queries=2048, peers=("flashinfer",))
    for batch, context in SIZES:
        yield Case("fp8", batch, context, kv_cache_dtype="fp8")
    for batch, context in SIZES[:2]:
        for name in ("fp8", "int8", "int4"):
            yield Case(f"{name} token-head", batch, context, kv_cache_dtype=name, per_token_head=True)
        for name in ("int8", "int4", "nvfp4"):
            yield Case(name, batch, context, kv_cache_dtype=name)
    mla = {"layout": "MLA", "q_heads": 128, "kv_heads": 1, "head_size": 576, "head_size_v": 512}
    for batch, context in SIZES[:2]:
        yield Case("MLA", batch, context, **mla)
        yield Case("MLA fp8_ds_mla", batch, context, kv_cache_dtype="fp8_ds_mla", **mla)
    yield Case("soft cap", 64, 8192, soft_cap=30.0)
    yield Case("window", 64, 8192, sliding_window=1024)
    for context in (1024, 2048, 4096, 8192, 16384):
        yield Case("series", 8, context, peers=("flashinfer", "gather_sdpa", "pallas"), series=True)
    for layout in ("HND", "KV_NHD", "PACKED_NHD", "BLOCK_KV_HND"):
        for batch, context in SIZES:
            yield Case("decode", batch, context, layout)


def torch_results(inputs: Inputs, calls: peers.Calls) -> dict[str, Any]:
    """Time and error of calls, one for each set of inputs."""
    return {"error": inputs.error(calls[0]()), "us": torch_time(calls) * 1e6}


def measure(case: Case, copied: float, peers_too: bool, jax_too: bool) -> dict[str, Any]:
    """A row: all that is known of a case. `copied` is the bandwidth of a copy, in bytes a second."""
    inputs = Inputs(case)
    row: dict[str, Any] = {"case": case.name, "batch": case.batch, "context": case.context, "queries": case.queries}
    row |= {"layout": str(inputs.layout), "layout_name": case.layout, "series": case.series, "size": case.size}
    stored = KV_CACHE_DTYPES[case.kv_cache_dtype]
    row |= {"cache_dtype": stored.name if stored else "bfloat16", "per_token_head": case.per_token_head}
    row |= {"heads": [case.q_heads, case.kv_heads], "head_sizes": [case.head_size, case.head_size_v]}
    row |= {"bytes": case.read, "limit_us": case.read / copied * 1e6, "flops": case.flops, "failed": {}}

    def attempt(name: str, results: Callable[[], dict[str, Any]]) -> None:
        """A failure is a result: the others go on."""
        try:
            found = results()
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:500]}"
            return
        row.update({f"{name}_{key}": value for key, value in found.items()})
        row[f"{name}_ratio"] = row["limit_us"] / found["us"]
        row[f"{name}_tflops"] = case.flops / found["us"] / 1e6
        if not found["error"] <= TOLERANCE:
            row["failed"][name] = f"off by {found['error']:.2g} of the largest element"

    attempt("torchkv", lambda: torch_results(inputs, ours(inputs)))
    names = case.peers if peers_too else ()
    for name in (n for n in names if n in peers.TORCH):
        attempt(name, lambda name=name: torch_results(inputs, peers.TORCH[name](inputs)))
        _free()
    if jax_too:
        estimate = row.get("torchkv_us", 1e3) / 1e6 if inputs.device == "cuda" else 1e-3
        arrays = functools.cache(lambda: JaxInputs(inputs))
        attempt("jaxkv", lambda: arrays().results(arrays().ours(), estimate))
        for name in (n for n in names if n in peers.JAX):
            # Twice as slow as ours, or more: the loop may be shorter.
            attempt(name, lambda name=name: arrays().results(peers.JAX[name](inputs, arrays().caches), 2 * estimate))
            _free()
        if case.series and "pallas_setting" in row:
            peers.prefer_pallas_setting(row["pallas_setting"])
    return row


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare_with_bf16(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds how many times as many tokens a second a quantised cache gives, in the same run."""
    bf16 = ("MLA" if row["layout_name"] == "MLA" else "decode", row["size"], row["layout_name"])
    for other in rows:
        if row["cache_dtype"] != "bfloat16" and (other["case"], other["size"], other["layout_name"]) == bf16:
            for name in ("torchkv", "jaxkv"):
                if f"{name}_us" in row and f"{name}_us" in other:
                    row[f"{name}_vs_bf16"] = other[f"{name}_us"] / row[f"{name}_us"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
    parser.add_argument("--cases", nargs="+", help="any of these, as 'decode HND 64x8192' or 'quantised'")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--no-peers", action="store_true", help="this package only")
    parser.add_argument("--no-jax", action="store_true", help="torch only")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="N", help="begin no case after so long")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="smaller sizes, for a CPU")
    parser.add_argument("--build", action="store_true", help="compile FlashInfer, which takes a minute, and stop")
    args = parser.parse_args(argv)
    if args.build:
        return peers.build_flashinfer()
    started = time.perf_counter()
    copied = bandwidth(COPY_BYTES // args.divide)
    print(f"copy: {copied / 1e12:.3f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases():
        words = {*case.name.split(), case.size, case.layout, "" if case.kv_cache_dtype == "auto" else "quantised"}
        chosen = not args.cases or any(words.issuperset(each.split()) for each in args.cases)
        if not chosen or time.perf_counter() - started > args.seconds:
            continue
        row = measure(case.divided(args.divide), copied, not args.no_peers, not args.no_jax)
        compare_with_bf16(row, rows)
        rows.append(row)
        _free()
        times = "  ".join(f"{key[:-3]} {value:.1f}" for key, value in row.items() if key.endswith("_us"))
        what = f"{case.name} {case.layout} {row['size']}"
        print(f"{time.perf_counter() - started:4.0f} s  {what}, µs: {times}", flush=True)
        for name, what in row["failed"].items():
            print(f"        {name}: {what[:200]}", flush=True)
        more = {"block_size": BLOCK_SIZE, "copy_tb_s": copied / 1e12, "peers": peers.versions()}
        report.save(args.json, rows, benchmark="attention", **more)
    print_tables(rows)
    return None


def print_tables(rows: list[dict[str, Any]]) -> None:
    columns = {"case": "s", "layout_name": "s", "size": "s", "limit_us": ".1f", "torchkv_us": ".1f", "jaxkv_us": ".1f"}
    decode = [row for row in rows if row["queries"] == 1]
    names = ("torchkv", "jaxkv", *PEERS, "flex")
    shown = {f"{n}_ratio": ".3f" for n in names if any(f"{n}_ratio" in row for row in decode)}
    versus = {f"{n}_vs_bf16": ".2f" for n in names[:2] if any(f"{n}_vs_bf16" in row for row in decode)}
    if decode:
        print(report.table(decode, columns | shown | versus))
    prefill = [row for row in rows if row["queries"] > 1]
    if prefill:
        shown = {f"{n}_tflops": ".0f" for n in names if any(f"{n}_tflops" in row for row in prefill)}
        print(report.table(prefill, columns | {"flashinfer_us": ".1f"} | shown))

"""Cache writes against the limit: a plain copy of the same bytes, in the same run.

`uv run python -m benchmarks write [--json FILE]`. Columns: `ratio` is the copy's time over the op's, 1 being the limit;
`rival` columns are the same for what people write without this package.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import torchkv
from benchmarks import report
from benchmarks.timing import host_time, jax_time, torch_time
from kvcore.layout import CacheLayout

BLOCK_SIZE, HEADS = 16, 8
SETS = 4  # inputs, and places in the cache, that calls take turns with, so that nothing stays in the L2 cache


@dataclass(frozen=True)
class Case:
    """What is written, and how."""

    name: str
    layout: str
    head_size: int = 128
    head_size_v: int = 128
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    cache_dtype: str = "bfloat16"
    consecutive: bool = False  # slots of a prefill, rather than scattered ones
    rivals: bool = False  # whether what people write without this package is timed, too
    decode: bool = False  # whether small batches are timed, too
    layers: int | None = None

    def moved(self, tokens: int) -> int:
        """Bytes read and written."""
        sizes = {"bfloat16": 2, "float16": 2, "float32": 4}
        elements = tokens * HEADS * (self.head_size + self.head_size_v)
        return elements * (sizes[self.dtype] + sizes.get(self.cache_dtype, 1))


CASES = (
    Case("NHD", "NHD", rivals=True, decode=True),
    Case("HND", "HND", decode=True),
    Case("head-major, consecutive", "HEAD_MAJOR", consecutive=True, decode=True),
    Case("head-major, scattered", "HEAD_MAJOR"),
    Case("Pallas", "PALLAS"),
    Case("kv in front", "KV_NHD"),
    Case("kv within block, NHD", "BLOCK_KV_NHD"),
    Case("kv within block, HND", "BLOCK_KV_HND"),
    Case("k+v NHD", "PACKED_NHD"),
    Case("k+v HND", "PACKED_HND"),
    Case("k+v NHD 192/128", "PACKED_NHD", head_size=192, decode=True),
    Case("interleaved heads", "INTERLEAVED"),
    Case("NHD, layer", "NHD", layers=2, decode=True),
    Case("NHD e4m3", "NHD", kv_cache_dtype="fp8_e4m3", cache_dtype="float8_e4m3fn", decode=True),
    Case("NHD e5m2", "NHD", kv_cache_dtype="fp8_e5m2", cache_dtype="float8_e5m2"),
    Case("HND e4m3", "HND", kv_cache_dtype="fp8_e4m3", cache_dtype="float8_e4m3fn"),
    Case("NHD float16", "NHD", dtype="float16", cache_dtype="float16"),
    Case("NHD float32", "NHD", dtype="float32", cache_dtype="float32", rivals=True),
    Case("NHD float32 to bf16", "NHD", dtype="float32"),
    Case("NHD, heads of 80", "NHD", head_size=80, head_size_v=80),
    Case("HND, heads of 120", "HND", head_size=120, head_size_v=120),
)


class Inputs:
    """Random keys, values and slots, and caches for them, on the device that torch has."""

    def __init__(self, case: Case, tokens: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        layout = CacheLayout.of(case.layout)
        self.layout = layout.with_layer() if case.layers else layout
        self.layer = 1 if case.layers else None
        self.num_blocks = SETS * -(-tokens // BLOCK_SIZE)
        shapes = self.layout.shapes(
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_heads=HEADS,
            head_size=case.head_size,
            head_size_v=case.head_size_v,
            num_layers=case.layers,
            x=8 if "dim/x" in str(layout) else None,
        )
        rows = [
            torch.randn((SETS, tokens, HEADS, size), device=device, generator=generator).to(getattr(torch, case.dtype))
            for size in (case.head_size, case.head_size_v)
        ]
        slots = torch.arange(self.num_blocks * BLOCK_SIZE, device=device)
        if not case.consecutive:
            slots = slots[torch.randperm(len(slots), device=device, generator=generator)]
        self.sets = list(zip(rows[0], rows[1], slots[: SETS * tokens].view(SETS, tokens), strict=True))
        self.caches = [torch.zeros(s, dtype=getattr(torch, case.cache_dtype), device=device) for s in shapes]
        quantised = case.kv_cache_dtype != "auto"
        self.scales = [torch.tensor(s, device=device) if quantised else None for s in (0.5, 0.25)]

    def call(self, module: Any, key: Any, value: Any, caches: Any, slots: Any, kv_cache_dtype: str, scales: Any) -> Any:
        """The op, of torchkv or jaxkv."""
        op = module.reshape_and_cache_flash_diffkv if self.layout.single_array else module.reshape_and_cache_flash
        return op(key, value, *caches, slots, kv_cache_dtype, *scales, layout=self.layout, layer=self.layer)


def copy_time(moved: int) -> float:
    """A plain copy that reads and writes as many bytes in total."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = [torch.randint(0, 255, (2, moved // 2), dtype=torch.uint8, device=device) for _ in range(SETS)]
    return torch_time([lambda b=b: b[1].copy_(b[0]) for b in buffers])


def torch_times(case: Case, inputs: Inputs) -> dict[str, float]:
    """torchkv, and index_put_."""

    def writes(k: Any, v: Any, s: Any) -> Callable[[], Any]:
        return lambda: inputs.call(torchkv, k, v, inputs.caches, s, case.kv_cache_dtype, inputs.scales)

    times = {"torch": torch_time([writes(*x) for x in inputs.sets])}
    if torch.cuda.is_available() and inputs.sets[0][2].numel() == 1:
        times["torch_host"] = host_time(writes(*inputs.sets[0]))
    if case.rivals:

        def puts(k: Any, v: Any, s: Any) -> Callable[[], Any]:
            block, place = s // BLOCK_SIZE, s % BLOCK_SIZE
            return lambda: [cache.index_put_((block, place), x) for cache, x in zip(inputs.caches, (k, v), strict=True)]

        times["index_put_"] = torch_time([puts(*x) for x in inputs.sets])
    return times


def jax_times(case: Case, inputs: Inputs, estimate: float) -> dict[str, float]:
    """jaxkv, and XLA's scatters; `estimate` is about what a call takes, in seconds."""
    import jax.numpy as jnp

    import jaxkv

    def convert(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else jnp.from_dlpack(tensor.contiguous())

    sets = [tuple(convert(t) for t in (k, v, s.int())) for k, v, s in inputs.sets]
    scales = [convert(s) for s in inputs.scales]
    shapes = [c.shape for c in inputs.caches]

    def caches() -> tuple[Any, ...]:
        return tuple(jnp.zeros(s, case.cache_dtype) for s in shapes)

    def measure(write: Callable[..., Any], start: Any) -> float:
        def step(carry: Any, sets: Any) -> Any:
            # XLA makes a CUDA graph of a loop's body. 32 calls: what it takes to launch one must not show.
            for k, v, s in sets * 8:
                carry = write(carry, k, v, s)
            return carry

        return jax_time(step, start, sets, 8 * len(sets), estimate)

    def ours(carry: Any, k: Any, v: Any, s: Any) -> Any:
        new = inputs.call(jaxkv, k, v, carry, s, case.kv_cache_dtype, scales)
        return new if isinstance(new, tuple) else (new,)

    times = {"jax": measure(ours, caches())}
    if case.rivals:

        def two_index(carry: Any, k: Any, v: Any, s: Any) -> Any:
            at = s // BLOCK_SIZE, s % BLOCK_SIZE
            return tuple(c.at[at].set(x, mode="drop") for c, x in zip(carry, (k, v), strict=True))

        def flat(carry: Any, k: Any, v: Any, s: Any) -> Any:
            return tuple(c.at[s].set(x, mode="drop", unique_indices=True) for c, x in zip(carry, (k, v), strict=True))

        times["xla_two_index"] = measure(two_index, caches())
        times["xla_flat"] = measure(flat, tuple(c.reshape(-1, *c.shape[2:]) for c in caches()))
    return times


def main(argv: list[str]) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks write", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256, 8192, 65536] if gpu else [16, 1024])
    parser.add_argument("--cases", nargs="+", help="parts of the cases' names; default: all")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--no-jax", action="store_true", help="torch only")
    args = parser.parse_args(argv)
    rows = []
    for tokens in args.tokens:
        for case in CASES:
            if args.cases and not any(part in case.name for part in args.cases):
                continue
            if tokens < 1024 and gpu and not case.decode:
                continue
            inputs = Inputs(case, tokens)
            row: dict[str, Any] = {"tokens": tokens, "case": case.name, "layout": str(inputs.layout)}
            row |= {"head_size": case.head_size, "head_size_v": case.head_size_v, "heads": HEADS}
            row |= {"dtype": case.dtype, "cache_dtype": case.cache_dtype, "bytes": case.moved(tokens)}
            times = {"copy": copy_time(row["bytes"])}
            times |= torch_times(case, inputs)
            if not args.no_jax:
                times |= jax_times(case, inputs, times["torch"] if gpu else 1e-3)
            row |= {f"{name}_us": seconds * 1e6 for name, seconds in times.items()}
            row |= {
                f"{name}_ratio": times["copy"] / s for name, s in times.items() if name not in ("copy", "torch_host")
            }
            row["copy_tb_s"] = row["bytes"] / times["copy"] / 1e12
            rows.append(row)
            print(f"{tokens:6} {case.name}", flush=True)
            report.save(args.json, rows, benchmark="write", block_size=BLOCK_SIZE)
    times = dict.fromkeys(("copy_us", "torch_us", "jax_us"), ".2f") | {"torch_host_us": ".1f"}
    ratios = ("torch", "jax", "index_put_", "xla_flat", "xla_two_index")
    columns = {"tokens": "d", "case": "s", "copy_tb_s": ".2f"} | times | {f"{name}_ratio": ".3f" for name in ratios}
    print(report.table(rows, columns))

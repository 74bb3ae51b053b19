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
from benchmarks.common import BLOCK_SIZE, SETS, copy_time
from benchmarks.timing import host_time, jax_time, torch_time
from kvcore.cache_spec import CacheSpec

HEADS = 8


@dataclass(frozen=True)
class Case:
    """What is written, and how. Head sizes of MLA are those of its cache, as attention sees it."""

    name: str
    layout: str
    heads: int = HEADS
    head_size: int = 128
    head_size_v: int = 128
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    cache_dtype: str = "bfloat16"
    scales: str = "tensor"  # what has one of its own where elements are quantised: "tensor", "head" or "token head"
    consecutive: bool = False  # slots of a prefill, rather than scattered ones
    rivals: bool = False  # whether what people write without this package is timed, too
    decode: bool = False  # whether small batches are timed, too
    layers: int | None = None

    @property
    def quantised(self) -> bool:
        return self.kv_cache_dtype != "auto"

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of a head of the two inputs: of kv_c and k_pe for MLA."""
        latent = self.layout == "MLA"
        return (self.head_size_v, self.head_size - self.head_size_v) if latent else (self.head_size, self.head_size_v)

    def spec(self, num_blocks: int) -> CacheSpec:
        """Caches with so many blocks."""
        return CacheSpec.create(
            self.layers, num_blocks, BLOCK_SIZE, self.heads, self.head_size, self.head_size_v,
            "bfloat16" if self.quantised else self.cache_dtype, self.layout, self.kv_cache_dtype,
            self.scales == "token head",
        )  # fmt: skip

    def moved(self, tokens: int) -> int:
        """Bytes read and written, scales that are computed among them."""
        read = self.heads * sum(self.sizes) * getattr(torch, self.dtype).itemsize
        return tokens * (read + self.spec(1).nbytes // (BLOCK_SIZE * (self.layers or 1)))


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
    Case("NHD e4m3fnuz", "NHD", kv_cache_dtype="fp8_e4m3fnuz", cache_dtype="uint8"),
    Case("NHD e4m3, head", "NHD", kv_cache_dtype="fp8_e4m3", cache_dtype="uint8", scales="head"),
    Case("NHD e4m3, token head", "NHD", kv_cache_dtype="fp8", cache_dtype="uint8", scales="token head"),
    Case("NHD int8", "NHD", kv_cache_dtype="int8", cache_dtype="uint8"),
    Case("NHD int8, token head", "NHD", kv_cache_dtype="int8", cache_dtype="uint8", scales="token head", decode=True),
    Case("NHD int4", "NHD", kv_cache_dtype="int4", cache_dtype="uint8"),
    Case("NHD int4, token head", "NHD", kv_cache_dtype="int4", cache_dtype="uint8", scales="token head"),
    Case("NHD nvfp4", "NHD", kv_cache_dtype="nvfp4", cache_dtype="uint8", decode=True),
    Case("MLA", "MLA", 1, 576, 512),
    Case("MLA fp8_ds_mla", "MLA", 1, 576, 512, kv_cache_dtype="fp8_ds_mla", cache_dtype="uint8", decode=True),
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
        self.case = case
        num_blocks = SETS * -(-tokens // BLOCK_SIZE)
        spec = case.spec(num_blocks)
        self.layout = spec.layout
        dtype = getattr(torch, case.dtype)
        rows = [
            torch.randn((SETS, tokens, case.heads, size), device=device, generator=generator).to(dtype)
            for size in case.sizes
        ]
        slots = torch.arange(num_blocks * BLOCK_SIZE, device=device)
        if not case.consecutive:
            slots = slots[torch.randperm(len(slots), device=device, generator=generator)]
        self.caches = [torch.zeros(s, dtype=getattr(torch, case.cache_dtype), device=device) for s in spec.shapes]
        self.caches += [torch.zeros(s, device=device) for s in spec.scale_shapes]
        self.scales: list[torch.Tensor] = []
        if case.quantised and case.scales != "token head" and case.kv_cache_dtype != "fp8_ds_mla":
            how: Any = (case.kv_cache_dtype, case.scales)
            self.scales = list(torchkv.kv_scales(rows[0][0], rows[1][0], *how))
        if self.layout.latent:
            rows = [x.squeeze(2) for x in rows]
        self.sets = list(zip(rows[0], rows[1], slots[: SETS * tokens].view(SETS, tokens), strict=True))

    def call(self, module: Any, key: Any, value: Any, caches: Any, slots: Any, scales: Any) -> Any:
        """The op, of torchkv or jaxkv. `caches` include those of scales."""
        name = "reshape_and_cache_flash"
        options: dict[str, Any] = {"layer": 1 if self.case.layers else None}
        if self.layout.latent:
            name = "concat_and_cache_mla"
        else:
            options["layout"] = self.layout
            name += "_diffkv" if self.layout.single_array else ""
            name += "_per_token_head_quant" if self.case.scales == "token head" else ""
        return getattr(module, name)(key, value, *caches, slots, self.case.kv_cache_dtype, *scales, **options)


def torch_times(case: Case, inputs: Inputs) -> dict[str, float]:
    """torchkv, and index_put_."""

    def writes(k: Any, v: Any, s: Any) -> Callable[[], Any]:
        return lambda: inputs.call(torchkv, k, v, inputs.caches, s, inputs.scales)

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

    def convert(tensor: torch.Tensor) -> Any:
        return jnp.from_dlpack(tensor.contiguous())

    sets = [tuple(convert(t) for t in (k, v, s.int())) for k, v, s in inputs.sets]
    scales = [convert(s) for s in inputs.scales]
    shapes = [(c.shape, str(c.dtype).removeprefix("torch.")) for c in inputs.caches]
    again = 8 if torch.cuda.is_available() else 1

    def caches() -> tuple[Any, ...]:
        return tuple(jnp.zeros(*shape) for shape in shapes)

    def measure(write: Callable[..., Any], start: Any) -> float:
        def step(carry: Any, sets: Any) -> Any:
            # XLA makes a CUDA graph of a loop's body. 32 calls: what it takes to launch one must not show.
            for k, v, s in sets * again:
                carry = write(carry, k, v, s)
            return carry

        return jax_time(step, start, sets, again * len(sets), estimate)

    def ours(carry: Any, k: Any, v: Any, s: Any) -> Any:
        new = inputs.call(jaxkv, k, v, carry, s, scales)
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
    parser.add_argument("--cases", nargs="+", help="parts of the cases' names, or 'quantised'; default: all")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--no-jax", action="store_true", help="torch only")
    args = parser.parse_args(argv)
    rows = []
    for tokens in args.tokens:
        for case in CASES:
            named = f"{case.name} quantised" if case.quantised else case.name
            if args.cases and not any(part in named for part in args.cases):
                continue
            if tokens < 1024 and gpu and not case.decode:
                continue
            inputs = Inputs(case, tokens)
            row: dict[str, Any] = {"tokens": tokens, "case": case.name, "layout": str(inputs.layout)}
            row |= {"head_size": case.head_size, "head_size_v": case.head_size_v, "heads": case.heads}
            row |= {"dtype": case.dtype, "cache_dtype": case.cache_dtype, "bytes": case.moved(tokens)}
            row |= {"kv_cache_dtype": case.kv_cache_dtype, "scales": case.scales if case.quantised else None}
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

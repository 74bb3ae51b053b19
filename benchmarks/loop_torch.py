"""The table `torch` of `benchmarks loop`: `rope_and_cache` against a copy of its bytes, and against what others do.

A copy's bytes are those of query, twice, of key, value and what the cache holds of them; the table of cosines and sines
stays in the L2 cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch

import torchkv
from benchmarks.common import BLOCK_SIZE, SETS, copy_time
from benchmarks.timing import host_time, torch_time

MAX_POSITION = 4096
EPSILON = 1e-6
SCALE = 0.03125


@dataclass(frozen=True)
class Case:
    """How the cache holds keys and values, and whether heads are normed before they are rotated."""

    name: str
    kv_cache_dtype: str = "auto"
    token_head: bool = False  # whether each token's head has a scale of its own
    norm: bool = False

    @property
    def stored(self) -> tuple[torch.dtype, int]:
        """The cache's dtype, and the bytes that a head has in the cache beside its elements."""
        dtype = torch.bfloat16 if self.kv_cache_dtype == "auto" else torch.float8_e4m3fn
        return dtype, 4 if self.token_head else 0


CASES = (
    Case("bf16"),
    Case("bf16, norm", norm=True),
    Case("fp8", "fp8"),
    Case("fp8, norm", "fp8", norm=True),
    Case("fp8, token head", "fp8", token_head=True),
)


class Set(NamedTuple):
    """Inputs of a call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    out: torch.Tensor


class Inputs:
    """Random projections, whose slices are query, key and value, and caches for them, on torch's device."""

    def __init__(self, case: Case, tokens: int, heads: int, head_size: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        self.case, q_heads = case, 4 * heads
        self.num_blocks = SETS * -(-tokens // BLOCK_SIZE)
        dtype, more = case.stored
        shape = (self.num_blocks, BLOCK_SIZE, heads, head_size)
        self.caches = [torch.zeros(shape, device=device).to(dtype) for _ in range(2)]
        self.scale_caches = [torch.zeros(shape[:3], device=device) for _ in range(2 * case.token_head)]
        static = case.kv_cache_dtype != "auto" and not case.token_head
        self.scales = [torch.full((1,), SCALE * n, device=device) for n in (1, 2)] if static else []
        self.cos_sin = torchkv.rope_table({"head_dim": head_size}, MAX_POSITION, device=device)
        weights = torch.rand((2, head_size), device=device, generator=generator) + 0.5
        self.norms = list(weights.bfloat16()) if case.norm else [None, None]
        self.sets = []
        slots = torch.randperm(self.num_blocks * BLOCK_SIZE, device=device, generator=generator)
        for start in range(0, SETS * tokens, tokens):
            qkv = torch.randn((tokens, q_heads + 2 * heads, head_size), device=device, generator=generator).bfloat16()
            query, key, value = qkv.split([q_heads, heads, heads], dim=1)
            positions = torch.randint(0, MAX_POSITION, (tokens,), device=device, generator=generator)
            out = torch.empty((tokens, q_heads, head_size), dtype=qkv.dtype, device=device)
            self.sets.append(Set(query, key, value, positions, slots[start : start + tokens], out))
        read = head_size * (2 * q_heads + 2 * heads) * 2
        self.moved = tokens * (read + 2 * heads * (head_size * dtype.itemsize + more))

    def clear(self) -> None:
        for cache in (*self.caches, *self.scale_caches):
            cache.zero_()


Peer = Callable[[Inputs, Set], Callable[[], torch.Tensor]]
"""Makes a call that writes key and value, and returns the new query."""


def fused(inputs: Inputs, of: Set) -> Callable[[], torch.Tensor]:
    options: dict[str, Any] = {"rope": "neox", "kv_cache_dtype": inputs.case.kv_cache_dtype, "eps": EPSILON}
    options |= dict(zip(("q_norm", "k_norm"), inputs.norms, strict=True))
    options |= dict(zip(("k_scale", "v_scale"), inputs.scales, strict=False))
    caches = (*inputs.caches, *inputs.scale_caches)
    rows = of.query, of.key, of.value, caches, of.positions, inputs.cos_sin, of.slots
    return lambda: torchkv.rope_and_cache(*rows, **options, out=of.out)


def separate(inputs: Inputs, of: Set) -> Callable[[], torch.Tensor]:
    """Norm and rotation as torch.compile fuses them, then torchkv's writer."""
    rotate = _rotate if of.query.device.type == "cpu" else torch.compile(_rotate, dynamic=False)
    name = "reshape_and_cache_flash" + "_per_token_head_quant" * inputs.case.token_head
    write = getattr(torchkv, name)
    caches = (*inputs.caches, *inputs.scale_caches)

    def call() -> torch.Tensor:
        query, key = rotate(of.query, of.key, of.positions, inputs.cos_sin, *inputs.norms)
        write(key, of.value, *caches, of.slots, inputs.case.kv_cache_dtype, *inputs.scales)
        return query

    return call


def _rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = cos_sin[positions][:, None].chunk(2, dim=-1)

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + EPSILON) * weight.float()
        left, right = wide.chunk(2, dim=-1)
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1).to(x.dtype)

    return one(query, q_norm), one(key, k_norm)


def _pages(of: Set) -> tuple[torch.Tensor, ...]:
    """Slots as FlashInfer has them, each token a sequence of its own: indices of pages, where each starts, sequence."""
    device = of.slots.device
    starts = torch.arange(len(of.slots) + 1, dtype=torch.int32, device=device)
    return (of.slots // BLOCK_SIZE).int(), starts, starts[:-1].clone(), (of.slots % BLOCK_SIZE).int()


def flashinfer_fused(inputs: Inputs, of: Set) -> Callable[[], torch.Tensor]:
    """FlashInfer's one kernel; it stores query as fp8, too, half the bytes."""
    from flashinfer.rope import rope_quantize_fp8_append_paged_kv_cache  # type: ignore[import-not-found]

    if inputs.case != CASES[2]:
        raise ValueError("it has only fp8 with one scale, and no norms")
    pages, starts, sequences, places = _pages(of)
    out = torch.empty_like(of.out, dtype=torch.float8_e4m3fn)
    nothing = torch.empty((*of.out.shape[:2], 0), dtype=out.dtype, device=out.device)

    def call() -> torch.Tensor:
        rope_quantize_fp8_append_paged_kv_cache(
            of.query, of.key, None, None, of.value, inputs.cos_sin, of.positions.int(), tuple(inputs.caches), pages,
            starts, sequences, places, quantize_dtype=out.dtype, quant_scale_q=1.0, quant_scale_kv=1 / SCALE,
            page_size=BLOCK_SIZE, q_rope_out=out, q_nope_out=nothing,
        )  # fmt: skip
        return out

    return call


def flashinfer_separate(inputs: Inputs, of: Set) -> Callable[[], torch.Tensor]:
    """FlashInfer's rotation, then its append."""
    from flashinfer.page import append_paged_kv_cache  # type: ignore[import-not-found]
    from flashinfer.rope import apply_rope_with_cos_sin_cache  # type: ignore[import-not-found]

    if inputs.case != CASES[0]:
        raise ValueError("it has only bfloat16, and no norms")
    pages, starts, sequences, places = _pages(of)
    head_size = of.query.shape[-1]
    last = torch.full_like(sequences, BLOCK_SIZE)

    def call() -> torch.Tensor:
        query, key = apply_rope_with_cos_sin_cache(
            of.positions, of.query.flatten(1), of.key.flatten(1), head_size, inputs.cos_sin
        )
        key = key.view(of.key.shape)
        append_paged_kv_cache(key, of.value, sequences, places, tuple(inputs.caches), pages, starts, last)
        return query.view(of.query.shape)

    return call


PEERS: dict[str, Peer] = {
    "fused": fused,
    "separate": separate,
    "flashinfer_fused": flashinfer_fused,
    "flashinfer_separate": flashinfer_separate,
}


def check(inputs: Inputs, calls: dict[str, Callable[[], torch.Tensor]]) -> dict[str, str]:
    """What is wrong with what calls write and return, by their names: they agree with `separate` up to rounding."""
    results = {}
    for name, call in calls.items():
        inputs.clear()
        # fp8 in torch has no arithmetic, and FlashInfer has one scale for both, half of what V's is here.
        query, rows = call().float(), [cache.float() for cache in inputs.caches]
        results[name] = [query, rows[0], rows[1] * (0.5 if name == "flashinfer_fused" else 1)]
    wrong = {}
    for name, found in results.items():
        for what, a, b in zip(("query", "keys", "values"), results["separate"], found, strict=True):
            eighth = name == "flashinfer_fused" or (inputs.case.kv_cache_dtype != "auto" and what != "query")
            step = (2 if name.startswith("flashinfer") else 1) * (0.125 if eighth else 2**-7)
            close = (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * step + (2**-8 if eighth else 1e-5)
            if not close.all():
                wrong[name] = f"gives other {what} than torch's own operations"
    if not results["separate"][1].any():
        wrong["separate"] = "writes nothing"
    return wrong


def measured(sizes: Sequence[int], small: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table."""
    gpu = torch.cuda.is_available()
    for tokens in sizes:
        for case in CASES:
            inputs = Inputs(case, tokens, *((2, 16) if small else (8, 128)))
            failed: dict[str, str] = {}
            calls: dict[str, list[Callable[[], torch.Tensor]]] = {}
            for name, peer in PEERS.items():
                try:
                    calls[name] = [peer(inputs, of) for of in inputs.sets]
                    calls[name][0]()
                except Exception as error:  # whatever keeps a peer from running is a result
                    calls.pop(name, None)
                    failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
            if "separate" in calls:
                failed |= check(inputs, {name: each[0] for name, each in calls.items()})
            row: dict[str, Any] = {"table": "torch", "case": case.name, "tokens": tokens, "norm": case.norm}
            row |= {"kv_cache_dtype": case.kv_cache_dtype, "bytes": inputs.moved, "failed": failed}
            copy = copy_time(inputs.moved)
            row["copy_us"] = copy * 1e6
            for name, each in calls.items():
                if name not in failed:
                    seconds = torch_time(each)
                    row |= {f"{name}_us": seconds * 1e6, f"{name}_ratio": copy / seconds}
            if gpu and "fused" in calls and tokens == min(sizes):
                row["fused_host_us"] = host_time(calls["fused"][0]) * 1e6
            yield row


def flashinfer_version() -> str | None:
    try:
        return metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return None

"""Attention as people compute it without this package. Every peer may be missing or fail: its error becomes a result.

A peer of torch gives a call for each set of inputs. A peer of JAX gives, for each setting to be tried, a function
`(query, tables, seq_lens, arrays) -> out` and its arrays.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.attention_inputs import Inputs
from benchmarks.common import BLOCK_SIZE

Calls = list[Callable[[], Any]]
JaxPeer = tuple[str, Callable[..., Any], Any]


def flashinfer(inputs: Inputs) -> Calls:
    """FlashInfer's CUDA kernels; compiled by nvcc when first used, which takes a minute: see `build_flashinfer`."""
    import flashinfer as package  # type: ignore[import-not-found]

    case = inputs.case
    workspace = torch.zeros(2**28, dtype=torch.uint8, device=inputs.device)
    blocks = case.context // case.block_size
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * blocks
    full = torch.full((case.batch,), case.block_size, dtype=torch.int32)
    heads = (case.q_heads, case.kv_heads, case.head_size, case.block_size)
    options: dict[str, Any] = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if case.sliding_window is not None:
        options["window_left"] = case.sliding_window - 1
    if case.soft_cap is not None:
        options["logits_soft_cap"] = case.soft_cap
    caches = (inputs.caches[0], inputs.caches[1])

    def planned(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        if inputs.query_starts is None:
            wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(starts, tables.flatten(), full, *heads, **options)
        else:
            wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_flashinfer_backend())
            more = {"causal": case.causal, "head_dim_vo": case.head_size_v}
            wrapper.plan(inputs.query_starts.cpu(), starts, tables.flatten(), full, *heads, **more, **options)
        return lambda: wrapper.run(query, caches)

    return [planned(*each) for each in inputs.sets]


def flashinfer_mla(inputs: Inputs) -> Calls:
    """FlashInfer's CUDA kernels for the latent rows of MLA."""
    from flashinfer import mla  # type: ignore[import-not-found]

    case = inputs.case
    workspace = torch.zeros(2**28, dtype=torch.uint8, device=inputs.device)
    query_starts = torch.arange(case.batch + 1, dtype=torch.int32) if case.queries == 1 else inputs.query_starts
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * (case.context // case.block_size)

    def planned(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend=_flashinfer_backend())
        wrapper.plan(
            metadata=mla.MLAPlanMetadata.csr(query_starts, starts, tables.flatten(), inputs.seq_lens),
            num_heads=case.q_heads,
            head_dim_ckv=case.head_size_v,
            head_dim_kpe=case.head_size - case.head_size_v,
            page_size=case.block_size,
            causal=case.queries > 1,
            sm_scale=case.head_size**-0.5,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return lambda: wrapper.run(query=query, kv_cache=inputs.caches[0])

    return [planned(*each) for each in inputs.sets]


def _flashinfer_backend() -> str:
    """Its kernels for Hopper are named, so that it takes no others."""
    return "fa3" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else "auto"


def gather_sdpa(inputs: Inputs) -> Calls:
    """SDPA, torch's scaled_dot_product_attention, on K and V that `index_select` gathers, with the gather."""

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        blocks = tables.flatten()
        return lambda: _sdpa(inputs, query, *(_gathered(inputs, c.index_select(0, blocks)) for c in inputs.caches))

    return [call(*each) for each in inputs.sets]


def contiguous_sdpa(inputs: Inputs) -> Calls:
    """The same without the gather: K and V lie in sequence, as no paged cache has them."""

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        key, value = (_gathered(inputs, c.index_select(0, tables.flatten())) for c in inputs.caches)
        return lambda: _sdpa(inputs, query, key, value)

    return [call(*each) for each in inputs.sets]


def fused_sdpa(inputs: Inputs) -> Iterator[tuple[str, Calls]]:
    """The same with each of torch's fast kernels, by name, where torch has the same mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = inputs.case
    if case.sliding_window is not None or case.soft_cap is not None:
        raise ValueError("torch's SDPA has no window and no cap")
    if case.long != case.batch:
        raise ValueError("torch's SDPA has no ragged batches")
    if case.causal and case.queries != case.context:
        raise ValueError("in torch's causal mask, the first query sees the first position only")

    def with_backend(backend: SDPBackend, call: Callable[[], Any]) -> Callable[[], Any]:
        def attend() -> Any:
            with sdpa_kernel(backend):
                return call()

        return attend

    calls = contiguous_sdpa(inputs)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        yield backend.name, [with_backend(backend, call) for call in calls]


def _gathered(inputs: Inputs, blocks: torch.Tensor) -> torch.Tensor:
    """As `[batch, heads, context, dim]`."""
    case = inputs.case
    return blocks.view(case.batch, case.context, case.kv_heads, -1).transpose(1, 2)


def _sdpa(inputs: Inputs, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.bias import causal_lower_right

    case = inputs.case
    query = query.view(case.batch, case.queries, case.q_heads, case.head_size).transpose(1, 2)
    options: dict[str, Any] = {"enable_gqa": case.q_heads != case.kv_heads}
    if case.causal and case.queries == case.context:
        options["is_causal"] = True
    elif case.causal and case.queries > 1:
        options["attn_mask"] = causal_lower_right(case.queries, case.context)
    out = F.scaled_dot_product_attention(query, key, value, **options)
    return out.transpose(1, 2).reshape(-1, case.q_heads, case.head_size_v)


def flex(inputs: Inputs) -> Calls:
    """FlexAttention of torch, compiled, with the block tables as the indices of its block mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    case = inputs.case
    attend: Any = torch.compile(flex_attention, dynamic=False)
    # The whole cache is one sequence, of which every query sees the blocks of its table.
    key, value = (c.flatten(0, 1).transpose(0, 1)[None] for c in inputs.caches)

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        count = torch.full((case.batch, 1, 1), tables.shape[1], dtype=torch.int32, device=inputs.device)
        # As wide as there are blocks: BlockMask makes a dense array out of the indices.
        indices = torch.zeros((case.batch, 1, 1, inputs.num_blocks), dtype=torch.int32, device=inputs.device)
        indices[:, 0, 0, : tables.shape[1]] = tables
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count),
            torch.zeros_like(indices),
            count,
            indices,
            BLOCK_SIZE=(128, BLOCK_SIZE),
            seq_lengths=(1, inputs.num_blocks * BLOCK_SIZE),
        )
        return lambda: attend(query[:, :, None], key, value, block_mask=mask, enable_gqa=True)[:, :, 0]

    return [call(*each) for each in inputs.sets]


def flash_attn(inputs: Inputs) -> Calls:
    """flash-attn, on blocks of 256, the smallest that it takes, in an order as random."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    case = inputs.case

    def call(query: torch.Tensor, tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        order = torch.randperm(tables.numel() * BLOCK_SIZE // 256, device=inputs.device)
        caches = []
        for cache in inputs.caches:
            blocks = cache.index_select(0, tables.flatten()).view(-1, 256, case.kv_heads, case.head_size)
            caches.append(torch.empty_like(blocks).index_copy_(0, order, blocks))
        arguments = {"cache_seqlens": inputs.seq_lens, "block_table": order.int().view(case.batch, -1), "causal": True}
        return lambda: flash_attn_with_kvcache(query[:, None], *caches, **arguments)[:, 0]

    return [call(*each) for each in inputs.sets]


TORCH: dict[str, Callable[[Inputs], Calls]] = {
    "flashinfer": flashinfer,
    "gather_sdpa": gather_sdpa,
    "contiguous_sdpa": contiguous_sdpa,
    "flex": flex,
    "flash_attn": flash_attn,
}


# By name: how many times the splits, blocks together, warps, stages.
PALLAS_SETTINGS = {
    "128 positions, 4 warps, 3 stages": (1, 8, 4, 3),
    "64 positions, 4 warps, 4 stages": (1, 4, 4, 4),
    "128 positions, 8 warps, 2 stages": (1, 8, 8, 2),
    "128 positions, 4 warps, 3 stages, more splits": (4, 8, 4, 3),
}


def prefer_pallas_setting(name: str) -> None:
    """Has it tried first; the series tries no other."""
    setting = PALLAS_SETTINGS.pop(name)
    others = dict(PALLAS_SETTINGS)
    PALLAS_SETTINGS.clear()
    PALLAS_SETTINGS.update({name: setting} | others)


def pallas(inputs: Inputs, caches: Any) -> Iterator[JaxPeer]:
    """JAX's deprecated paged attention, in the layout that it wants, with several settings."""
    import warnings

    import jax
    import jax.numpy as jnp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    case = inputs.case
    pages = jax.jit(lambda c: [jnp.transpose(x, (2, 0, 1, 3)) for x in c])(caches)
    blocks = case.context // BLOCK_SIZE
    # About four programs for each of 132 multiprocessors; it has to divide the blocks.
    enough = 1 << (4 * 132 // (case.batch * case.kv_heads)).bit_length()
    scale = case.head_size**-0.5  # it has none of its own
    tried = list(PALLAS_SETTINGS.items())
    once = case.name == "series" or inputs.device == "cpu"
    for name, (more, together, warps, stages) in tried[:1] if once else tried:
        splits = max(1, min(enough * more, blocks // together))
        setting = {"k_splits": splits, "pages_per_compute_block": together, "num_warps": warps, "num_stages": stages}

        def attend(query: Any, tables: Any, seq_lens: Any, arrays: Any, setting: Any = setting) -> Any:
            query = (query * scale).astype(query.dtype)
            interpret = inputs.device == "cpu"
            return paged_attention(query, *arrays, tables, seq_lens, interpret=interpret, **setting)

        yield name, attend, pages


def xla_gather(inputs: Inputs, caches: Any) -> Iterator[JaxPeer]:
    """jax.nn.dot_product_attention on K and V that XLA gathers: by cuDNN, and by XLA's own operations."""
    import jax
    import jax.numpy as jnp

    case = inputs.case

    for implementation in ("cudnn", "xla"):

        def attend(query: Any, tables: Any, seq_lens: Any, arrays: Any, implementation: Any = implementation) -> Any:
            # Never true, but it makes the gather depend on the query: XLA would otherwise gather once for all calls.
            tables = tables + jnp.isnan(query[0, 0, 0]).astype(tables.dtype)
            key, value = (c[tables].reshape(case.batch, case.context, *c.shape[2:]) for c in arrays)
            return jax.nn.dot_product_attention(query[:, None], key, value, implementation=implementation)[:, 0]

        yield implementation, attend, caches


JAX: dict[str, Callable[[Inputs, Any], Iterator[JaxPeer]]] = {"pallas": pallas, "xla_gather": xla_gather}


def versions() -> dict[str, str]:
    """Of the peers that are installed beside torch and JAX."""
    from importlib import metadata

    found = {}
    for package in ("flashinfer-python", "flash-attn", "nvidia-cudnn-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def build_flashinfer() -> None:
    """Compiles FlashInfer's kernels, so that a benchmark that follows finds them. Can run beside other work."""
    from concurrent.futures import ThreadPoolExecutor

    from benchmarks.attention_inputs import Case

    cases = [Case("decode", 2, 32), Case("prefill", 1, 64, queries=32)]
    with ThreadPoolExecutor() as pool:
        for calls in pool.map(flashinfer, map(Inputs, cases)):
            calls[0]()
    torch.cuda.synchronize()

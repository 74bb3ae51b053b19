"""The writer that rotates queries and keys on their way."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcore.choices import KVCacheDtype, Layout, RopeName, TorchBackend
from kvcore.contract.checks import check_options
from kvcore.contract.rope import check_rope_options
from kvcore.layout import CacheLayout
from torchkv._arguments import (
    BACKENDS,
    as_format,
    as_layer,
    as_memory,
    as_pattern,
    as_scale,
    as_scale_pattern,
    check_tensors,
    refuse_gradients,
)
from torchkv._library import rope as _library
from torchkv._library.base import call, call_again


def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    caches: Tensor | Sequence[Tensor],
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    *,
    rope: RopeName = "neox",
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_cache_dtype: KVCacheDtype = "auto",
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    layout: Layout | None = None,
    scale_layout: str | CacheLayout | None = None,
    layer: int | Tensor | None = None,
    out: Tensor | None = None,
    backend: TorchBackend | None = None,
) -> Tensor:
    """Rotates queries and keys by their positions, writes keys and values into a paged KV cache, and returns the query.

    With a norm, a head x becomes `x * (1 / sqrt(mean(x²) + eps)) * weights` before. Then a pair (a, b) of its first
    rotary_dim elements becomes `(a cos - b sin, b cos + a sin)`. All of it is float32 arithmetic, each operation
    rounded once. Key is then written as the writers write float32: rounded to the cache's dtype, or quantised; value as
    it came.

    Token t goes to slot `slot_mapping[t]`, as with `reshape_and_cache_flash`; every row of query is rotated. A position
    outside the table makes zeros of query's row, and of the key that is written. Negative ones are for padding.

    Everything runs on the current stream of the tensors' device and nothing is synchronised, so that CUDA graphs can
    capture it; nothing is allocated where out is given. Tensors may be strided. Caches are changed in place.

    Of MLA (one cache, layout `block slot latent`), key is kv_c `[num_tokens, kv_lora_rank]`, which k_norm norms, value
    is k_pe `[num_tokens, qk_rope_head_dim]`, which is rotated, and query has heads like k_pe.

    Args:
        query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32.
        key: `[num_tokens, num_heads, head_size]` of query's dtype.
        value: `[num_tokens, num_heads, head_size_v]` of query's dtype.
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both; then, where each token's head
            is to have a scale of its own, `k_scale_cache, v_scale_cache`.
        positions: `[num_tokens]` of int32 or int64; `[3, num_tokens]` with mrope_section.
        cos_sin: `[max_position, rotary_dim]` of float32 or query's dtype: cosines of each pair, then sines.
            `rope_table` makes it of a model's config.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: the first n tokens are written.
        rope: "neox": elements i and `rotary_dim / 2 + i` are a pair; "gptj": elements 2i and `2i + 1`.
        rotary_dim: How many elements of a head are rotated; None means all.
        mrope_section: `(t, h, w)`: the first t pairs have the angles of `positions[0]`, the next h those of
            `positions[1]`, the last w those of `positions[2]`.
        q_norm: `[head_size]` of float32 or query's dtype: weights of query's norm; None means no norm.
        k_norm: The same for key.
        eps: What is added to the mean of the squares.
        kv_cache_dtype: "auto", or the format to store, as with `reshape_and_cache_flash`; with scale caches, as with
            `reshape_and_cache_flash_per_token_head_quant`; of MLA, as with `concat_and_cache_mla`.
        k_scale: What keys are divided by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or `[num_layers,
            num_heads]`, of which the layer's count, or a number. Of MLA, for the whole row.
        v_scale: What values are divided by; of the same shapes.
        layout: Pattern, constant's name or `CacheLayout`. None means NHD, or head-major where key_cache has an axis
            more; for one array `block slot head k+v`, or `block slot latent` where it has 3 axes (4 with `layer`).
        scale_layout: Pattern of the scale caches; None means `block slot head`, or
            `layer block slot head`.
        layer: Index into the layout's `layer` axis; out of range in a Tensor, nothing is written.
        out: A tensor of query's shape and dtype, of any strides that give each element a place of its own, that the
            result is written to, and that is returned. It may be query itself; else it must not overlap the arguments.
            None: a new one.
        backend: None runs "triton" on CUDA and ROCm, "torch" elsewhere. "interpret" runs the Triton kernel in its
            interpreter, on CPU tensors, for tests.

    Returns:
        The rotated query, of query's shape and dtype.

    Raises:
        ValueError: a shape, layout, choice or device does not fit, or caches or scale caches overlap, or out overlaps
            itself or another argument.
        TypeError: a dtype does not fit.
        NotImplementedError: grad mode is on, and an argument requires gradients.

    Example:
        >>> query = key = torch.tensor([[[1.0, 2.0]]])  # 1 token, 1 head of 2 elements: one pair
        >>> key_cache, value_cache = torch.zeros((2, 3, 4, 1, 2))  # each of 3 blocks of 4 slots
        >>> cos_sin = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # a quarter turn at position 1
        >>> query = torchkv.rope_and_cache(
        ...     query, key, key, (key_cache, value_cache), torch.tensor([1]), cos_sin, torch.tensor([5]), rope="neox"
        ... )
        >>> query.tolist(), key_cache[1, 1].tolist(), value_cache[1, 1].tolist()
        ([[[-2.0, 1.0]]], [[-2.0, 1.0]], [[1.0, 2.0]])

    After `rotary_embedding` and `reshape_and_cache_flash` of vLLM.
    """
    numbers, memory = check_rope_options(rope, rotary_dim, mrope_section, eps), as_memory(caches)
    kv_cache_dtype = as_format(kv_cache_dtype, "kv_cache" if memory[1] is None else "key_cache", memory[0])
    check_options(kv_cache_dtype, k_scale, v_scale, layer, backend, BACKENDS)
    k_scale, v_scale = as_scale(k_scale, memory[0]), as_scale(v_scale, memory[0])
    arguments = (
        key, value, *memory, positions, cos_sin, slot_mapping, rope, numbers.rotary_dim, numbers.sections, q_norm,
        k_norm, numbers.eps, kv_cache_dtype, k_scale, v_scale, as_pattern(layout), as_scale_pattern(scale_layout),
        *as_layer(layer), backend,
    )  # fmt: skip
    return _call(query, arguments, out)


def _call(query: Tensor, arguments: Sequence[Any], out: Tensor | None) -> Tensor:
    """Calls the op for a new tensor, or the one for a given tensor."""
    op, arguments = _library.rope_and_cache, (query, *arguments)
    if out is not None:
        check_tensors(out=out, query=query)  # the op takes None for query, and means out
        op, arguments = _library.rope_and_cache_out, (out, None if out is query else query, *arguments[1:])
    result = call_again(op, arguments)
    if result is None:
        refuse_gradients("rope_and_cache", *arguments)
        result = call(op, arguments)
    return result if out is None else out

"""PagedKVCache: a paged cache and how it is laid out, in one pytree."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv._arguments import ArrayLike, Index, Scale, TokenRows, as_rows, dtype_name
from jaxkv._memory import allocate
from jaxkv._readable import Readable
from jaxkv._sharded import Sharded
from jaxkv._writable import Writable
from jaxkv._write import write_caches
from jaxkv.mla import write_latent
from jaxkv.read import AttendOptions, paged_attention
from jaxkv.rope import rope_and_cache
from kvcore.cache_spec import CacheSpec
from kvcore.choices import JaxBackend, KVCacheDtype, Layout, RopeName


@functools.partial(jax.tree_util.register_dataclass, data_fields=["caches", "k_scale", "v_scale"], meta_fields=["spec"])
@dataclass(frozen=True)
class PagedKVCache(Sharded, Readable, Writable):
    """A paged KV cache: arrays, layout and scales. A pytree: donate it, carry it through loops, shard it, return it.

    Attributes:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both.
        spec: Extents, layout and formats; static.
        k_scale: What quantised keys were divided by: float32 as `create` takes it, or None for 1; with per_token_head
            the scale cache, which `write` updates, too.
        v_scale: What quantised values were divided by, of the same kind. None where values are a part of the keys.

    Example:
        >>> cache = jaxkv.PagedKVCache.create(num_blocks=3, block_size=2, num_heads=1, head_size=2, dtype="float32")
        >>> cache
        PagedKVCache(3 blocks × 2 slots, 1 heads × 2, float32, 'block slot head dim', 96 bytes)
        >>> key = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 tokens, 1 head of 2 elements
        >>> cache = cache.write(key, -key, jnp.array([4, 5]))  # both slots of block 2
        >>> block_tables, seq_lens = jnp.array([[2, -1]]), jnp.array([2])
        >>> cache.gather(block_tables, seq_lens, max_len=2)[0][0, :, 0].tolist()
        [[1.0, 2.0], [3.0, 4.0]]
        >>> cache.attend(jnp.zeros((1, 1, 2)), block_tables, seq_lens).tolist()  # the mean of both values
        [[[-2.0, -3.0]]]
    """

    caches: tuple[jax.Array, ...]
    spec: CacheSpec
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def create(
        cls,
        *,
        num_blocks: int | None = None,
        memory: int | str | None = None,
        block_size: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_size: int,
        num_layers: int | None = None,
        head_size_v: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        layout: Layout = "NHD",
        kv_cache_dtype: KVCacheDtype = "auto",
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        per_token_head: bool = False,
        scale_layout: str | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> "PagedKVCache":
        """Allocates a cache of zeros.

        Args:
            num_blocks: Blocks, per layer.
            memory: In place of num_blocks: bytes that all arrays may have together, or text such as `"2GiB"`.
            block_size: Slots per block.
            num_heads: KV heads.
            num_kv_heads: Another name of num_heads; one of the two is given.
            head_size: Elements of a key head.
            num_layers: Layers, which `layer` picks from in all methods; None for a cache of one layer.
            head_size_v: Elements of a value head; None means `head_size`.
            dtype: float16, bfloat16 or float32; a quantised cache is stored as uint8.
            layout: Pattern, constant's name or `CacheLayout`; an axis `layer` is put in front where it lacks one.
            kv_cache_dtype: What is stored: "auto" for elements of dtype, or a format that `reshape_and_cache_flash`
                knows; with the layout `block slot latent`, that `concat_and_cache_mla` knows.
            k_scale: What quantised keys are divided by: float32 of one element, `[num_heads]`, `[num_layers, 1]` or
                `[num_layers, num_heads]`, or a number; None means 1. `kv_scales` computes good ones.
            v_scale: The same for quantised values. With `block slot latent`, k_scale is for both.
            per_token_head: Whether each head of a token has a scale of its own, which `write` computes.
            scale_layout: With these, the pattern of the scale caches; None means `block slot head`, or
                `layer block slot head`.
            sharding: Of each cache; scale caches are split alike. It may split heads, which all methods can use, or
                layers or blocks, which `jax.shard_map` can use, with a cache of its own for each device. None leaves
                the arrays where JAX puts them.

        Raises:
            ValueError: an extent, layout, choice or scale's shape does not fit, or memory has no room for a block.
            TypeError: a dtype or type does not fit, or num_blocks and memory, or both names of num_heads, are given.
        """
        spec = CacheSpec.create(
            num_layers, num_blocks, block_size, num_heads, head_size, head_size_v, dtype_name(dtype), layout,
            kv_cache_dtype, per_token_head, scale_layout, num_kv_heads, memory,
        )  # fmt: skip
        spec.check_scales(k_scale, v_scale)
        caches, scales = allocate(spec, k_scale, v_scale, sharding)
        return cls(caches, spec, *scales)

    def write(
        self,
        key: TokenRows,
        value: TokenRows,
        slot_mapping: ArrayLike,
        *,
        layer: Index | None = None,
        backend: JaxBackend | None = None,
    ) -> "PagedKVCache":
        """Writes keys and values of new tokens and returns the new cache.

        Args:
            key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32. With the layout
                `block slot latent`, kv_c: `[num_tokens, head_size_v]`.
            value: `[num_tokens, num_heads, head_size_v]` of key's dtype. With the layout `block slot latent`, k_pe:
                `[num_tokens, head_size - head_size_v]`.
            slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: slots of the first n tokens. Outside the cache is
                skipped.
            layer: Index into the cache's layers, maybe traced; None for a cache of one layer.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The new cache: the same memory, where this one was donated or is not used again.
        """
        spec, layout = self.spec, self.spec.layout
        keys, values = as_rows(key), as_rows(value)
        spec.check_rows(keys.shape, values.shape)
        if layout.latent:
            rest = (slot_mapping, spec.kv_cache_dtype, self.k_scale, layout, layer, backend)
            new: Any = write_latent(keys, values, self.caches[0], *rest)
            return self._with([new])
        scale_caches, options = self._writing
        options |= {"layer": layer, "backend": backend, "scale_caches": scale_caches}
        return self._with(write_caches(keys, values, self.caches, slot_mapping, **options))

    def rope_and_cache(
        self,
        query: TokenRows,
        key: TokenRows,
        value: TokenRows,
        positions: ArrayLike,
        cos_sin: ArrayLike,
        slot_mapping: ArrayLike,
        *,
        rope: RopeName = "neox",
        rotary_dim: int | None = None,
        mrope_section: Sequence[int] | None = None,
        q_norm: ArrayLike | None = None,
        k_norm: ArrayLike | None = None,
        eps: float = 1e-6,
        layer: Index | None = None,
        backend: JaxBackend | None = None,
    ) -> tuple[jax.Array, "PagedKVCache"]:
        """Rotates queries and keys, and writes keys and values. The function `rope_and_cache` tells more of each.

        Args:
            query: `[num_tokens, num_q_heads, head_size]`; with `block slot latent`, heads have the size of k_pe.
            key: `[num_tokens, num_heads, head_size]` of query's dtype; with `block slot latent`, kv_c.
            value: `[num_tokens, num_heads, head_size_v]` of query's dtype; with `block slot latent`, k_pe.
            positions: `[num_tokens]` of int32 or int64; `[3, num_tokens]` with mrope_section.
            cos_sin: `[max_position, rotary_dim]` of float32 or query's dtype: cosines of each pair, then sines.
            slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: slots of the first n tokens.
            rope: "neox" or "gptj".
            rotary_dim: How many elements of a head are rotated; None means all.
            mrope_section: How many pairs have the angles of each of three rows of positions.
            q_norm: `[head_size]`: weights of query's norm; None means no norm.
            k_norm: `[head_size]`: weights of key's norm; None means no norm.
            eps: What is added to the mean of the squares.
            layer: Index into the cache's layers, maybe traced; None for a cache of one layer.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The rotated query, and the new cache: the same memory, where this one was donated or is not used again.
        """
        keys, values = as_rows(key), as_rows(value)
        self.spec.check_rows(keys.shape, values.shape)
        scale_caches, options = self._writing
        rotated, *new = rope_and_cache(
            query, keys, values, (*self.caches, *scale_caches), positions, cos_sin, slot_mapping, rope=rope,
            rotary_dim=rotary_dim, mrope_section=mrope_section, q_norm=q_norm, k_norm=k_norm, eps=eps,
            layer=layer, backend=backend, **options,
        )  # fmt: skip
        return rotated, self._with(new)

    @overload
    def attend(
        self,
        query: TokenRows,
        block_tables: ArrayLike,
        seq_lens: ArrayLike,
        *,
        return_lse: Literal[False] = ...,
        **options: Unpack[AttendOptions],
    ) -> jax.Array: ...
    @overload
    def attend(
        self,
        query: TokenRows,
        block_tables: ArrayLike,
        seq_lens: ArrayLike,
        *,
        return_lse: Literal[True],
        **options: Unpack[AttendOptions],
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def attend(
        self,
        query: TokenRows,
        block_tables: ArrayLike,
        seq_lens: ArrayLike,
        *,
        return_lse: bool,
        **options: Unpack[AttendOptions],
    ) -> jax.Array | tuple[jax.Array, jax.Array]: ...
    def attend(
        self,
        query: TokenRows,
        block_tables: ArrayLike,
        seq_lens: ArrayLike,
        *,
        query_start_loc: ArrayLike | None = None,
        scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: ArrayLike | None = None,
        layer: Index | None = None,
        return_lse: bool = False,
        backend: JaxBackend | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Attention of new tokens over the cache. `paged_attention` tells more of each argument.

        Args:
            query: `[num_tokens, num_q_heads, head_size]` of float16, bfloat16 or float32.
            block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
            seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache, the queries' own among them.
            query_start_loc: `[num_seqs + 1]` of int32 or int64: where each sequence's rows of query start, and the end.
                None: one row each.
            scale: What logits are multiplied by; None means `head_size ** -0.5`.
            causal: Whether a query sees positions up to its own only.
            sliding_window: With causal, how many of the last positions a query sees; None means all.
            soft_cap: A logit x becomes `soft_cap * tanh(x / soft_cap)`; None or 0 means no cap.
            sinks: `[num_q_heads]`: one more logit of each head in the softmax's denominator.
            layer: Index into the cache's layers, maybe traced; None for a cache of one layer.
            return_lse: Whether the log-sum-exp is returned, too.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            `[num_tokens, num_q_heads, head_size_v]` of query's dtype; with return_lse also `[num_tokens, num_q_heads]`
            float32.
        """
        queries = as_rows(query)
        self.spec.check_query(queries.shape)
        return paged_attention(
            queries, self.caches, block_tables, seq_lens, query_start_loc=query_start_loc, scale=scale, causal=causal,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, layer=layer, return_lse=return_lse,
            backend=backend, **self._reading,
        )  # fmt: skip

    @property
    def _writing(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Scale caches, and the arguments that say how to write."""
        spec, scales = self.spec, (self.k_scale, self.v_scale)
        own = spec.scale_layout is not None
        k_scale, v_scale = (None, None) if own else scales
        return scales if own else (), {
            "kv_cache_dtype": spec.kv_cache_dtype, "k_scale": k_scale, "v_scale": v_scale, "layout": spec.layout,
            "scale_layout": spec.scale_layout,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"PagedKVCache({self.spec})"

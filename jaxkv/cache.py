"""PagedKVCache: a paged cache and how it is laid out, in one pytree."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.ops import reshape_and_cache_flash, reshape_and_cache_flash_diffkv
from jaxkv.read_ops import gather_kv, paged_attention
from kvcore.layout import CacheLayout
from kvcore.paged_cache import CacheSpec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["caches", "k_scale", "v_scale"], meta_fields=["spec"])
@dataclass(frozen=True)
class PagedKVCache:
    """A paged KV cache: arrays, layout and scales. A pytree: donate it, carry it through loops, shard it, return it.

    Attributes:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both.
        spec: Extents, layout and formats; static.
        k_scale: By which fp8 keys were divided: float32 of one element, or None for 1.
        v_scale: Likewise, for values.
    """

    caches: tuple[jax.Array, ...]
    spec: CacheSpec
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def create(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        head_size: int,
        num_layers: int | None = None,
        head_size_v: int | None = None,
        dtype: Any = jnp.bfloat16,
        layout: str | CacheLayout = "NHD",
        kv_cache_dtype: str = "auto",
        k_scale: jax.Array | float | None = None,
        v_scale: jax.Array | float | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> "PagedKVCache":
        """Allocates a cache of zeros.

        Args:
            num_blocks: Blocks, per layer.
            block_size: Slots per block.
            num_heads: KV heads.
            head_size: Elements of a key head.
            num_layers: Layers, which `layer` picks from in all methods; None for a cache of one layer.
            head_size_v: Elements of a value head; None means `head_size`.
            dtype: float16, bfloat16 or float32; a quantised cache is stored as uint8.
            layout: Pattern, constant's name or `CacheLayout`; an axis `layer` is put in front where it lacks one.
            kv_cache_dtype: "auto", "fp8" (= "fp8_e4m3") or "fp8_e5m2".
            k_scale: What fp8 keys are divided by: float32 of one element, or a number; None means 1.
            v_scale: Likewise, for values.
            sharding: Of each array; it may split heads only. None leaves the arrays where JAX puts them.

        Raises:
            ValueError: an extent, layout or choice does not fit.
            TypeError: a dtype or type does not fit.
        """
        name = jnp.dtype(dtype).name
        spec = CacheSpec.create(
            num_layers, num_blocks, block_size, num_heads, head_size, head_size_v, name, layout, kv_cache_dtype
        )
        caches = tuple(jnp.zeros(shape, spec.dtype, device=sharding) for shape in spec.shapes)

        def array(scale: jax.Array | float | None) -> jax.Array | None:
            return None if scale is None else jnp.asarray(scale, jnp.float32)

        return cls(caches, spec, array(k_scale), array(v_scale))

    def write(
        self,
        key: jax.Array,
        value: jax.Array,
        slot_mapping: jax.Array,
        *,
        layer: int | jax.Array | None = None,
        backend: str | None = None,
    ) -> "PagedKVCache":
        """Writes keys and values of new tokens; arguments as in `reshape_and_cache_flash`.

        Returns:
            The new cache: the same memory, where this one was donated or is not used again.
        """
        layout = self.spec.layout
        options = (slot_mapping, self.spec.kv_cache_dtype, self.k_scale, self.v_scale)
        if layout.single_array:
            kv_cache = reshape_and_cache_flash_diffkv(
                key, value, self.caches[0], *options, layout=layout, layer=layer, backend=backend
            )
            return replace(self, caches=(kv_cache,))
        key_cache, value_cache = self.caches
        caches = reshape_and_cache_flash(
            key, value, key_cache, value_cache, *options, layout=layout, layer=layer, backend=backend
        )
        return replace(self, caches=caches)

    def attend(
        self,
        query: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        *,
        layer: int | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Attention over the cache; arguments and results as in `paged_attention`, which names `options`."""
        return paged_attention(query, self.caches, block_tables, seq_lens, layer=layer, **self._reading, **options)

    def gather(
        self,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        max_len: int,
        *,
        layer: int | jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Contiguous keys and values; arguments and results as in `gather_kv`, which names `options`."""
        reading = self._reading | {"head_size": self.spec.head_size}
        return gather_kv(self.caches, block_tables, seq_lens, max_len, layer=layer, **reading, **options)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.spec.nbytes

    @property
    def _reading(self) -> dict[str, Any]:
        return {**self.spec.reading, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def __repr__(self) -> str:
        return f"PagedKVCache({self.spec})"

"""What reads a cache, but for attention."""

from typing import Any

import jax
from jax.typing import DTypeLike

from jaxkv._arguments import ArrayLike, Index
from jaxkv.read import gather_kv
from jaxkv.slots import gather_slots
from kvcore.cache_spec import CacheSpec
from kvcore.choices import JaxBackend


class Readable:
    """A cache whose keys and values can be copied out."""

    caches: tuple[jax.Array, ...]
    spec: CacheSpec
    k_scale: jax.Array | None
    v_scale: jax.Array | None

    def gather(
        self,
        block_tables: ArrayLike,
        seq_lens: ArrayLike,
        max_len: int,
        *,
        dtype: DTypeLike | None = None,
        layer: Index | None = None,
        backend: JaxBackend | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Copies keys and values of sequences into contiguous arrays.

        Args:
            block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
            seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache.
            max_len: Positions of a sequence in the result.
            dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
            layer: Index into the cache's layers, maybe traced; None for a cache of one layer.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            Key `[num_seqs, max_len, num_heads, head_size]` and value `[num_seqs, max_len, num_heads, head_size_v]`,
            with zeros past each length.
        """
        return gather_kv(
            self.caches, block_tables, seq_lens, max_len, dtype=dtype, layer=layer, backend=backend,
            head_size=self.spec.head_size, **self._reading,
        )  # fmt: skip

    def read(
        self,
        slots: ArrayLike,
        *,
        dtype: DTypeLike | None = None,
        layer: Index | None = None,
        backend: JaxBackend | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Copies keys and values of slots into contiguous arrays.

        Args:
            slots: `[n]` of int32 or int64, as `slot_mapping` gives them.
            dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
            layer: Index into the cache's layers, maybe traced; None for a cache of one layer.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            Key `[n, num_heads, head_size]` and value `[n, num_heads, head_size_v]`, with zeros for slots that are not
            in the cache.
        """
        return gather_slots(
            self.caches, slots, dtype=dtype, layer=layer, backend=backend,
            head_size=self.spec.head_size, **self._reading,
        )  # fmt: skip

    @property
    def _reading(self) -> dict[str, Any]:
        v_scale = self.k_scale if self.spec.layout.latent else self.v_scale
        return {**self.spec.reading, "k_scale": self.k_scale, "v_scale": v_scale}

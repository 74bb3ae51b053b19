"""What changes blocks of a cache as a whole."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxkv._arguments import ArrayLike
from jaxkv._memory import allocate_host
from jaxkv.blocks import copy_blocks, swap_blocks, zero_blocks
from jaxkv.move import relayout
from kvcore.cache_spec import CacheSpec, check_any_cache
from kvcore.choices import JaxBackend
from kvcore.swap import check_alike, with_blocks


class Writable:
    """A cache whose blocks can be copied, and filled with zeros."""

    caches: tuple[jax.Array, ...]
    spec: CacheSpec
    k_scale: jax.Array | None
    v_scale: jax.Array | None

    def copy_blocks(self, pairs: ArrayLike, *, backend: JaxBackend | None = None) -> Self:
        """Copies blocks to other blocks, in all layers, with their scales. The function `copy_blocks` tells more.

        Args:
            pairs: `[n, 2]` of int32 or int64: source and destination. All are read before one is written.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The new cache: the same memory, where this one was donated or is not used again.
        """
        return self._with(copy_blocks(self._memory, pairs, backend=backend, **self._layouts))

    def zero_blocks(self, blocks: ArrayLike, *, backend: JaxBackend | None = None) -> Self:
        """Fills blocks with zeros, in all layers, with their scales. The function `zero_blocks` tells more.

        Args:
            blocks: `[n]` of int32 or int64.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The new cache: the same memory, where this one was donated or is not used again.
        """
        return self._with(zero_blocks(self._memory, blocks, backend=backend, **self._layouts))

    def relayout(
        self,
        destination: Self,
        pairs: ArrayLike | None = None,
        *,
        requantise: bool | None = None,
        backend: JaxBackend | None = None,
    ) -> Self:
        """Moves what slots hold into slots of another cache, in all layers. The function `relayout` tells more.

        Args:
            destination: Another `PagedKVCache`, whose layout, block size and format may be others.
            pairs: `[n, 2]` of int32 or int64: slots of this cache and of destination; None: all, to the same numbers.
            requantise: Whether keys and values are read and written also where formats are the same.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The new destination: the same memory, where it was donated or is not used again.
        """
        cache: Any = self  # a PagedKVCache, which can read and write, too
        other: Any = destination
        return relayout(cache, other, pairs, requantise=requantise, backend=backend)

    def swap_blocks(self, destination: Self, pairs: ArrayLike, *, backend: JaxBackend | None = None) -> Self:
        """Copies blocks to blocks of another cache, to the host's memory or from it, in all layers, with their scales.

        The function `swap_blocks` tells more. Static scales stay each cache's own.

        Args:
            destination: What `create_host` made of this cache, or the cache that it made this one of; or another one
                like this one, whose number of blocks may be another.
            pairs: `[n, 2]` of int32 or int64: a block of this cache and one of destination.
            backend: None, "triton", "xla" or "interpret".

        Returns:
            The new destination: the same memory, where it was donated or is not used again.
        """
        check_any_cache(destination)
        check_alike(self.spec, destination.spec)
        new = swap_blocks(self._memory, destination._memory, pairs, backend=backend, **self._layouts)
        return destination._with(new)

    def create_host(self, *, num_blocks: int | None = None, memory: int | str | None = None) -> Self:
        """Allocates a cache of zeros like this one in the host's memory, which `swap_blocks` copies blocks to and from.

        Its arrays have memory kind "pinned_host", and are split over devices as this one's are.

        Args:
            num_blocks: Blocks, per layer.
            memory: In place of num_blocks: bytes that all arrays may have together, or text such as `"2GiB"`.

        Raises:
            ValueError: num_blocks is negative, or memory has no room for a block.
            TypeError: one is of another type, or both or neither are given.

        Example:
            >>> cache = jaxkv.PagedKVCache.create(num_blocks=4, block_size=2, num_heads=1, head_size=8)
            >>> host = cache.create_host(num_blocks=64)
            >>> swap = jax.jit(jaxkv.PagedKVCache.swap_blocks, donate_argnums=1)
            >>> host = swap(cache, host, jnp.array([[3, 0], [1, 1]]))  # two blocks are free for others
            >>> cache = swap(host, cache, jnp.array([[0, 2]]))  # and one comes back, to another place
        """
        spec = with_blocks(self.spec, num_blocks, memory)
        arrays, count, cache = allocate_host(spec, self._memory), len(self.caches), self
        scales = arrays[count:] or self._scales_of_another
        return replace(cache, caches=tuple(arrays[:count]), spec=spec, k_scale=scales[0], v_scale=scales[1])  # type: ignore

    @property
    def _memory(self) -> tuple[jax.Array, ...]:
        """Caches and scale caches."""
        if self.spec.scale_layout is None:
            return self.caches
        return *self.caches, *(scale for scale in (self.k_scale, self.v_scale) if scale is not None)

    @property
    def _layouts(self) -> dict[str, Any]:
        return {"layout": self.spec.layout, "scale_layout": self.spec.scale_layout}

    def _with(self, memory: Sequence[jax.Array]) -> Self:
        """The cache with new caches and scale caches."""
        count, cache = len(self.caches), self  # a dataclass has these
        scales = memory[count:] or self._scales_of_another
        return replace(cache, caches=tuple(memory[:count]), k_scale=scales[0], v_scale=scales[1])  # type: ignore

    @property
    def _scales_of_another(self) -> list[Any]:
        """Static scales for another cache: outside jit they are copied, so that one of the two can be donated."""
        scales = self.k_scale, self.v_scale
        return [jnp.copy(s) if isinstance(s, jax.Array) and not isinstance(s, Tracer) else s for s in scales]

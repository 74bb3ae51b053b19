"""What changes blocks of a cache as a whole."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import jax

from jaxkv._arguments import ArrayLike
from jaxkv.blocks import copy_blocks, zero_blocks
from jaxkv.move import relayout
from kvcore.cache_spec import CacheSpec
from kvcore.choices import JaxBackend


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
        scales = dict(zip(("k_scale", "v_scale"), memory[count:], strict=False))
        return replace(cache, caches=tuple(memory[:count]), **scales)  # type: ignore

"""What writes to a cache."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor

from kvcore.cache_spec import CacheSpec, check_any_cache
from kvcore.choices import RopeName, TorchBackend
from kvcore.contract.write import latent_order
from kvcore.swap import check_alike
from torchkv._arguments import check_tensors
from torchkv.blocks import copy_blocks, swap_blocks, zero_blocks
from torchkv.mla import concat_and_cache_mla
from torchkv.move import relayout
from torchkv.quantize import (
    reshape_and_cache_flash_diffkv_per_token_head_quant,
    reshape_and_cache_flash_per_token_head_quant,
)
from torchkv.rope import rope_and_cache
from torchkv.write import reshape_and_cache_flash, reshape_and_cache_flash_diffkv


class Writable:
    """A cache whose tensors can be written to."""

    caches: tuple[Tensor, ...]
    spec: CacheSpec
    k_scale: Tensor | None
    v_scale: Tensor | None

    def write(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        *,
        layer: int | Tensor | None = None,
        backend: TorchBackend | None = None,
    ) -> None:
        """Writes keys and values of new tokens, in place.

        Args:
            key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32. With the layout
                `block slot latent`, kv_c: `[num_tokens, head_size_v]`.
            value: `[num_tokens, num_heads, head_size_v]` of key's dtype. With the layout `block slot latent`, k_pe:
                `[num_tokens, head_size - head_size_v]`.
            slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens: slots of the first n tokens. Outside the cache is
                skipped.
            layer: Index into the cache's layers, or a Tensor of one integer; None for a cache of one layer.
            backend: None, "triton", "torch" or "interpret".
        """
        spec, layout = self.spec, self.spec.layout
        kv_cache_dtype: Any = spec.kv_cache_dtype
        self._check_rows(key, value)
        options: dict[str, Any] = {"layer": layer, "backend": backend}
        op: Callable[..., None]
        if layout.latent:
            concat_and_cache_mla(key, value, self._rows, slot_mapping, kv_cache_dtype, self.k_scale, **options)
        elif spec.scale_layout is None:
            op = reshape_and_cache_flash_diffkv if layout.single_array else reshape_and_cache_flash
            scales = self.k_scale, self.v_scale
            op(key, value, *self.caches, slot_mapping, kv_cache_dtype, *scales, layout=layout, **options)
        else:
            op = reshape_and_cache_flash_per_token_head_quant
            if layout.single_array:
                op = reshape_and_cache_flash_diffkv_per_token_head_quant
            memory = *self.caches, self.k_scale, self.v_scale
            options |= {"layout": layout, "scale_layout": spec.scale_layout}
            op(key, value, *memory, slot_mapping, kv_cache_dtype, **options)

    def rope_and_cache(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
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
        layer: int | Tensor | None = None,
        out: Tensor | None = None,
        backend: TorchBackend | None = None,
    ) -> Tensor:
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
            layer: Index into the cache's layers, or a Tensor of one integer; None for a cache of one layer.
            out: A tensor to write the result to, which may be query; None: a new one.
            backend: None, "triton", "torch" or "interpret".

        Returns:
            The rotated query.
        """
        self._check_rows(key, value)
        spec, scales = self.spec, (self.k_scale, self.v_scale)
        memory: Any = self.caches
        options: dict[str, Any] = {"kv_cache_dtype": spec.kv_cache_dtype, "layout": spec.layout}
        if spec.scale_layout is None:
            options |= zip(("k_scale", "v_scale"), scales, strict=True)
        else:
            memory, options["scale_layout"] = (*memory, *scales), spec.scale_layout
        return rope_and_cache(
            query, key, value, memory, positions, cos_sin, slot_mapping, rope=rope, rotary_dim=rotary_dim,
            mrope_section=mrope_section, q_norm=q_norm, k_norm=k_norm, eps=eps, layer=layer, out=out, backend=backend,
            **options,
        )  # fmt: skip

    def copy_blocks(self, pairs: Tensor, *, backend: TorchBackend | None = None) -> None:
        """Copies blocks to other blocks, in all layers, with their scales. The function `copy_blocks` tells more.

        Args:
            pairs: `[n, 2]` of int32 or int64: source and destination. All are read before one is written.
            backend: None, "triton", "torch" or "interpret".
        """
        copy_blocks(self._memory, pairs, backend=backend, **self._layouts)

    def zero_blocks(self, blocks: Tensor, *, backend: TorchBackend | None = None) -> None:
        """Fills blocks with zeros, in all layers, with their scales. The function `zero_blocks` tells more.

        Args:
            blocks: `[n]` of int32 or int64.
            backend: None, "triton", "torch" or "interpret".
        """
        zero_blocks(self._memory, blocks, backend=backend, **self._layouts)

    def relayout(
        self,
        destination: Self,
        pairs: Tensor | None = None,
        *,
        requantise: bool | None = None,
        backend: TorchBackend | None = None,
    ) -> None:
        """Moves what slots hold into slots of another cache, in all layers. The function `relayout` tells more.

        Args:
            destination: Another `PagedKVCache`, whose layout, block size and format may be others.
            pairs: `[n, 2]` of int32 or int64: slots of this cache and of destination; None: all, to the same numbers.
            requantise: Whether keys and values are read and written also where formats are the same.
            backend: None, "triton", "torch" or "interpret".
        """
        relayout(self, destination, pairs, requantise=requantise, backend=backend)

    def swap_blocks(self, destination: Self, pairs: Tensor, *, backend: TorchBackend | None = None) -> None:
        """Copies blocks to blocks of another cache, to the host's memory or from it, in all layers, with their scales.

        The function `swap_blocks` tells more. Static scales stay each cache's own.

        Args:
            destination: What `create_host` made of this cache, or the cache that it made this one of; or another one
                like this one, whose number of blocks may be another.
            pairs: `[n, 2]` of int32 or int64, on the GPU: a block of this cache and one of destination.
            backend: None, "triton", "torch" or "interpret".
        """
        check_any_cache(destination)
        check_alike(self.spec, destination.spec)
        swap_blocks(self._memory, destination._memory, pairs, backend=backend, **self._layouts)

    @property
    def _memory(self) -> tuple[Any, ...]:
        """Caches and scale caches."""
        return self.caches if self.spec.scale_layout is None else (*self.caches, self.k_scale, self.v_scale)

    @property
    def _layouts(self) -> dict[str, Any]:
        return {"layout": self.spec.layout, "scale_layout": self.spec.scale_layout}

    def _check_rows(self, key: Tensor, value: Tensor) -> None:
        try:
            self.spec.check_rows(key.shape, value.shape)
        except AttributeError:
            check_tensors(key=key, value=value)
            raise

    @property
    def _rows(self) -> Tensor:
        """The cache of a latent layout as `concat_and_cache_mla` wants it, whatever the order of its axes."""
        order, (cache,) = latent_order(self.spec.layout), self.caches
        return cache if order == sorted(order) else cache.permute(order)

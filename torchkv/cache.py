"""PagedKVCache: a paged cache and how it is laid out, in one object, changed in place."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from kvcore.arrays import array_names
from kvcore.cache_spec import CacheSpec, Described
from kvcore.choices import FloatDtype, KVCacheDtype, Layout, TorchBackend
from torchkv._arguments import check_tensors, dtype_name
from torchkv.mla import concat_and_cache_mla
from torchkv.quantize import (
    reshape_and_cache_flash_diffkv_per_token_head_quant,
    reshape_and_cache_flash_per_token_head_quant,
)
from torchkv.read import AttendOptions, gather_kv, paged_attention
from torchkv.write import reshape_and_cache_flash, reshape_and_cache_flash_diffkv


class PagedKVCache(Described):
    """A paged KV cache: memory, layout and scales. A plain object, whose memory `write` changes in place.

    Attributes:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both.
        spec: Extents, layout and formats.
        k_scale: By which quantised keys were divided: float32 of one element or `[num_heads]`, or None for 1; with
            per_token_head the scale cache, which `write` updates, too.
        v_scale: Likewise, for values. None where they are a part of the keys.
    """

    def __init__(
        self, caches: tuple[Tensor, ...], spec: CacheSpec, k_scale: Tensor | None = None, v_scale: Tensor | None = None
    ) -> None:
        self.caches, self.spec, self.k_scale, self.v_scale = caches, spec, k_scale, v_scale

    @classmethod
    def create(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_size: int,
        num_layers: int | None = None,
        head_size_v: int | None = None,
        dtype: torch.dtype | FloatDtype = torch.bfloat16,
        layout: Layout = "NHD",
        kv_cache_dtype: KVCacheDtype = "auto",
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        per_token_head: bool = False,
        scale_layout: str | None = None,
        device: torch.device | str | None = None,
    ) -> "PagedKVCache":
        """Allocates a cache of zeros.

        Args:
            num_blocks: Blocks, per layer.
            block_size: Slots per block.
            num_heads: KV heads.
            num_kv_heads: Another name of num_heads; one of the two is given.
            head_size: Elements of a key head.
            num_layers: Layers, which `layer` picks from in all methods; None for a cache of one layer.
            head_size_v: Elements of a value head; None means `head_size`.
            dtype: float16, bfloat16 or float32; a quantised cache is stored as uint8.
            layout: Pattern, constant's name or `CacheLayout`; an axis `layer` is put in front where it lacks one.
            kv_cache_dtype: What is stored, as in `reshape_and_cache_flash`; with the layout `block slot latent` as in
                `concat_and_cache_mla`.
            k_scale: What quantised keys are divided by: float32 of one element or `[num_heads]`, or a number; None
                means 1. `kv_scales` finds good ones.
            v_scale: Likewise, for values; where they are a part of the keys (`block slot latent`), k_scale is for both.
            per_token_head: Whether each token's head has a scale of its own, which `write` computes.
            scale_layout: With these, as in `reshape_and_cache_flash_per_token_head_quant`.
            device: Where; None means torch's default.

        Raises:
            ValueError: an extent, layout or choice does not fit.
            TypeError: a dtype or type does not fit.
        """
        name = str(dtype).removeprefix("torch.")
        spec = CacheSpec.create(
            num_layers, num_blocks, block_size, num_heads, head_size, head_size_v, name, layout, kv_cache_dtype,
            per_token_head, scale_layout, num_kv_heads,
        )  # fmt: skip
        for given, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if per_token_head and scale is not None:
                raise ValueError(f"{given} must be None with per_token_head, which computes scales, got {scale!r}")
        if spec.layout.latent and v_scale is not None:
            raise ValueError(
                f"v_scale must be None for layout '{spec.layout}', where k_scale is for both, got {v_scale!r}"
            )
        caches = tuple(torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device) for shape in spec.shapes)
        scale_caches = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in spec.scale_shapes]
        if scale_caches:
            return cls(caches, spec, *scale_caches)

        def tensor(scale: Tensor | float | None) -> Tensor | None:
            return None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=caches[0].device)

        return cls(caches, spec, tensor(k_scale), tensor(v_scale))

    def write(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        *,
        layer: int | Tensor | None = None,
        backend: TorchBackend | None = None,
    ) -> None:
        """Writes keys and values of new tokens; arguments as in `reshape_and_cache_flash`.

        With the layout `block slot latent` as in `concat_and_cache_mla`: key is kv_c `[num_tokens, head_size_v]` and
        value is k_pe `[num_tokens, head_size - head_size_v]`.
        """
        layout, kv_cache_dtype = self.spec.layout, self.spec.kv_cache_dtype
        op: Callable[..., None]
        arrays: tuple[Any, ...]
        options: dict[str, Any] = {"layer": layer, "backend": backend}
        try:
            self.spec.check_rows(key.shape, value.shape)
        except AttributeError:
            check_tensors(key=key, value=value)
            raise
        if layout.latent:
            op, arrays = concat_and_cache_mla, (self._rows, slot_mapping, kv_cache_dtype, self.k_scale)
        elif self.spec.scale_layout is None:
            op = reshape_and_cache_flash_diffkv if layout.single_array else reshape_and_cache_flash
            arrays = (*self.caches, slot_mapping, kv_cache_dtype, self.k_scale, self.v_scale)
            options["layout"] = layout
        else:
            op = reshape_and_cache_flash_per_token_head_quant
            if layout.single_array:
                op = reshape_and_cache_flash_diffkv_per_token_head_quant
            arrays = (*self.caches, self.k_scale, self.v_scale, slot_mapping, kv_cache_dtype)
            options |= {"layout": layout, "scale_layout": self.spec.scale_layout}
        op(key, value, *arrays, **options)

    @overload
    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        return_lse: Literal[False] = ...,
        **options: Unpack[AttendOptions],
    ) -> Tensor: ...
    @overload
    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        return_lse: Literal[True],
        **options: Unpack[AttendOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        return_lse: bool,
        **options: Unpack[AttendOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        query_start_loc: Tensor | None = None,
        scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        layer: int | Tensor | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        backend: TorchBackend | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the cache; arguments and results as in `paged_attention`."""
        try:
            self.spec.check_query(query.shape)
        except AttributeError:
            check_tensors(query=query)
            raise
        return paged_attention(
            query, self.caches, block_tables, seq_lens, query_start_loc=query_start_loc, scale=scale, causal=causal,
            sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, layer=layer, return_lse=return_lse,
            out=out, lse=lse, backend=backend, **self._reading,
        )  # fmt: skip

    def gather(
        self,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_len: int,
        *,
        dtype: torch.dtype | FloatDtype | None = None,
        layer: int | Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
        backend: TorchBackend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Contiguous keys and values; arguments and results as in `gather_kv`."""
        return gather_kv(
            self.caches, block_tables, seq_lens, max_len, dtype=dtype, layer=layer, out=out, backend=backend,
            head_size=self.spec.head_size, **self._reading,
        )  # fmt: skip

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "PagedKVCache":
        """The cache on a device: itself where it is there already, else a copy, as with `Tensor.to`.

        Args:
            device: Where.
            non_blocking: Whether a copy to or from pinned memory may still be under way afterwards.
        """
        moved = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self._tensors.values()]
        if all(new is old for new, old in zip(moved, self._tensors.values(), strict=True)):
            return self
        *caches, k_scale, v_scale = moved
        return PagedKVCache(tuple(c for c in caches if c is not None), self.spec, k_scale, v_scale)

    def state_dict(self) -> dict[str, Any]:
        """What the cache holds, for `torch.save` and `load_state_dict`.

        Returns:
            The cache's own tensors, not copies, as "key_cache" and "value_cache", or as "kv_cache"; "k_scale" and
            "v_scale", which may be None; and "spec": extents, layout and formats as numbers and strings, so that
            `torch.load` reads it with weights_only.
        """
        return {**self._tensors, "spec": self.spec.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what `state_dict` gave into this cache, whose memory stays where it is. Devices may differ.

        Args:
            state: From a cache that was created like this one.

        Raises:
            ValueError: an entry is missing or superfluous, or an extent, a layout, a format or a shape is not this
                cache's. Nothing was copied then.
            TypeError: a dtype or type does not fit.
        """
        own = self._tensors
        if state.keys() != own.keys() | {"spec"}:
            raise ValueError(f"state must have the entries {', '.join([*own, 'spec'])}, got {', '.join(state)}")
        self.spec.check_plain(state["spec"])
        for name, tensor in own.items():
            given = state[name]
            if tensor is None or given is None:
                if tensor is not given:
                    wanted, got = ("None" if t is None else "a torch.Tensor" for t in (tensor, given))
                    raise ValueError(f"state's {name} must be {wanted}, as in this cache, got {got}")
                continue
            check_tensors(**{f"state's {name}": given})
            if given.shape != tensor.shape:
                raise ValueError(f"state's {name} must have shape {tuple(tensor.shape)}, got {tuple(given.shape)}")
            if given.dtype != tensor.dtype:
                raise TypeError(f"state's {name} must have dtype {dtype_name(tensor)}, got {dtype_name(given)}")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor is not None:
                    tensor.copy_(state[name])

    @property
    def _tensors(self) -> dict[str, Tensor | None]:
        names = array_names(len(self.caches))
        return {**dict(zip(names, self.caches, strict=True)), "k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def _rows(self) -> Tensor:
        """The cache of a latent layout as `concat_and_cache_mla` wants it, whatever the order of its axes."""
        (axes,), (cache,) = self.spec.layout.arrays, self.caches
        order = [axes.index((axis,)) for axis in ("layer", "block", "slot", "latent") if (axis,) in axes]
        return cache if order == sorted(order) else cache.permute(order)

    @property
    def _reading(self) -> dict[str, Any]:
        v_scale = self.k_scale if self.spec.layout.latent else self.v_scale
        return {**self.spec.reading, "k_scale": self.k_scale, "v_scale": v_scale}

    def __repr__(self) -> str:
        return f"PagedKVCache({self.spec}, {self.caches[0].device})"

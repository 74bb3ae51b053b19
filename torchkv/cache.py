"""PagedKVCache: a paged cache and how it is laid out, in one object, changed in place."""

from typing import Any

import torch
from torch import Tensor

from kvcore.layout import CacheLayout
from kvcore.paged_cache import CacheSpec
from torchkv.ops import reshape_and_cache_flash, reshape_and_cache_flash_diffkv
from torchkv.read_ops import gather_kv, paged_attention


class PagedKVCache:
    """A paged KV cache: memory, layout and scales. A plain object, whose memory `write` changes in place.

    Attributes:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both.
        spec: Extents, layout and formats.
        k_scale: By which fp8 keys were divided: float32 of one element, or None for 1.
        v_scale: Likewise, for values.
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
        num_heads: int,
        head_size: int,
        num_layers: int | None = None,
        head_size_v: int | None = None,
        dtype: torch.dtype | str = torch.bfloat16,
        layout: str | CacheLayout = "NHD",
        kv_cache_dtype: str = "auto",
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        device: torch.device | str | None = None,
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
            device: Where; None means torch's default.

        Raises:
            ValueError: an extent, layout or choice does not fit.
            TypeError: a dtype or type does not fit.
        """
        name = str(dtype).removeprefix("torch.")
        spec = CacheSpec.create(
            num_layers, num_blocks, block_size, num_heads, head_size, head_size_v, name, layout, kv_cache_dtype
        )
        caches = tuple(torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device) for shape in spec.shapes)

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
        backend: str | None = None,
    ) -> None:
        """Writes keys and values of new tokens; arguments as in `reshape_and_cache_flash`."""
        layout = self.spec.layout
        options = (slot_mapping, self.spec.kv_cache_dtype, self.k_scale, self.v_scale)
        if layout.single_array:
            reshape_and_cache_flash_diffkv(
                key, value, self.caches[0], *options, layout=layout, layer=layer, backend=backend
            )
        else:
            key_cache, value_cache = self.caches
            reshape_and_cache_flash(
                key, value, key_cache, value_cache, *options, layout=layout, layer=layer, backend=backend
            )

    def attend(
        self,
        query: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        *,
        layer: int | Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Attention over the cache; arguments and results as in `paged_attention`, which names `options`."""
        return paged_attention(query, self.caches, block_tables, seq_lens, layer=layer, **self._reading, **options)

    def gather(
        self,
        block_tables: Tensor,
        seq_lens: Tensor,
        max_len: int,
        *,
        layer: int | Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
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
        return f"PagedKVCache({self.spec}, {self.caches[0].device})"

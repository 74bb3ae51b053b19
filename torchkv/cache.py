"""PagedKVCache: a paged cache and how it is laid out, in one object, changed in place."""

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from kvcore.cache_spec import CacheSpec, Described
from kvcore.choices import FloatDtype, KVCacheDtype, Layout, TorchBackend
from kvcore.contract.checks import check_scale, check_scale_type
from kvcore.swap import with_blocks
from torchkv._arguments import check_tensors, spec_of
from torchkv._readable import Readable
from torchkv._state import Stateful
from torchkv._writable import Writable
from torchkv.read import AttendOptions, paged_attention


class PagedKVCache(Described, Readable, Writable, Stateful):
    """A paged KV cache: tensors, layout and scales. A plain object, whose tensors `write` changes in place.

    Attributes:
        caches: `(key_cache, value_cache)`, or `(kv_cache,)` for layouts that hold both.
        spec: Extents, layout and formats.
        k_scale: What quantised keys were divided by: float32 as `create` takes it, or None for 1; with per_token_head
            the scale cache, which `write` updates, too.
        v_scale: What quantised values were divided by, of the same kind. None where values are a part of the keys.

    Example:
        >>> cache = torchkv.PagedKVCache.create(num_blocks=3, block_size=2, num_heads=1, head_size=2, dtype="float32")
        >>> cache
        PagedKVCache(3 blocks × 2 slots, 1 heads × 2, float32, 'block slot head dim', 96 bytes, cpu)
        >>> key = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 tokens, 1 head of 2 elements
        >>> cache.write(key, -key, torch.tensor([4, 5]))  # both slots of block 2
        >>> block_tables, seq_lens = torch.tensor([[2, -1]]), torch.tensor([2])
        >>> cache.gather(block_tables, seq_lens, max_len=2)[0][0, :, 0].tolist()
        [[1.0, 2.0], [3.0, 4.0]]
        >>> cache.attend(torch.zeros((1, 1, 2)), block_tables, seq_lens).tolist()  # the mean of both values
        [[[-2.0, -3.0]]]
    """

    def __init__(
        self, caches: tuple[Tensor, ...], spec: CacheSpec, k_scale: Tensor | None = None, v_scale: Tensor | None = None
    ) -> None:
        self.caches, self.spec, self.k_scale, self.v_scale = caches, spec, k_scale, v_scale

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
            device: Where; None means torch's default.

        Raises:
            ValueError: an extent, layout, choice or scale's shape does not fit, or memory has no room for a block.
            TypeError: a dtype or type does not fit, or num_blocks and memory, or both names of num_heads, are given.
        """
        name = str(dtype).removeprefix("torch.")
        spec = CacheSpec.create(
            num_layers, num_blocks, block_size, num_heads, head_size, head_size_v, name, layout, kv_cache_dtype,
            per_token_head, scale_layout, num_kv_heads, memory,
        )  # fmt: skip
        spec.check_scales(k_scale, v_scale)
        caches = tuple(torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device) for shape in spec.shapes)
        scale_caches = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in spec.scale_shapes]
        if scale_caches:
            return cls(caches, spec, *scale_caches)
        scales: list[Tensor | None] = [None, None]
        for index, (name, scale) in enumerate((("k_scale", k_scale), ("v_scale", v_scale))):
            if scale is not None:
                if not isinstance(scale, (list, tuple)):
                    check_scale_type(name, scale)
                made = torch.as_tensor(scale, dtype=torch.float32, device=caches[0].device).clone()
                check_scale(name, spec_of(made), spec.num_heads, spec.num_layers)
                scales[index] = made
        return cls(caches, spec, *scales)

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
            layer: Index into the cache's layers, or a Tensor of one integer; None for a cache of one layer.
            return_lse: Whether the log-sum-exp is returned, too.
            out: A contiguous tensor to write the result to; None: a new one.
            lse: The same for the log-sum-exp; only with out.
            backend: None, "triton", "torch" or "interpret".

        Returns:
            `[num_tokens, num_q_heads, head_size_v]` of query's dtype; with return_lse also `[num_tokens, num_q_heads]`
            float32.
        """
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

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "PagedKVCache":
        """The cache on a device: itself where it is there already, else a copy, as with `Tensor.to`.

        Args:
            device: Where.
            non_blocking: Whether a copy to or from pinned memory may still be under way afterwards.

        Raises:
            TypeError: device is none, but a dtype: `relayout` makes a cache of another.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device, its name or its index, got {device!r}")
        moved = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self._tensors.values()]
        if all(new is old for new, old in zip(moved, self._tensors.values(), strict=True)):
            return self
        *caches, k_scale, v_scale = moved
        return PagedKVCache(tuple(c for c in caches if c is not None), self.spec, k_scale, v_scale)

    def create_host(self, *, num_blocks: int | None = None, memory: int | str | None = None) -> "PagedKVCache":
        """Allocates a cache of zeros like this one in the host's memory, which `swap_blocks` copies blocks to and from.

        Of a cache on a GPU it is in pinned memory, which is dear to allocate: once, when a server starts. Static scales
        are copied there, too.

        Args:
            num_blocks: Blocks, per layer.
            memory: In place of num_blocks: bytes that all arrays may have together, or text such as `"2GiB"`.

        Raises:
            ValueError: num_blocks is negative, or memory has no room for a block.
            TypeError: one is of another type, or both or neither are given.

        Example:
            >>> cache = torchkv.PagedKVCache.create(num_blocks=4, block_size=2, num_heads=1, head_size=8)
            >>> host = cache.create_host(num_blocks=64)
            >>> cache.swap_blocks(host, torch.tensor([[3, 0], [1, 1]]))  # two blocks are free for others
            >>> host.swap_blocks(cache, torch.tensor([[0, 2]]))  # and one comes back, to another place
        """
        spec = with_blocks(self.spec, num_blocks, memory)
        pinned = not self.caches[0].is_cpu
        dtypes = [self.caches[0].dtype] * len(spec.shapes) + [torch.float32] * len(spec.scale_shapes)
        caches = [
            torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)
            for shape, dtype in zip((*spec.shapes, *spec.scale_shapes), dtypes, strict=True)
        ]
        count = len(spec.shapes)
        static = (None if s is None else s.to("cpu", copy=True) for s in (self.k_scale, self.v_scale))
        k_scale, v_scale = caches[count:] or static
        return PagedKVCache(tuple(caches[:count]), spec, k_scale, v_scale)

    def __repr__(self) -> str:
        return f"PagedKVCache({self.spec}, {self.caches[0].device})"

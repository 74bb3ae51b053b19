"""What reads a cache, but for attention."""

from typing import Any

import torch
from torch import Tensor

from kvcore.cache_spec import CacheSpec
from kvcore.choices import FloatDtype, TorchBackend
from torchkv.read import gather_kv
from torchkv.slots import gather_slots


class Readable:
    """A cache whose keys and values can be copied out."""

    caches: tuple[Tensor, ...]
    spec: CacheSpec
    k_scale: Tensor | None
    v_scale: Tensor | None

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
        """Copies keys and values of sequences into contiguous tensors.

        Args:
            block_tables: `[num_seqs, max_blocks]` of int32 or int64: the blocks of each sequence, in order.
            seq_lens: `[num_seqs]` of int32 or int64: tokens of each sequence in the cache.
            max_len: Positions of a sequence in the result.
            dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
            layer: Index into the cache's layers, or a Tensor of one integer; None for a cache of one layer.
            out: Two contiguous tensors to write the results to; None: new ones.
            backend: None, "triton", "torch" or "interpret".

        Returns:
            Key `[num_seqs, max_len, num_heads, head_size]` and value `[num_seqs, max_len, num_heads, head_size_v]`,
            with zeros past each length.
        """
        return gather_kv(
            self.caches, block_tables, seq_lens, max_len, dtype=dtype, layer=layer, out=out, backend=backend,
            head_size=self.spec.head_size, **self._reading,
        )  # fmt: skip

    def read(
        self,
        slots: Tensor,
        *,
        dtype: torch.dtype | FloatDtype | None = None,
        layer: int | Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
        backend: TorchBackend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Copies keys and values of slots into contiguous tensors.

        Args:
            slots: `[n]` of int32 or int64, as `slot_mapping` gives them.
            dtype: float16, bfloat16 or float32; None means the cache's own, or bfloat16 where it is quantised.
            layer: Index into the cache's layers, or a Tensor of one integer; None for a cache of one layer.
            out: Two contiguous tensors to write the results to; None: new ones.
            backend: None, "triton", "torch" or "interpret".

        Returns:
            Key `[n, num_heads, head_size]` and value `[n, num_heads, head_size_v]`, with zeros for slots that are not
            in the cache.
        """
        return gather_slots(
            self.caches, slots, dtype=dtype, layer=layer, out=out, backend=backend,
            head_size=self.spec.head_size, **self._reading,
        )  # fmt: skip

    @property
    def _reading(self) -> dict[str, Any]:
        v_scale = self.k_scale if self.spec.layout.latent else self.v_scale
        return {**self.spec.reading, "k_scale": self.k_scale, "v_scale": v_scale}

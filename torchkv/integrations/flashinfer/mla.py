"""FlashInfer's wrapper of attention over latent caches."""

from typing import Any

import torch
from torch import Tensor

from kvcore.formats import FLOATS
from torchkv._arguments import dtype_name
from torchkv.integrations.flashinfer.arguments import (
    UnsupportedError,
    check_absent,
    check_backend,
    check_batch,
    check_data_types,
    check_planned_dtype,
)
from torchkv.integrations.flashinfer.planned import Planned, check_rows


class BatchMLAPagedAttentionWrapper:
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper`: DeepSeek's attention over one tensor of latent rows.

    ckv_cache and kpe_cache are to be parts of one tensor's rows: `kv_cache[..., :512]` and `kv_cache[..., 512:]`.

    Args:
        float_workspace_buffer: Not used but for its device.
        use_cuda_graph: Whether graphs capture run. The number of sequences is fixed then, and no later plan may have
            more query tokens than the first.
        qo_indptr: `[batch_size + 1]`, needed for use_cuda_graph. plan copies into it; it is not read.
        kv_indptr: `[batch_size + 1]`, needed for use_cuda_graph. plan copies into it.
        kv_indices: As large as indices can be, needed for use_cuda_graph. plan copies into it.
        kv_len_arr: `[batch_size]`, needed for use_cuda_graph. plan copies into it.
        backend: Any of FlashInfer's but "cutlass"; no difference.
        max_pages_per_seq: Not FlashInfer's: columns of the block tables with use_cuda_graph. None: as many as
            kv_indices has elements, which is always right and takes memory.

    Raises:
        UnsupportedError: backend is another than described here.
        ValueError: a buffer does not fit.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
        *,
        max_pages_per_seq: int | None = None,
    ) -> None:
        check_backend(backend)
        buffers = {
            "qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr
        }  # fmt: skip
        self._planned = Planned(float_workspace_buffer.device, buffers if use_cuda_graph else None, max_pages_per_seq)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Takes a batch's pages and query tokens, and what its attention computes.

        Args:
            qo_indptr: `[batch_size + 1]` of int32: where each sequence's query tokens begin; on any device.
            kv_indptr: `[batch_size + 1]` of int32, or more, not used: where each sequence's pages begin in kv_indices.
            kv_indices: Numbers of pages.
            kv_len_arr: `[batch_size]` of int32: tokens of each sequence.
            num_heads: Not used: run is told by its tensors.
            head_dim_ckv: Not used.
            head_dim_kpe: Not used.
            page_size: Not used.
            causal: Whether a token sees positions up to its own only.
            sm_scale: What logits are multiplied by.
            q_data_type: Dtype of queries and results: float16, bfloat16 or float32.
            kv_data_type: Dtype of the cache: one of those, or fp8.
            use_profiler: False.

        Raises:
            UnsupportedError: an argument is another than described here.
            ValueError: tensors do not fit each other, or what CUDA graphs were promised.
        """
        if use_profiler:
            raise UnsupportedError(f"use_profiler must be False, got {use_profiler}")
        self._dtypes = check_data_types(q_data_type, kv_data_type, None)
        kv_indptr = kv_indptr[: len(qo_indptr)]
        check_batch("kv_len_arr", len(kv_len_arr), qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        self._planned.plan(qo_indptr, kv_indptr, kv_indices, kv_len_arr, kv_len_arr, int(qo_indptr[-1]))
        self._causal, self._sm_scale = causal, sm_scale

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the planned batch.

        Args:
            q_nope: `[qo_indptr[-1], num_heads, head_dim_ckv]`.
            q_pe: `[qo_indptr[-1], num_heads, head_dim_kpe]`.
            ckv_cache: `[num_pages, page_size, head_dim_ckv]`, the first part of a tensor's rows.
            kpe_cache: `[num_pages, page_size, head_dim_kpe]`, the rest of the same rows.
            out: `[qo_indptr[-1], num_heads, head_dim_ckv]`, written to; None: a new tensor.
            lse: `[qo_indptr[-1], num_heads]` of float32, written to, with and without return_lse.
            return_lse: Whether the log-sum-exp is returned, too.
            profiler_buffer: None.
            kv_len: Not used: it is for another backend.
            page_table: Not used.
            return_lse_base_on_e: Whether the log-sum-exp is to base e, else to base 2.
            o_scale: None.
            ckv_scale: With a cache of fp8: what its elements are multiplied by.
            ckv_scale_arr: None.
            kpe_scale: The same for the rotary part. Where it differs, q_pe is multiplied by their ratio, and rounded.

        Returns:
            The result, of the shape of out; with return_lse also the log-sum-exp.

        Raises:
            UnsupportedError: an argument is another than described here.
            ValueError: a shape, dtype or device does not fit, or there was no plan.
        """
        check_absent(profiler_buffer=profiler_buffer, o_scale=o_scale, ckv_scale_arr=ckv_scale_arr)
        planned = self._planned.check()
        cache = joined(ckv_cache, kpe_cache)
        check_rows(q_nope, planned.rows, self._dtypes[0], cache, self._dtypes[1])
        check_planned_dtype("q_pe", q_pe, "q_data_type", self._dtypes[0])
        for name, given in (("ckv_scale", ckv_scale), ("kpe_scale", kpe_scale)):
            if given is not None and dtype_name(cache) in FLOATS:
                raise ValueError(f"{name} must be None for a cache of {dtype_name(cache)}, got {given}")
        if ckv_scale != kpe_scale:
            q_pe = q_pe * ((1.0 if kpe_scale is None else kpe_scale) / (1.0 if ckv_scale is None else ckv_scale))
        scale: Any = self._sm_scale if ckv_scale is None else self._sm_scale * ckv_scale
        return planned.attend(
            torch.cat([q_nope, q_pe], -1), cache, scale, None, ckv_scale, out, lse, return_lse, return_lse_base_on_e,
            causal=self._causal, layout="MLA", head_size_v=ckv_cache.shape[-1],
        )  # fmt: skip


def joined(ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
    """The rows of which two tensors are parts: a view of the first one's memory.

    Raises:
        UnsupportedError: they are parts of no rows.
    """
    ckv_dim, kpe_dim = ckv_cache.shape[-1], kpe_cache.shape[-1]
    if kpe_dim == 0:
        return ckv_cache
    if (
        ckv_cache.dtype != kpe_cache.dtype
        or ckv_cache.shape[:-1] != kpe_cache.shape[:-1]
        or ckv_cache.stride() != kpe_cache.stride()
        or ckv_cache.untyped_storage().data_ptr() != kpe_cache.untyped_storage().data_ptr()
        or ckv_cache.storage_offset() + ckv_dim * ckv_cache.stride(-1) != kpe_cache.storage_offset()
    ):
        raise UnsupportedError(
            f"ckv_cache and kpe_cache must be parts of the same rows, kv_cache[..., :{ckv_dim}] and "
            f"kv_cache[..., {ckv_dim}:], got tensors that are not"
        )
    return ckv_cache.as_strided((*ckv_cache.shape[:-1], ckv_dim + kpe_dim), ckv_cache.stride())

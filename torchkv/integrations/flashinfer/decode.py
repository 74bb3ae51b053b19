"""FlashInfer's wrapper of decode attention."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchkv.integrations.flashinfer.arguments import (
    PagedCache,
    UnsupportedError,
    check_absent,
    check_backend,
    check_batch,
    check_data_types,
    check_kv_layout,
    check_no_more,
    check_pos_encoding_mode,
    key_and_value,
    scales_of,
)
from torchkv.integrations.flashinfer.page import get_seq_lens
from torchkv.integrations.flashinfer.planned import Planned, check_page_size, check_rows, window_of


class _Options(NamedTuple):
    """What plan says of attention, and what forward says again."""

    window_left: int
    logits_soft_cap: float | None
    sm_scale: float | None


class BatchDecodeWithPagedKVCacheWrapper:
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper`: one query token of each sequence, or q_len_per_req, causal.

    plan makes block tables and lengths on the device; its host waits for the device unless indptr is on the CPU, as
    FlashInfer's does. run is one `torchkv.paged_attention`. With use_cuda_graph, tables and lengths stay where the
    first plan put them, so that graphs that captured run are right after every later plan.

    Args:
        float_workspace_buffer: Not used but for its device.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Whether graphs capture run. The number of sequences is fixed then, that of the last buffer.
        use_tensor_cores: Not used.
        paged_kv_indptr_buffer: `[batch_size + 1]`, needed for use_cuda_graph. plan copies indptr into it; it is not
            read.
        paged_kv_indices_buffer: As large as indices can be, needed for use_cuda_graph. plan copies indices into it.
        paged_kv_last_page_len_buffer: `[batch_size]`, needed for use_cuda_graph. plan copies last_page_len into it.
        backend: Any of FlashInfer's but "cudnn"; no difference.
        jit_args: None.
        max_pages_per_seq: Not FlashInfer's: columns of the block tables with use_cuda_graph. None: as many as
            paged_kv_indices_buffer has elements, which is always right and takes memory.

    Raises:
        UnsupportedError: jit_args or backend is another than described here.
        ValueError: a layout, or a buffer, does not fit.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        *,
        max_pages_per_seq: int | None = None,
    ) -> None:
        check_kv_layout(kv_layout)
        check_backend(backend)
        check_absent(jit_args=jit_args)
        self._kv_layout, self.use_tensor_cores = kv_layout, use_tensor_cores
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        self.is_cuda_graph_enabled = use_cuda_graph
        self._planned = Planned(float_workspace_buffer.device, buffers if use_cuda_graph else None, max_pages_per_seq)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Has no effect: there is no workspace."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Takes a batch's pages, and what its attention computes.

        Args:
            indptr: `[batch_size + 1]` of int32: where each sequence's pages begin in indices; on any device.
            indices: Numbers of pages; on any device.
            last_page_len: `[batch_size]` of int32: slots of each sequence's last page that are used.
            num_qo_heads: Not used: run is told by its tensors.
            num_kv_heads: Not used.
            head_dim: Not used.
            page_size: Slots of a page.
            pos_encoding_mode: "NONE".
            window_left: How many positions before its own a token sees; -1: all.
            logits_soft_cap: A logit x becomes `cap * tanh(x / cap)`; None or 0 for no cap.
            q_data_type: Dtype of queries and results: float16, bfloat16 or float32.
            kv_data_type: Dtype of the cache: one of those, or fp8. None: data_type, or that of queries.
            o_data_type: None or q_data_type.
            data_type: Of queries or the cache, where theirs is None.
            sm_scale: What logits are multiplied by; None: `head_dim ** -0.5`.
            rope_scale: Has no effect without pos_encoding_mode.
            rope_theta: Has no effect without pos_encoding_mode.
            non_blocking: Not used.
            block_tables: Not used: they are made of indptr and indices.
            seq_lens: Not used: they are made of indptr and last_page_len.
            fixed_split_size: Not used: results depend on no other sequence of a batch.
            disable_split_kv: Not used.
            q_len_per_req: Query tokens of each sequence, its last ones.
            window_right: 0.

        Raises:
            UnsupportedError: an argument is another than described here.
            ValueError: tensors do not fit each other, or what CUDA graphs were promised.
        """
        check_pos_encoding_mode(pos_encoding_mode)
        if window_right != 0:
            raise UnsupportedError(f"window_right must be 0, got {window_right}")
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be at least 1, got {q_len_per_req}")
        q_data_type = data_type if q_data_type is None else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
        self._dtypes = check_data_types(q_data_type, kv_data_type, o_data_type)
        batch_size, starts = len(last_page_len), None
        check_batch("last_page_len", batch_size, indptr=indptr)
        if q_len_per_req > 1:
            starts = torch.arange(batch_size + 1, dtype=torch.int32) * q_len_per_req
        lens = get_seq_lens(indptr.to(last_page_len.device), last_page_len, page_size)
        self._planned.plan(starts, indptr, indices, last_page_len, lens, batch_size * q_len_per_req)
        self._options, self._page_size = _Options(window_left, logits_soft_cap, sm_scale), page_size

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: PagedCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the planned batch.

        Args:
            q: `[batch_size * q_len_per_req, num_qo_heads, head_dim]`.
            paged_kv_cache: `(k_cache, v_cache)` of `[num_pages, page_size, num_kv_heads, head_dim]` with NHD,
                `[num_pages, num_kv_heads, page_size, head_dim]` with HND, or one tensor with an axis of 2 after the
                first. The axis of slots may be missing from pages of one slot.
            *args: None: arguments of customised kernels.
            q_scale: A number by which queries are multiplied.
            k_scale: A number by which keys are multiplied; with a cache of fp8 also a tensor of one element, or of one
                a head.
            v_scale: The same for values.
            out: `[batch_size * q_len_per_req, num_qo_heads, head_dim]`, written to; None: a new tensor.
            lse: `[batch_size * q_len_per_req, num_qo_heads]` of float32, written to, with and without return_lse.
            return_lse: Whether the log-sum-exp is returned, too, to base 2.
            enable_pdl: Not used.
            window_left: In the place of plan's.
            sinks: `[num_qo_heads]`: one more logit of each head in the softmax's denominator.
            q_len_per_req: None, or what plan was told.
            skip_softmax_threshold_scale_factor: None.
            kv_cache_sf: None.

        Returns:
            The result, of the shape of out; with return_lse also the log-sum-exp.

        Raises:
            UnsupportedError: an argument is another than described here.
            ValueError: a shape, dtype, layout or device does not fit, or there was no plan.
        """
        check_no_more(args)
        check_absent(
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=None if kv_cache_sf is None else "scales of nvfp4",
        )
        planned = self._planned.check()
        caches = key_and_value(paged_kv_cache, self._kv_layout)
        if q_len_per_req is not None and planned.rows != planned.batch_size * q_len_per_req:
            raise ValueError(
                f"q_len_per_req must be plan's, {planned.rows} rows of {planned.batch_size} sequences, "
                f"got {q_len_per_req}"
            )
        check_rows(q, planned.rows, self._dtypes[0], caches[0], self._dtypes[1])
        check_page_size(caches[0], self._kv_layout, self._page_size)
        options = self._options
        left = options.window_left if window_left is None else window_left
        scale, k_scale, v_scale = scales_of(q, caches[0], options.sm_scale, q_scale, k_scale, v_scale)
        return planned.attend(
            q, caches, scale, k_scale, v_scale, out, lse, return_lse, sinks=sinks, sliding_window=window_of(left),
            soft_cap=options.logits_soft_cap, layout=self._kv_layout,
        )  # fmt: skip

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What run was, with some of plan's arguments again, which stay."""
        check_pos_encoding_mode(pos_encoding_mode)
        self._options = _Options(window_left, logits_soft_cap, sm_scale)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Has no effect."""


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper`: with use_cuda_graph.

    Args:
        workspace_buffer: Not used but for its device.
        indptr_buffer: `[batch_size + 1]`. plan copies indptr into it.
        indices_buffer: As large as indices can be. plan copies indices into it.
        last_page_len_buffer: `[batch_size]`. plan copies last_page_len into it.
        kv_layout: "NHD" or "HND".
        use_tensor_cores: Not used.
        max_pages_per_seq: Not FlashInfer's: columns of the block tables. None: as many as indices_buffer has elements.

    Raises:
        ValueError: a layout, or a buffer, does not fit.
    """

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        *,
        max_pages_per_seq: int | None = None,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer,
            max_pages_per_seq=max_pages_per_seq,
        )  # fmt: skip

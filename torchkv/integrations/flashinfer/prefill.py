"""FlashInfer's wrapper of attention of any number of query tokens of each sequence."""

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

    causal: bool
    window_left: int
    logits_soft_cap: float | None
    sm_scale: float | None


class BatchPrefillWithPagedKVCacheWrapper:
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`: prompts, chunks of them and decoding in one call.

    Of a sequence with n query tokens, token i stands at position `seq_len - n + i`. plan makes block tables and lengths
    on the device; its host waits for the device unless the indptrs are on the CPU, as FlashInfer's does. run is one
    `torchkv.paged_attention`. With use_cuda_graph, tables, lengths and starts stay where the first plan put them.

    Args:
        float_workspace_buffer: Not used but for its device.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: Whether graphs capture run. The number of sequences is fixed then, and no later plan may have
            more query tokens than the first.
        qo_indptr_buf: `[batch_size + 1]`, needed for use_cuda_graph. plan copies qo_indptr into it; it is not read.
        paged_kv_indptr_buf: `[batch_size + 1]`, needed for use_cuda_graph. plan copies into it.
        paged_kv_indices_buf: As large as indices can be, needed for use_cuda_graph. plan copies into it.
        paged_kv_last_page_len_buf: `[batch_size]`, needed for use_cuda_graph. plan copies into it.
        custom_mask_buf: Not used: there are no custom masks.
        mask_indptr_buf: Not used.
        backend: Any of FlashInfer's but "cudnn", whose qo_indptr counts elements; no difference.
        jit_args: None.
        jit_kwargs: None.
        max_pages_per_seq: Not FlashInfer's: columns of the block tables with use_cuda_graph. None: as many as
            paged_kv_indices_buf has elements, which is always right and takes memory.

    Raises:
        UnsupportedError: jit_args, jit_kwargs or backend is another than described here.
        ValueError: a layout, or a buffer, does not fit.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        *,
        max_pages_per_seq: int | None = None,
    ) -> None:
        check_kv_layout(kv_layout)
        check_backend(backend)
        check_absent(jit_args=jit_args, jit_kwargs=jit_kwargs)
        self._kv_layout = kv_layout
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        self.is_cuda_graph_enabled = use_cuda_graph
        self._planned = Planned(float_workspace_buffer.device, buffers if use_cuda_graph else None, max_pages_per_seq)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Has no effect: there is no workspace."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Takes a batch's pages and query tokens, and what its attention computes.

        Args:
            qo_indptr: `[batch_size + 1]` of int32: where each sequence's query tokens begin; on any device.
            paged_kv_indptr: `[batch_size + 1]` of int32: where each sequence's pages begin in paged_kv_indices.
            paged_kv_indices: Numbers of pages.
            paged_kv_last_page_len: `[batch_size]` of int32: slots of each sequence's last page that are used.
            num_qo_heads: Not used: run is told by its tensors.
            num_kv_heads: Not used.
            head_dim_qk: Not used.
            page_size: Slots of a page.
            head_dim_vo: Not used.
            custom_mask: None.
            packed_custom_mask: None.
            causal: Whether a token sees positions up to its own only.
            pos_encoding_mode: "NONE".
            use_fp16_qk_reduction: Not used: sums are of float32.
            sm_scale: What logits are multiplied by; None: `head_dim_qk ** -0.5`.
            window_left: With causal, how many positions before its own a token sees; -1: all.
            logits_soft_cap: A logit x becomes `cap * tanh(x / cap)`; None or 0 for no cap.
            rope_scale: Has no effect without pos_encoding_mode.
            rope_theta: Has no effect without pos_encoding_mode.
            q_data_type: Dtype of queries and results: float16, bfloat16 or float32.
            kv_data_type: Dtype of the cache: one of those, or fp8. None: that of queries.
            o_data_type: None or q_data_type.
            non_blocking: Not used.
            prefix_len_ptr: None.
            token_pos_in_items_ptr: None.
            token_pos_in_items_len: Has no effect without token_pos_in_items_ptr.
            max_item_len_ptr: None.
            seq_lens: Not used: they are made of paged_kv_indptr and paged_kv_last_page_len.
            seq_lens_q: Not used.
            block_tables: Not used: they are made of paged_kv_indptr and paged_kv_indices.
            max_token_per_sequence: Not used.
            max_sequence_kv: Not used.
            fixed_split_size: Not used.
            disable_split_kv: Not used.

        Raises:
            UnsupportedError: an argument is another than described here.
            ValueError: tensors do not fit each other, or what CUDA graphs were promised.
        """
        check_absent(
            custom_mask=custom_mask, packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr, max_item_len_ptr=max_item_len_ptr,
        )  # fmt: skip
        check_pos_encoding_mode(pos_encoding_mode)
        self._dtypes = check_data_types(q_data_type, kv_data_type, o_data_type)
        check_batch(
            "paged_kv_last_page_len", len(paged_kv_last_page_len), qo_indptr=qo_indptr, paged_kv_indptr=paged_kv_indptr
        )
        lens = get_seq_lens(paged_kv_indptr.to(paged_kv_last_page_len.device), paged_kv_last_page_len, page_size)
        self._planned.plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, lens, int(qo_indptr[-1])
        )
        self._options, self._page_size = _Options(causal, window_left, logits_soft_cap, sm_scale), page_size

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
        kv_cache_sf: PagedCache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the planned batch.

        Args:
            q: `[qo_indptr[-1], num_qo_heads, head_dim_qk]`.
            paged_kv_cache: `(k_cache, v_cache)` of `[num_pages, page_size, num_kv_heads, head_dim]` with NHD,
                `[num_pages, num_kv_heads, page_size, head_dim]` with HND, or one tensor with an axis of 2 after the
                first. The axis of slots may be missing from pages of one slot.
            *args: None: arguments of customised kernels.
            q_scale: A number by which queries are multiplied.
            k_scale: A number by which keys are multiplied; with a cache of fp8 also a tensor of one element, or of one
                a head.
            v_scale: The same for values.
            out: `[qo_indptr[-1], num_qo_heads, head_dim_vo]`, written to; None: a new tensor.
            lse: `[qo_indptr[-1], num_qo_heads]` of float32, written to, with and without return_lse.
            return_lse: Whether the log-sum-exp is returned, too, to base 2.
            enable_pdl: Not used.
            window_left: In the place of plan's.
            sinks: `[num_qo_heads]`: one more logit of each head in the softmax's denominator.
            kv_cache_sf: None.
            skip_softmax_threshold_scale_factor: None.
            use_fp16_softmax: Not used.
            uses_spcompress: Not used.

        Returns:
            The result, of the shape of out; with return_lse also the log-sum-exp.

        Raises:
            UnsupportedError: an argument is another than described here, or there is a window without causal.
            ValueError: a shape, dtype, layout or device does not fit, or there was no plan.
        """
        check_no_more(args)
        check_absent(
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=None if kv_cache_sf is None else "scales of nvfp4",
        )
        planned = self._planned.check()
        caches = key_and_value(paged_kv_cache, self._kv_layout)
        check_rows(q, planned.rows, self._dtypes[0], caches[0], self._dtypes[1])
        check_page_size(caches[0], self._kv_layout, self._page_size)
        options = self._options
        left = options.window_left if window_left is None else window_left
        if left >= 0 and not options.causal:
            raise UnsupportedError(f"window_left must be -1 where causal is False, got {left}")
        scale, k_scale, v_scale = scales_of(q, caches[0], options.sm_scale, q_scale, k_scale, v_scale)
        return planned.attend(
            q, caches, scale, k_scale, v_scale, out, lse, return_lse, sinks=sinks, causal=options.causal,
            sliding_window=window_of(left), soft_cap=options.logits_soft_cap, layout=self._kv_layout,
        )  # fmt: skip

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        self._options = _Options(causal, window_left, logits_soft_cap, sm_scale)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Has no effect."""

"""FlashInfer's paged attention with FlashInfer 0.6's names, parameters, order and defaults, on torchkv's kernels.

    from torchkv.integrations import flashinfer
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type=q.dtype)
    out = wrapper.run(q, paged_kv_cache)

Pages are FlashInfer's `indptr`, `indices` and `last_page_len`; `block_tables` and `page_indices` turn them into block
tables and back. A log-sum-exp is to base 2 here; `lse_to_base_2` and `lse_to_base_e` turn it. What an argument asks for
and torchkv lacks is an `UnsupportedError`.
"""

from torchkv.integrations.flashinfer.arguments import UnsupportedError
from torchkv.integrations.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
)
from torchkv.integrations.flashinfer.merge import (
    lse_to_base_2,
    lse_to_base_e,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from torchkv.integrations.flashinfer.mla import BatchMLAPagedAttentionWrapper
from torchkv.integrations.flashinfer.page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    block_tables,
    get_batch_indices_positions,
    get_seq_lens,
    page_indices,
    slot_mapping,
)
from torchkv.integrations.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "UnsupportedError",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "block_tables",
    "get_batch_indices_positions",
    "get_seq_lens",
    "lse_to_base_2",
    "lse_to_base_e",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "page_indices",
    "slot_mapping",
]

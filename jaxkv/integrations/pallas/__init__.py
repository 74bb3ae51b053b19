"""JAX's Pallas attention over paged caches, with its names, parameters, order and defaults, on jaxkv's kernels.

    from jaxkv.integrations import pallas
    out = pallas.paged_attention(q, k_pages, v_pages, block_tables, lengths)

`paged_attention` stands for `jax.experimental.pallas.ops.gpu.paged_attention.paged_attention`, which is deprecated, and
`ragged_paged_attention` for `jax.experimental.pallas.ops.tpu.ragged_paged_attention.ragged_paged_attention`, which runs
on TPUs only. Both run wherever `jaxkv.paged_attention` does, over the pages as they are.
"""

from jaxkv.integrations.pallas.arguments import DEFAULT_MASK_VALUE
from jaxkv.integrations.pallas.decode import paged_attention
from jaxkv.integrations.pallas.ragged import ragged_paged_attention

__all__ = ["DEFAULT_MASK_VALUE", "paged_attention", "ragged_paged_attention"]

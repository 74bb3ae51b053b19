"""A cache of another framework, in the same memory."""

import torch
from torch import Tensor

from kvcore.cache_spec import AnyCache, check_any_cache
from torchkv.cache import PagedKVCache


def from_dlpack(cache: AnyCache) -> PagedKVCache:
    """The other framework's cache as one of this framework, in the same memory: nothing is copied.

    Both read and write it. torch writes in place, and JAX sees it. For JAX to write in place, its cache has to be
    donated, and that needs all of torch's tensors of this memory to be gone: `del` this cache, and what was made of it,
    before the next call that donates. Else XLA raises on a GPU ("Donation requested for buffer with external
    reference"), and copies the cache on a CPU, so that this one is left with the old memory.

    JAX takes an array for constant: have torch write only once what JAX was told to do is done
    (`jax.block_until_ready`), and on a GPU have JAX read after `torch.cuda.synchronize()`.

    Args:
        cache: A `jaxkv.PagedKVCache` on one device.

    Returns:
        A cache of the same description. The memory lives as long as either cache does.

    Raises:
        TypeError: cache is no PagedKVCache.

    Example:
        >>> import jax.numpy as jnp, jaxkv
        >>> theirs = jaxkv.PagedKVCache.create(num_blocks=4, block_size=2, num_heads=1, head_size=2, dtype="float32")
        >>> ours = torchkv.from_dlpack(theirs)
        >>> ours.write(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]), torch.tensor([5]))
        >>> theirs.gather(jnp.array([[2]]), jnp.array([2]), max_len=2)[1][0, 1].tolist()
        [[3.0, 4.0]]
    """
    check_any_cache(cache)

    def share(array: object) -> Tensor:
        return torch.from_dlpack(array)

    scales = (None if scale is None else share(scale) for scale in (cache.k_scale, cache.v_scale))
    return PagedKVCache(tuple(map(share, cache.caches)), cache.spec, *scales)

"""A cache of another framework, in the same memory."""

import jax
import jax.numpy as jnp

from jaxkv.cache import PagedKVCache
from kvcore.cache_spec import AnyCache, check_any_cache


def from_dlpack(cache: AnyCache) -> PagedKVCache:
    """The other framework's cache as one of this framework, in the same memory: nothing is copied.

    What is read with it is what torch has written. It is not to be donated, nor written with: on a CPU, XLA copies
    memory that is torch's to write to it. So let JAX own a cache that both write to: create it with jaxkv, and have
    torch write with `torchkv.from_dlpack(cache)`.

    JAX takes an array for constant: have torch write only once what JAX was told to do is done
    (`jax.block_until_ready`), and on a GPU have JAX read after `torch.cuda.synchronize()`.

    Args:
        cache: A `torchkv.PagedKVCache` on one device. On a CPU its arrays begin at multiples of 64 bytes, as those do
            that `create` allocates.

    Returns:
        A cache of the same description. The memory lives as long as either cache does.

    Raises:
        TypeError: cache is no PagedKVCache.
        ValueError: JAX cannot have the memory without a copy.

    Example:
        >>> import torch, torchkv
        >>> theirs = torchkv.PagedKVCache.create(
        ...     num_blocks=4, block_size=2, num_heads=1, head_size=2, dtype=torch.float32
        ... )
        >>> ours = jaxkv.from_dlpack(theirs)
        >>> theirs.write(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]), torch.tensor([5]))
        >>> ours.gather(jnp.array([[2]]), jnp.array([2]), max_len=2)[1][0, 1].tolist()
        [[3.0, 4.0]]
    """
    check_any_cache(cache)

    def share(array: object) -> jax.Array:
        return jnp.from_dlpack(array, copy=False)

    scales = (None if scale is None else share(scale) for scale in (cache.k_scale, cache.v_scale))
    return PagedKVCache(tuple(map(share, cache.caches)), cache.spec, *scales)

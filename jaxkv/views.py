"""The public function that makes views of heads."""

import operator

import jax

from jaxkv._arguments import ArrayLike, as_array, as_static
from jaxkv._views import Heads, is_view
from kvcore.contract.views import kind_of_view


def heads(array: ArrayLike | jax.Ref, start: int, stop: int, *, head_size: int | None = None) -> Heads:
    """A view of some of the heads of an array: what a projection gives as queries, keys and values, without slicing it.

    It is passed for key, value or query, to every op and to `PagedKVCache`, and gives what `array[:, start:stop]`
    gives. XLA copies such a slice before it calls a kernel, 1 to 2 µs each; with a view, the kernel reads the heads
    where they lie. The portable paths slice.

    A view is a pytree whose one leaf is the array; start and stop are static. It passes through jit, scan, vmap,
    shard_map and jax.export, and counts heads of the array at hand: inside shard_map, of the device's own part.
    `jnp.asarray` makes a copy of the heads.

    For heads that XLA splits over devices (Auto or Explicit mesh axes), make the projection
    `[num_tokens, num_kv_heads, q_per_kv + 2, head_size]`, each KV head beside its query heads, and split its second
    axis: each device then has its own queries, keys and values, and nothing is copied or sent. Views of other orders
    are an error there, once heads are split.

    Args:
        array: What has the heads, in one of these shapes.
            `[num_tokens, heads, head_size]`: the view is `[num_tokens, stop - start, head_size]`.
            `[num_tokens, heads * head_size]`, with head_size: the same.
            `[num_tokens, groups, heads, head_size]`: the view has the heads from start to stop of each group, group by
            group, `[num_tokens, groups * (stop - start), head_size]`. Groups are usually KV heads.
            `[num_tokens, columns]`, without head_size: the view is `[num_tokens, stop - start]`, for the kv_c and k_pe
            of MLA.
        start: The first head, or column.
        stop: The one after the last.
        head_size: Elements of a head, where array has heads and elements in one axis.

    Returns:
        The view. It has the attributes array, shape, dtype and ndim.

    Raises:
        ValueError: array's shape does not fit, or it does not have these heads.
        TypeError: start, stop or head_size is no integer, or array is a view.

    Example:
        >>> kv = jnp.arange(8.0).reshape(1, 4, 2)  # 1 token, 2 heads of K and 2 of V, of 2 elements
        >>> key, value = jaxkv.heads(kv, 0, 2), jaxkv.heads(kv, 2, 4)
        >>> key.shape, jnp.asarray(value).tolist()
        ((1, 2, 2), [[[4.0, 5.0], [6.0, 7.0]]])
        >>> caches = jnp.zeros((2, 3, 4, 2, 2))  # for K and for V, 3 blocks of 4 slots
        >>> _, value_cache = jaxkv.reshape_and_cache_flash(key, value, *caches, jnp.array([5]))
        >>> value_cache[1, 1].tolist()  # slot 5 is place 1 of block 1
        [[4.0, 5.0], [6.0, 7.0]]
    """
    if is_view(array):
        raise TypeError(f"array must be an array, got a view, {array!r}")
    whole = as_array(array)
    start, stop, head_size = as_static("start", start), as_static("stop", stop), as_static("head_size", head_size)
    kind = kind_of_view(whole.shape, start, stop, head_size)
    size = None if head_size is None else operator.index(head_size)
    return Heads(whole, kind, operator.index(start), operator.index(stop), size)

"""The merge of partial results of attention."""

import jax
import jax.numpy as jnp

from jaxkv._arguments import ArrayLike, as_array
from jaxkv._call import spec_of
from kvcore.contract.read import check_merge


def merge_attention(outs: ArrayLike, lses: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Merges partial results of attention over parts of the positions, as devices compute that share a context.

    A row of the result is `sum(exp(lse_p) * out_p) / sum(exp(lse_p))` over the partial results p, and its log-sum-exp
    `log(sum(exp(lse_p)))`. A partial result whose log-sum-exp there is -inf or +inf (which other kernels give) saw no
    positions: it is left out, whatever it holds, NaN too. Of a row without any the result is zeros, and -inf. A
    log-sum-exp that is NaN makes the row NaN. Differentiable: rows that are left out have gradients of zero.

    Args:
        outs: `[parts, num_tokens, num_q_heads, head_size_v]`: partial results, from a `paged_attention` over each part.
        lses: `[parts, num_tokens, num_q_heads]` float32, from the same calls. Sinks belong to one part only.

    Returns:
        What one call over all the positions gives: result of outs' dtype, and log-sum-exp.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> outs = jnp.array([[[[1.0, 2.0]]], [[[5.0, 6.0]]]])  # of 2 parts, for 1 token and 1 head
        >>> lses = jnp.zeros((2, 1, 1))  # both parts have the same weight
        >>> out, lse = jaxkv.merge_attention(outs, lses)
        >>> out.tolist(), round(lse.item(), 4)
        ([[[3.0, 4.0]]], 0.6931)
    """
    outs, lses = as_array(outs), as_array(lses)
    check_merge(spec_of(outs), spec_of(lses))
    return _merge(jnp.asarray(outs), jnp.asarray(lses))


@jax.jit
def _merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    empty = jnp.isinf(lses)
    top = jnp.max(lses, axis=0, initial=jnp.finfo(jnp.float32).min, where=~empty)
    # Zeros in place of infinities and of what empty parts hold, so that gradients have no NaN of theirs either.
    weights = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, lses - top[None])))
    total = jnp.sum(weights, axis=0)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    parts = jnp.where(empty[..., None], 0, outs.astype(jnp.float32))
    out = jnp.sum(parts * weights[..., None], axis=0) / total[..., None]
    return out.astype(outs.dtype), jnp.where(nothing, -jnp.inf, top + jnp.log(total))

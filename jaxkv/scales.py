"""Static scales out of samples."""

import functools

import jax
import jax.numpy as jnp

from jaxkv._arguments import TokenRows, as_array
from jaxkv._call import spec_of
from jaxkv._xla.formats import largest_of, scale_of
from kvcore.choices import Granularity, ScaledDtype
from kvcore.contract.scales import check_kv_scales


def kv_scales(
    key: TokenRows, value: TokenRows, kv_cache_dtype: ScaledDtype, granularity: Granularity = "tensor"
) -> tuple[jax.Array, jax.Array]:
    """Static scales with which a quantised cache holds numbers like these without saturating.

    A scale is `absmax / m` in float32, where m is the format's largest number; for nvfp4 that times 448, the largest
    scale of a group. It is 1 where it would be below 2^-126, as of zeros, and NaN where there is a NaN. (On a GPU XLA's
    division is approximate: the last bit may differ.) Read back, a number x of the sample is off by at most, float32's
    rounding aside,

        int8        half a scale: absmax / 254
        int4        half a scale: absmax / 14
        fp8_e4m3    |x| / 16 where |x| ≥ 2^-6 scale (fnuz: 2^-7), else 2^-10 scale (2^-11)
        fp8_e5m2    |x| / 8 where |x| ≥ 2^-14 scale (fnuz: 2^-15), else 2^-17 scale (2^-18)
        nvfp4       17/96 of the absmax of its group of 16 elements, or 17 · 2^-10 scale where that is more

    Args:
        key: `[num_tokens, num_heads, head_size]` of float16, bfloat16 or float32; a sample of at least one element.
        value: `[num_tokens, num_heads, head_size_v]` of such a dtype; a sample of at least one element.
        kv_cache_dtype: Any but "auto", and "fp8_ds_mla", which computes its scales.
        granularity: "tensor" for one scale, "head" for one a head.

    Returns:
        k_scale and v_scale: float32 of shape `()` or `[num_heads]`. Stacked, those of all layers
        are `[num_layers, num_heads]` or, with an axis more, `[num_layers, 1]`: ops take the row of their `layer`.

    Raises:
        ValueError: a shape or choice does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> key = jnp.array([[[1.0, -63.5], [2.0, 254.0]]])  # 1 token, 2 heads of 2 elements
        >>> k_scale, v_scale = jaxkv.kv_scales(key, 2 * key, "int8", "head")
        >>> k_scale.tolist(), v_scale.tolist()
        ([0.5, 2.0], [1.0, 4.0])
    """
    key, value = as_array(key), as_array(value)
    largest = check_kv_scales(spec_of(key), spec_of(value), kv_cache_dtype, granularity)
    axes = (0, 1, 2) if granularity == "tensor" else (0, 2)
    return _scales(axes, largest, jnp.asarray(key), jnp.asarray(value))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scales(axes: tuple[int, ...], largest: float, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    k_scale, v_scale = (scale_of(largest_of(x.astype(jnp.float32), axes), largest) for x in (key, value))
    return k_scale, v_scale

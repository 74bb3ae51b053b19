"""The arrays of a new cache: of which shapes, and how they are spread over devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxkv._arguments import BACKENDS, as_scale
from jaxkv._call import spec_of
from jaxkv._mesh import mesh_axes_by_name, used_spec
from kvcore.cache_spec import CacheSpec
from kvcore.contract.checks import check_options, check_scale


def allocate(
    spec: CacheSpec, k_scale: Any, v_scale: Any, sharding: jax.sharding.Sharding | None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, jax.Array | None]]:
    """Zeros for caches; with them the static scales, as arrays, or zeros for scale caches, which are split as caches.

    Raises:
        ValueError: a scale's shape does not fit, or the sharding splits what nothing can use.
        TypeError: a scale is no float32, or sharding is no sharding.
    """
    if not (sharding is None or isinstance(sharding, jax.sharding.Sharding | jax.Device)):
        raise TypeError(f"sharding must be a jax.sharding.Sharding, as NamedSharding(mesh, spec), got {sharding!r}")
    splits: list[dict[str, Any]] = [{}] * len(spec.shapes)
    if isinstance(sharding, NamedSharding):
        splits = [mesh_axes_by_name(axes, used_spec(sharding)) for axes in spec.layout.arrays]
    caches = tuple(jnp.zeros(shape, spec.dtype, device=sharding) for shape in spec.shapes)

    if spec.scale_layout is None:
        scales = as_scale(k_scale), as_scale(v_scale)
        check_options(spec.kv_cache_dtype, *scales, None, None, BACKENDS)
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if scale is not None:
                check_scale(name, spec_of(scale), spec.num_heads, spec.num_layers)
        # Copied, so that the cache can be donated, whoever else has a scale: the caller, another cache, or both names.
        return caches, jax.tree.map(jnp.copy, scales)
    shardings = [sharding] * 2
    if isinstance(sharding, NamedSharding):
        shardings = [
            NamedSharding(sharding.mesh, P(*(split.get(a[0]) for a in axes)))
            for split, (*axes, _) in zip((splits[0], splits[-1]), spec.scale_layout.arrays, strict=True)
        ]
    k_cache, v_cache = (
        jnp.zeros(shape, jnp.float32, device=s) for shape, s in zip(spec.scale_shapes, shardings, strict=True)
    )
    return caches, (k_cache, v_cache)


def allocate_host(spec: CacheSpec, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Zeros for caches and scale caches in pinned memory of the host, which no device has to have room for.

    Args:
        spec: What they are.
        like: Caches and scale caches that are split over devices as these are to be.
    """

    def zeros(shape: tuple[int, ...], array: jax.Array) -> jax.Array:
        sharding = array.sharding.with_memory_kind("pinned_host")
        if sharding.is_fully_addressable:
            return jax.device_put(np.zeros(shape, array.dtype), sharding, may_alias=False)
        part = np.zeros(sharding.shard_shape(shape), array.dtype)
        parts = [
            jax.device_put(part, SingleDeviceSharding(device, memory_kind="pinned_host"), may_alias=False)
            for device in sharding.addressable_devices
        ]
        # Whose type says "device" (jax 0.12), whatever its sharding says: results of jit would go there.
        whole = jax.make_array_from_single_device_arrays(shape, sharding, parts)
        return jax.device_put(whole, jax.memory.Space.Host)

    return [zeros(shape, array) for shape, array in zip((*spec.shapes, *spec.scale_shapes), like, strict=True)]

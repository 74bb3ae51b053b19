"""How a whole cache is spread over devices."""

from dataclasses import replace
from typing import Any, Self

import jax
from jax.sharding import PartitionSpec as P

from kvcore.cache_spec import Described
from kvcore.pattern import MeshAxes


class Sharded(Described):
    """The partition specs of a cache, a dataclass with caches and scales."""

    caches: tuple[Any, ...]
    k_scale: Any | None
    v_scale: Any | None

    def partition_spec(self, *, heads: MeshAxes = None, blocks: MeshAxes = None, layers: MeshAxes = None) -> Self:
        """A `PartitionSpec` in place of each array: what `jax.shard_map` takes for in_specs and out_specs.

        With `NamedSharding(mesh, spec)` in place of each spec, it is what `jax.device_put` and `jax.jit` take.

        Args:
            heads: The mesh axis, or axes, over which heads are split, scales of heads among them; None: not split. A
                latent row has no heads, and every device has the whole.
            blocks: That over which blocks are split.
            layers: That over which layers are split.

        Raises:
            ValueError: the layout has no such axis, or has it joined with another that varies slower.

        Example:
            >>> cache = jaxkv.PagedKVCache.create(num_blocks=3, block_size=2, num_heads=4, head_size=2, layout="HND")
            >>> cache.partition_spec(heads="tp").caches[0]
            PartitionSpec(None, 'tp', None, None)
        """
        split: dict[str, MeshAxes] = {"heads": heads, "blocks": blocks, "layers": layers}
        caches = tuple(P(*spec) for spec in self.spec.layout.partition_spec(**split))
        if self.spec.scale_layout is None:
            scales = [_of_scale(scale, heads, layers) for scale in (self.k_scale, self.v_scale)]
        else:  # a scale cache has all the axes of its layout but the last
            scales = [P(*spec[:-1]) for spec in self.spec.scale_layout.partition_spec(**split)]
        return replace(self, caches=caches, k_scale=scales[0], v_scale=scales[1])  # type: ignore  # a dataclass


def _of_scale(scale: jax.Array | None, heads: MeshAxes, layers: MeshAxes) -> P | None:
    """The spec of a static scale: of one element or one a head, maybe for each layer."""
    if scale is None:
        return None
    axes = layers, heads if scale.shape[-1:] > (1,) else None
    return P(*axes[2 - scale.ndim :])

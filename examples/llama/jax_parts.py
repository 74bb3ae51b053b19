"""Tensor parallelism: each device has some of the heads, some of the MLPs' columns and some of the vocabulary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv import PagedKVCache

from .gguf_model import InputError, LlamaConfig
from .paging import round_up

SPECS = {
    "qkv": P(None, "tp"),  # [hidden, num_kv_heads, ...]
    "attention_out": P("tp"),  # [num_heads * head_size, hidden]
    "gate_up": P(None, None, "tp"),  # [hidden, 2, mlp]
    "down": P("tp"),  # [mlp, hidden]
    "head": P("tp"),  # [vocabulary, hidden]
}
"""How matrices are split over the mesh axis `tp`; all else is on every device."""


class Devices:
    """The devices of a model, in a mesh of one axis, `tp`.

    Args:
        count: How many; 1 is JAX's default device, without a mesh.

    Raises:
        InputError: there are fewer.
    """

    def __init__(self, count: int):
        if count > jax.device_count():
            raise InputError(f"tp must be at most the number of devices, {jax.device_count()}, got {count}")
        self.count = count
        self.mesh = None
        if count > 1:
            self.mesh = jax.make_mesh((count,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])

    def config(self, config: LlamaConfig) -> LlamaConfig:
        """With as many KV heads, and query heads for them, as can be divided: those that are added are zeros."""
        num_kv_heads = round_up(config.num_kv_heads, self.count)
        return replace(
            config,
            num_kv_heads=num_kv_heads,
            num_heads=num_kv_heads * (config.num_heads // config.num_kv_heads),
        )

    def put(self, tree: Any, spec: P | None = None) -> Any:
        """Arrays as every device, or its part of the mesh, has them."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, spec or P()))

    def put_matrix(self, name: str, matrix: jax.Array) -> jax.Array:
        """One of the matrices in `SPECS`.

        Raises:
            InputError: the devices cannot divide it.
        """
        spec = SPECS[name]
        size = matrix.shape[spec.index("tp")]
        if size % self.count and name == "head":
            return self.put(matrix)
        if size % self.count:
            raise InputError(f"tp must divide the model's {size} columns of {name}, got {self.count}")
        return self.put(matrix, spec)

    def cache(self, make: Callable[[], PagedKVCache]) -> PagedKVCache:
        """A cache whose heads are split, made where they are to be."""
        if self.mesh is None:
            return make()
        specs = jax.eval_shape(make).partition_spec(heads="tp")
        mesh = self.mesh
        return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))()

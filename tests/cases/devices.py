"""Sequences over the caches of several devices, beside the same over one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
POISON = 3e4
BLOCK_SIZE, HEADS, SIZE = 4, 4, 32


def mesh_of(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def filled(num_blocks, block_size=BLOCK_SIZE, heads=HEADS, **options):
    """A cache whose every slot has something that shows in a result."""
    cache = jaxkv.PagedKVCache.create(
        num_blocks=num_blocks, block_size=block_size, num_heads=heads, head_size=SIZE, dtype="float32", **options
    )
    fill = 0x7B if cache.caches[0].dtype == jnp.uint8 else POISON
    return jax.tree.map(lambda x: jnp.full_like(x, POISON if x.dtype == jnp.float32 else fill), cache)


def place(tree, mesh, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def collectives(compiled):
    """Names of the collectives in a program, each as often as it is there."""
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())


def assert_in_place(compiled, cache_bytes):
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def steps_of(lens, new, block_size):
    """Tables that are shuffled, and the starts of each sequence's new tokens."""
    needed = [-(-n // block_size) for n in lens]
    order = np.random.default_rng(3).permutation(sum(needed)).tolist()
    tables = np.full((len(lens), max(needed) + 1), -1, np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [order.pop() for _ in range(count)]
    return tables, np.concatenate([[0], np.cumsum(new)]).astype(np.int32), sum(needed)


def whole_spec(tree):
    return jax.tree.map(lambda _: P(), tree)

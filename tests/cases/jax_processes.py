"""One process of several that share a mesh: `python -m tests.cases.jax_processes INDEX COUNT PORT`.

Each has two CPU devices, and checks what its own have against what one device does with everything. On the GPU they are
the devices of this host, one process having them all: `python -m tests.cases.jax_processes 0 1 0`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.devices import (
    BLOCK_SIZE,
    HEADS,
    SIZE,
    assert_in_place,
    collectives,
    filled,
    mesh_of,
    normal,
    steps_of,
)

LENS, NEW = np.array([37, 5, 1, 22], np.int32), [20, 5, 1, 2]
SPARE = 800


def spread(tree, mesh, specs):
    """Arrays that every process has, as ones of which each device has its part."""
    whole = jax.tree.map(np.asarray, tree)
    parts = jax.tree.map(
        lambda x, spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda at: x[at]),
        whole,
        specs,
    )
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(parts)  # NumPy's memory cannot be donated


def assert_parts(arrays, wanted, exact=True):
    """This process's parts of arrays against all of what is wanted."""
    for got, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(wanted), strict=True):
        assert got.shape == want.shape
        assert got.addressable_shards
        for shard in got.addressable_shards:
            part = np.asarray(want)[shard.index]
            if exact:
                np.testing.assert_array_equal(np.asarray(shard.data), part)
            else:
                near = 1e-5 if jax.default_backend() == "cpu" else 1e-3  # a GPU's products are rounded otherwise
                np.testing.assert_allclose(np.asarray(shard.data), part, rtol=near, atol=near)


def run(step, arguments, wanted, cache_bytes, merges=()):
    """Runs a step whose first argument and result is a cache, in place, with no collective but the merge's."""
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    assert collectives(compiled) == list(merges), collectives(compiled)
    assert_in_place(compiled, cache_bytes)
    pointers = [s.data.unsafe_buffer_pointer() for c in arguments[0].caches for s in c.addressable_shards]
    cache, out = compiled(*arguments)
    assert [s.data.unsafe_buffer_pointer() for c in cache.caches for s in c.addressable_shards] == pointers
    assert_parts(cache, wanted[0])
    assert_parts(out, wanted[1], exact=False)


def heads():
    """By automatic sharding."""
    devices = jax.device_count()
    mesh = mesh_of((devices,), ("tp",))
    tables, starts, blocks = steps_of(LENS, NEW, BLOCK_SIZE)
    cache = filled(blocks + SPARE, heads=devices)
    key, value = (normal(65, devices, SIZE, seed=n) for n in (0, 1))
    query = normal(28, 2 * devices, SIZE)
    slots = jaxkv.slot_mapping(tables, np.append(0, np.cumsum(LENS)), LENS, BLOCK_SIZE, 65)

    def step(cache, key, value, query):
        cache = cache.write(key, value, np.asarray(slots))
        return cache, cache.attend(query, tables, LENS, query_start_loc=starts)

    rows = P(None, "tp")
    arguments = spread((cache, key, value, query), mesh, (cache.partition_spec(heads="tp"), rows, rows, rows))
    run(step, arguments, step(cache, key, value, query), cache.nbytes // devices)


def blocks():
    """A data axis: a sequence for each device, in blocks of its own."""
    devices = jax.device_count()
    mesh = mesh_of((devices,), ("dp",))
    cache = filled(devices * SPARE)
    key, value, query = (normal(devices, HEADS, SIZE, seed=n) for n in range(3))
    tables = (np.arange(devices) * SPARE + 7)[:, None].astype(np.int32)
    lens = np.ones(devices, np.int32)

    def step(cache, key, value, query, tables):
        cache = cache.write(key, value, jaxkv.slot_mapping(tables, None, lens[: len(tables)], BLOCK_SIZE))
        return cache, cache.attend(query, tables, lens[: len(tables)])

    def local(cache, key, value, query, tables):
        return step(cache, key, value, query, jaxkv.local_indices(tables, SPARE, "dp"))

    split, specs = P("dp"), cache.partition_spec(blocks="dp")
    arguments = spread((cache, key, value, query, tables), mesh, (specs, split, split, split, split))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, *[split] * 4), out_specs=(specs, split))
    run(sharded, arguments, step(cache, key, value, query, tables), cache.nbytes // devices)


def context():
    """Positions dealt out in turn."""
    devices = jax.device_count()
    mesh, size = mesh_of((devices,), ("cp",)), devices * BLOCK_SIZE
    tables, starts, blocks = steps_of(LENS, NEW, size)
    whole, cache = filled(blocks + SPARE, size), filled(devices * (blocks + SPARE))
    key, value = (normal(65, HEADS, SIZE, seed=n) for n in (0, 1))
    query = normal(28, 2 * HEADS, SIZE)
    slots = np.asarray(jaxkv.slot_mapping(tables, np.append(0, np.cumsum(LENS)), LENS, size, 65))

    def local(cache, key, value, query):
        cache = cache.write(key, value, jaxkv.context_slots(slots, "cp"))
        return cache, jaxkv.context_attention(cache.attend, query, tables, LENS, "cp", query_start_loc=starts)

    specs = cache.partition_spec(blocks="cp")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P(), P()), out_specs=(specs, P()))
    want = whole.write(key, value, slots)
    out = want.attend(query, tables, LENS, query_start_loc=starts)

    def dealt(array):  # [blocks, slots, parts, …] as [parts, blocks, slots, …]
        array = np.asarray(array).reshape(-1, BLOCK_SIZE, devices, *array.shape[2:])
        return np.moveaxis(array, 2, 0).reshape(-1, BLOCK_SIZE, *array.shape[3:])

    arguments = spread((cache, key, value, query), mesh, (specs, P(), P(), P()))
    merges = ["all-gather"] if devices > 1 else []
    run(sharded, arguments, (jax.tree.map(dealt, want.caches), out), cache.nbytes // devices, merges)


def main(index, count, port):
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
        assert jax.process_count() == count
        assert jax.device_count() == 2 * count
        assert len(jax.local_devices()) == 2
    for check in (heads, blocks, context):
        check()
        multihost_utils.sync_global_devices(check.__name__)
        print(f"process {index}: {check.__name__} on {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

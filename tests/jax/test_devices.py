"""Blocks of a data axis, and fewer KV heads than devices: in place, without a collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
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
    place,
)

BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


# ---- blocks and sequences of a data axis


def test_indices_of_each_device():
    mesh = mesh_of((2, 4), ("a", "b"))

    def own(name, count):
        local = jax.shard_map(
            lambda x: jaxkv.local_indices(x, count, name)[None], mesh=mesh, in_specs=P(), out_specs=P(name)
        )
        return local(jnp.array([0, 5, 7, 15, 16, -1, -(2**31), 2**31 - 1])).tolist()

    none = [-1] * 4
    assert own("a", 8) == [[0, 5, 7, -1, *none], [-1, -1, -1, 7, *none]]
    assert own(("a", "b"), 2)[2:4] == [[-1, 1, -1, -1, *none], [-1, -1, 1, -1, *none]]


class Data:
    """Two sequences to each of four devices, whose heads XLA splits over two more."""

    def __init__(self, own_pools):
        self.mesh = mesh_of((4, 2), ("dp", "tp"))
        self.lens = np.array([9, 1, 3, 17, 5, 2, 30, 4], np.int32)
        self.blocks = 600  # of a device
        tables, pools = [], [jaxkv.BlockPool(self.blocks, BLOCK_SIZE) for _ in range(4)]
        for seq, length in enumerate(self.lens.tolist()):
            device = seq // 2
            table = np.array(pools[device].allocate(-(-length // BLOCK_SIZE)))
            tables.append(np.pad(table + (0 if own_pools else device * self.blocks), (0, 8 - len(table))))
        self.own_pools, self.tables = own_pools, np.array(tables, np.int32)
        self.key, self.value = normal(8, HEADS, SIZE), normal(8, HEADS, SIZE, seed=1)
        self.query = normal(8, 2 * HEADS, SIZE)

    def step(self, cache, key, value, query, tables, lens):
        """A token of each sequence, at its last position."""
        if not self.own_pools:
            tables = jaxkv.local_indices(tables, self.blocks, "dp")
        cache = cache.write(key, value, jaxkv.slot_mapping(tables, None, lens, BLOCK_SIZE))
        return cache, cache.attend(query, tables, lens)


@pytest.mark.parametrize("own_pools", [True, False], ids=["a pool each", "one pool"])
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8", "per_token_head": True}], ids=str)
def test_blocks_and_sequences_of_a_data_axis(own_pools, options):
    data = Data(own_pools)
    start = filled(4 * data.blocks, **options)
    start = start.write(  # what is before the last tokens
        normal(40, HEADS, SIZE, seed=5), normal(40, HEADS, SIZE, seed=6),
        np.concatenate([np.arange(10) + device * data.blocks * BLOCK_SIZE for device in range(4)]),
    )  # fmt: skip
    if "kv_cache_dtype" not in options:
        start = jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 100, 0.5, x), start)
    dp, specs = P("dp"), start.partition_spec(blocks="dp")
    step = jax.shard_map(
        data.step, mesh=data.mesh, in_specs=(specs, *(dp,) * 5), out_specs=(specs, dp), axis_names={"dp"}
    )  # fmt: skip
    rows = P("dp", "tp")
    arguments = (start, data.key, data.value, data.query, data.tables, data.lens)
    arguments = place(
        arguments, data.mesh, (start.partition_spec(blocks="dp", heads="tp"), rows, rows, rows, dp, dp)
    )  # fmt: skip
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    assert collectives(compiled) == []
    assert_in_place(compiled, start.nbytes // 8)

    tables = data.tables + (np.arange(8) // 2 * data.blocks)[:, None].astype(np.int32) * own_pools
    want = start.write(data.key, data.value, jaxkv.slot_mapping(tables, None, data.lens, BLOCK_SIZE))
    out = want.attend(data.query, tables, data.lens)
    cache, got = compiled(*arguments)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=2e-6)
    for mine, whole in zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, whole)
        assert mine.sharding.spec[0] == "dp"


def test_layers_of_a_pipeline_are_each_devices_own():
    mesh = mesh_of((4, 2), ("pp", "tp"))
    cache = filled(600, num_layers=8)
    specs = cache.partition_spec(layers="pp")
    keys = normal(8, 3, HEADS, SIZE)

    def local(cache, keys):
        for layer in range(2):
            cache = cache.write(keys[layer], -keys[layer], jnp.array([5, 9, 2]), layer=layer)
        return cache

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("pp")), out_specs=specs, axis_names={"pp"}
    )  # fmt: skip
    arguments = place((cache, keys), mesh, (cache.partition_spec(layers="pp", heads="tp"), P("pp", None, "tp")))
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    assert collectives(compiled) == []
    assert_in_place(compiled, cache.nbytes // 8)
    got = compiled(*arguments)
    for layer in range(8):
        np.testing.assert_array_equal(got.caches[1][layer].reshape(-1, HEADS, SIZE)[np.array([5, 9, 2])], -keys[layer])


# ---- fewer KV heads than devices


@BOTH
@pytest.mark.parametrize("layout", ["NHD", "HND", "PACKED_NHD", "INTERLEAVED"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_kv_heads_of_replicated_groups(kv_heads, layout, kind):
    """Heads are split over the axis kv; the devices of an axis beside it have the same KV heads, and others of Q."""
    mesh = mesh_of((kv_heads, 8 // kv_heads), ("kv", "rank"), kind)
    cache = filled(1200, heads=kv_heads, layout=layout)
    key, value = normal(5, kv_heads, SIZE), normal(5, kv_heads, SIZE, seed=1)
    query, slots = normal(2, 16, SIZE), np.array([3, 9, -1, 4, 5], np.int32)
    tables, lens = np.array([[0, 2], [1, 0]], np.int32), np.array([7, 6], np.int32)

    def step(cache, key, value, query):
        cache = cache.write(key, value, slots)
        return cache, cache.attend(query, tables, lens)

    cache_, out = step(cache, key, value, query)
    rows, split = P(None, "kv"), P(None, ("kv", "rank"))
    with jax.set_mesh(mesh):
        arguments = place((cache, key, value, query), mesh, (cache.partition_spec(heads="kv"), rows, rows, split))
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        assert collectives(compiled) == []
        assert_in_place(compiled, cache.nbytes // kv_heads)
        new, got = compiled(*arguments)
    assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, split), 3)
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=2e-6)
    for mine, whole in zip(new.caches, cache_.caches, strict=True):
        np.testing.assert_array_equal(mine, whole)

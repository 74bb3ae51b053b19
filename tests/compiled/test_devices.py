"""H100 programs for eight devices that share a cache, compiled without a GPU: in place, no collective but the merge."""

import math

import pytest

pytestmark = pytest.mark.compiled
pytest.importorskip("jax_cuda13_plugin")

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from tests.cases.devices import collectives
from tests.cases.h100s import h100s

TOKENS, SEQS, HEADS, SIZE, BLOCKS, BLOCK_SIZE = 64, 16, 8, 128, 32768, 16


def cache_of(**options):
    return jax.eval_shape(
        lambda: jaxkv.PagedKVCache.create(
            num_blocks=BLOCKS, block_size=BLOCK_SIZE, num_heads=HEADS, head_size=SIZE, **options
        )
    )


def typed(mesh, tree, specs):
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def assert_in_place(compiled, cache, devices, merges=()):
    memory, cache_bytes = compiled.memory_analysis(), cache.nbytes // devices
    assert "triton_kernel_call_ffi" in compiled.as_text()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes // 10
    assert collectives(compiled) == list(merges)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8", "per_token_head": True}], ids=str)
@pytest.mark.parametrize(("shape", "heads"), [((8, 1), None), ((4, 2), "tp")])
@pytest.mark.parametrize("chunks", [False, True], ids=["decode", "chunks"])
def test_context_parallel(chunks, shape, heads, options):
    mesh, cache = h100s(8, shape, ("cp", "tp")), cache_of(**options)

    def local(cache, key, value, slots, query, starts, tables, lens):
        cache = cache.write(key, value, jaxkv.context_slots(slots, "cp"))
        return cache, jaxkv.context_attention(
            cache.attend, query, tables, lens, "cp", query_start_loc=starts, heads=heads
        )

    specs = cache.partition_spec(blocks="cp")
    step = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, *(P(),) * 7), out_specs=(specs, P()), axis_names={"cp"}
    )  # fmt: skip
    rows = array(mesh, (TOKENS, HEADS, SIZE), "bfloat16", None, "tp")
    compiled = jax.jit(step, donate_argnums=0).lower(
        typed(mesh, cache, cache.partition_spec(blocks="cp", heads="tp")), rows, rows, array(mesh, (TOKENS,), "int32"),
        array(mesh, (TOKENS if chunks else SEQS, 4 * HEADS, SIZE), "bfloat16", None, "tp"),
        array(mesh, (SEQS + 1,), "int32") if chunks else None,
        array(mesh, (SEQS, 32), "int32"), array(mesh, (SEQS,), "int32"),
    ).compile()  # fmt: skip
    assert_in_place(compiled, cache, math.prod(shape), ["all-gather"])


def test_blocks_of_a_data_axis():
    mesh, cache = h100s(8, (4, 2), ("dp", "tp")), cache_of()

    def local(cache, key, value, query, tables, lens):
        tables = jaxkv.local_indices(tables, BLOCKS // 4, "dp")
        cache = cache.write(key, value, jaxkv.slot_mapping(tables, None, lens, BLOCK_SIZE))
        return cache, cache.attend(query, tables, lens)

    split, specs = P("dp"), cache.partition_spec(blocks="dp")
    step = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, *(split,) * 5), out_specs=(specs, split), axis_names={"dp"}
    )  # fmt: skip
    rows, queries = (array(mesh, (SEQS, n * HEADS, SIZE), "bfloat16", "dp", "tp") for n in (1, 4))
    compiled = jax.jit(step, donate_argnums=0).lower(
        typed(mesh, cache, cache.partition_spec(blocks="dp", heads="tp")), rows, rows, queries,
        array(mesh, (SEQS, 32), "int32", "dp"), array(mesh, (SEQS,), "int32", "dp"),
    ).compile()  # fmt: skip
    assert_in_place(compiled, cache, 8)


def test_kv_heads_of_replicated_groups():
    """Two devices have each KV head, and half of its query heads."""
    mesh = h100s(8, (4, 2), ("kv", "rank"))
    cache = jax.eval_shape(
        lambda: jaxkv.PagedKVCache.create(num_blocks=BLOCKS, block_size=BLOCK_SIZE, num_heads=4, head_size=SIZE)
    )

    def step(cache, key, value, slots, query, tables, lens):
        cache = cache.write(key, value, slots)
        return cache, cache.attend(query, tables, lens)

    rows = array(mesh, (SEQS, 4, SIZE), "bfloat16", None, "kv")
    compiled = jax.jit(step, donate_argnums=0).lower(
        typed(mesh, cache, cache.partition_spec(heads="kv")), rows, rows, array(mesh, (SEQS,), "int32"),
        array(mesh, (SEQS, 32, SIZE), "bfloat16", None, ("kv", "rank")),
        array(mesh, (SEQS, 32), "int32"), array(mesh, (SEQS,), "int32"),
    ).compile()  # fmt: skip
    assert_in_place(compiled, cache, 4)
    out = compiled.output_shardings[1]
    assert out.is_equivalent_to(NamedSharding(mesh, P(None, ("kv", "rank"))), 3)

"""Positions dealt out in turn to several devices: written in place, and attended with one collective."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    steps_of,
)

AXES = {2: (("dp", "cp"), (1, 2)), 4: (("cp", "rest"), (4, 2)), 8: (("cp",), (8,))}

SPARE = 1500  # blocks, so that a copy of the cache would be larger than all else


class Run:
    """Sequences written and attended on devices that share positions, and on one that has them all."""

    def __init__(self, parts, lens, new, layout="NHD", group=2, extra_rows=0, heads=HEADS, **options):
        self.parts, self.attention = parts, options
        names, shape = AXES[parts]
        self.mesh, self.lens = mesh_of(shape, names), np.array(lens, np.int32)
        self.tables, self.starts, blocks = steps_of(lens, new, BLOCK_SIZE * parts)
        total = int(np.sum(lens))
        self.key, self.value = normal(total, heads, SIZE), normal(total, heads, SIZE, seed=1)
        self.query = normal(int(self.starts[-1]) + extra_rows, group * heads, SIZE)
        self.cache = filled(parts * (blocks + SPARE), layout=layout, heads=heads)
        self.whole = filled(blocks + SPARE, BLOCK_SIZE * parts, layout=layout, heads=heads)
        self.size, self.blocks = BLOCK_SIZE * parts, blocks + SPARE
        everything = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        self.slots = jaxkv.slot_mapping(self.tables, everything, self.lens, self.size, total)

    def step(self, cache, key, value, slots, query, starts, tables, lens):
        cache = cache.write(key, value, jaxkv.context_slots(slots, "cp"))
        attended = jaxkv.context_attention(
            cache.attend, query, tables, lens, "cp", query_start_loc=starts, return_lse=True, **self.attention
        )
        return cache, attended

    def on_devices(self, decode=False, check_vma=True):
        specs = self.cache.partition_spec(blocks="cp")
        local = jax.shard_map(
            self.step, mesh=self.mesh, in_specs=(specs, *(P(),) * 7), out_specs=(specs, (P(), P())),
            axis_names={"cp"}, check_vma=check_vma,
        )  # fmt: skip
        starts = None if decode else self.starts
        cache = place(self.cache, self.mesh, specs)
        rest = self.key, self.value, self.slots, self.query, starts, self.tables, self.lens
        compiled = jax.jit(local, donate_argnums=0).lower(cache, *rest).compile()
        assert collectives(compiled) == ["all-gather"]
        assert_in_place(compiled, self.cache.nbytes // self.parts)
        pointers = [s.data.unsafe_buffer_pointer() for c in cache.caches for s in c.addressable_shards]
        cache, attended = compiled(cache, *rest)
        assert [s.data.unsafe_buffer_pointer() for c in cache.caches for s in c.addressable_shards] == pointers
        return cache, attended

    def on_one(self, decode=False):
        cache = self.whole.write(self.key, self.value, self.slots)
        return cache, cache.attend(
            self.query, self.tables, self.lens, query_start_loc=None if decode else self.starts, return_lse=True,
            **self.attention,
        )  # fmt: skip

    def assert_same(self, **how):
        (cache, got), (whole, want) = self.on_devices(**how), self.on_one(decode=how.get("decode", False))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=2e-6)
        assert np.isfinite(got[0]).all()
        for mine, all_of_it in zip(cache.caches, whole.caches, strict=True):
            # [parts, blocks, slots, …] as [blocks, slots, parts, …]: slot q of part r is place q * parts + r
            split = np.asarray(mine).reshape(self.parts, self.blocks, BLOCK_SIZE, *mine.shape[2:])
            np.testing.assert_array_equal(
                np.moveaxis(split, 0, 2).reshape(self.blocks, self.size, *mine.shape[2:]), all_of_it
            )


LENS = [37, 5, 1, 64, 9]


@pytest.mark.parametrize("parts", AXES)
def test_prefill_of_chunks(parts):
    Run(parts, LENS, [20, 5, 1, 13, 2]).assert_same()


@pytest.mark.parametrize("parts", AXES)
def test_decode(parts):
    Run(parts, LENS, [1] * 5).assert_same(decode=True)


def test_without_checks_of_what_varies():
    Run(4, LENS, [20, 5, 1, 13, 2]).assert_same(check_vma=False)


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [
    {"sliding_window": 8}, {"causal": False}, {"soft_cap": 2.0, "scale": 0.3}, {"sliding_window": 2**31 - 1},
    {"sinks": np.linspace(-2, 3, 8).astype(np.float32)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("decode", [False, True])
def test_options(options, decode):
    Run(4, LENS, [1] * 5 if decode else [7, 3, 1, 33, 2], **options).assert_same(decode=decode)


def test_padding_and_sequences_without_rows_or_tokens():
    """Rows of no sequence see nothing, as do rows at negative positions (left padding)."""
    run = Run(4, [37, 5, 0, 9, 3], [20, 0, 0, 9, 6], extra_rows=3, sinks=np.arange(8, dtype=np.float32))
    run.starts = np.append(run.starts, [0, 12]).astype(np.int32)  # descends: two empty sequences
    run.tables, run.lens = np.pad(run.tables, ((0, 2), (0, 0))), np.append(run.lens, [7, 7]).astype(np.int32)
    run.assert_same()


def test_rows_outside_query_count():
    run = Run(2, [37, 25], [10, 9])
    run.query = run.query[:15]
    run.assert_same()
    run.starts = run.starts - 4
    run.assert_same()


def test_one_sequence_shorter_than_the_devices():
    Run(8, [3, 7], [3, 2]).assert_same()


def test_heads_are_left_to_the_compiler():
    """Over the mesh's other axis; the one collective stays the only one."""
    run = Run(4, LENS, [20, 5, 1, 13, 2])
    want = run.on_one()[1][0]
    run.attention = {"heads": "rest"}
    specs = run.cache.partition_spec(blocks="cp")
    inner = jax.shard_map(
        run.step, mesh=run.mesh, in_specs=(specs, *(P(),) * 7), out_specs=(specs, (P(), P())), axis_names={"cp"}
    )  # fmt: skip
    rows = P(None, "rest", None)
    arguments = place(
        (run.cache, run.key, run.value, run.slots, run.query, run.starts, run.tables, run.lens), run.mesh,
        (run.cache.partition_spec(blocks="cp", heads="rest"), rows, rows, P(), rows, P(), P(), P()),
    )  # fmt: skip
    compiled = jax.jit(inner, donate_argnums=0).lower(*arguments).compile()
    assert collectives(compiled) == ["all-gather"]
    assert_in_place(compiled, run.cache.nbytes // 8)
    cache, (out, _) = compiled(*arguments)
    assert out.sharding.is_equivalent_to(jax.NamedSharding(run.mesh, rows), 3)
    assert cache.caches[0].sharding.spec[2] == "rest"
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_partial_results_arrive_bit_by_bit(dtype):
    from jaxkv.devices import _gathered

    mesh = mesh_of((8,), ("cp",))
    bits = np.random.default_rng(0).integers(0, 2**16, (8, 3, 2, 5), dtype=np.uint16)
    lses = np.random.default_rng(1).integers(0, 2**32, (8, 3, 2), dtype=np.uint32)
    outs = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)

    def local(out, lse):
        out, lse = _gathered(out[0], jax.lax.bitcast_convert_type(lse[0], jnp.float32), "cp")
        return jax.lax.bitcast_convert_type(out, jnp.uint16), jax.lax.bitcast_convert_type(lse, jnp.uint32)

    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("cp"), out_specs=P()))(outs, lses)
    np.testing.assert_array_equal(got[0], bits)
    np.testing.assert_array_equal(got[1], lses)


def test_lengths_and_gathers_of_each_device():
    run = Run(4, LENS, [1] * 5)
    specs = run.cache.partition_spec(blocks="cp")

    def local(cache, key, value, slots):
        cache = cache.write(key, value, jaxkv.context_slots(slots, "cp"))
        lens = jaxkv.context_lens(run.lens, "cp")
        return lens[None], cache.gather(run.tables, lens, 16)[0][None]

    lens, keys = jax.jit(
        jax.shard_map(
            local, mesh=run.mesh, in_specs=(specs, P(), P(), P()), out_specs=(P("cp"), P("cp")), axis_names={"cp"}
        )
    )(place(run.cache, run.mesh, specs), run.key, run.value, run.slots)
    np.testing.assert_array_equal(lens, [[len(range(r, n, 4)) for n in LENS] for r in range(4)])
    ends = np.cumsum(LENS)
    for seq, (n, end) in enumerate(zip(LENS, ends, strict=True)):
        for rank in range(4):
            mine = run.key[end - n : end][rank::4]
            np.testing.assert_array_equal(keys[rank, seq, : len(mine)], mine)
            assert not np.asarray(keys[rank, seq, len(mine) :]).any()


@pytest.mark.parametrize(("window", "error", "text"), [
    (6, ValueError, "sliding_window must be a multiple of the 4 devices that share positions, got 6"),
    (0, ValueError, "sliding_window must be at least 1, got 0"),
    (True, TypeError, "sliding_window must be an int, got True"),
])  # fmt: skip
def test_windows_that_devices_cannot_share(window, error, text):
    with pytest.raises(error) as caught:
        Run(4, LENS, [1] * 5, sliding_window=window).on_devices()
    assert str(caught.value) == text


def test_a_scan_over_layers():
    mesh, (tables, _, blocks) = mesh_of((8,), ("cp",)), steps_of([40, 3], [1, 1], BLOCK_SIZE * 8)
    lens = np.array([40, 3], np.int32)
    cache = filled(8 * (blocks + SPARE), num_layers=3)
    specs = cache.partition_spec(blocks="cp")
    keys = normal(3, 43, HEADS, SIZE)
    slots = jaxkv.slot_mapping(tables, np.array([0, 40, 43]), lens, BLOCK_SIZE * 8, 43)
    query = normal(2, HEADS, SIZE)

    def local(cache, keys, slots, query):
        mine = jaxkv.context_slots(slots, "cp")

        def layer(cache, at):
            index, key = at
            cache = cache.write(key, -key, mine, layer=index)
            return cache, jaxkv.context_attention(cache.attend, query, tables, lens, "cp", layer=index)

        return jax.lax.scan(layer, cache, (jnp.arange(3), keys))

    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P(), P()), out_specs=(specs, P())), donate_argnums=0
    )  # fmt: skip
    compiled = run.lower(place(cache, mesh, specs), keys, slots, query).compile()
    assert collectives(compiled) == ["all-gather"]
    assert_in_place(compiled, cache.nbytes // 8)
    _, outs = run(place(cache, mesh, specs), keys, slots, query)
    for layer in range(3):
        whole = filled(blocks, BLOCK_SIZE * 8).write(keys[layer], -keys[layer], slots)
        np.testing.assert_allclose(outs[layer], whole.attend(query, tables, lens), rtol=1e-5, atol=2e-6)


def test_one_device_is_as_none():
    mesh = mesh_of((1,), ("cp",))
    whole = filled(4).write(normal(5, HEADS, SIZE), normal(5, HEADS, SIZE), jnp.arange(5))
    query, tables, lens = normal(2, HEADS, SIZE), np.array([[0, 1]]), np.array([5])
    starts = np.array([0, 2])
    call = partial(jaxkv.context_attention, whole.attend, axis_name="cp", query_start_loc=starts)
    got = jax.shard_map(lambda q: call(q, tables, lens), mesh=mesh, in_specs=P(), out_specs=P())(query)
    np.testing.assert_allclose(got, whole.attend(query, tables, lens, query_start_loc=starts), rtol=1e-6)

"""Views of heads over eight devices: of groups each device has its own; heads that follow each other are an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from kvcore.layout import CacheLayout
from tests.cases.arrays import bits, random_bits, random_normal

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute"
BOTH = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
HEADS, GROUP, SIZE, TOKENS = 8, 2, 16, 5
SLOTS, TABLES, LENS = np.array([3, 9, -1, 17, 0], np.int32), np.zeros((5, 2), np.int32), np.array([3, 1, 4, 1, 5])
TABLES[:, 1] = 2
QUERIES, KEYS, VALUES = (0, GROUP), (GROUP, GROUP + 1), (GROUP + 1, GROUP + 2)


def mesh_of(kind, shape=(8,), names=("tp",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def normal(*shape):
    return random_normal(np.random.default_rng(sum(shape)), shape, "float32")


PROJECTION = normal(TOKENS, HEADS, GROUP + 2, SIZE)


def caches_of(layout, heads=HEADS, num_blocks=4):
    layout = CacheLayout.of(layout)
    shapes = layout.shapes(num_blocks=num_blocks, block_size=8, num_heads=heads, head_size=SIZE, num_layers=None)
    return [normal(*shape) for shape in shapes]


def put(arrays, mesh, *specs):
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]


def head_spec(axes):
    return P(*("tp" if "head" in axis else None for axis in axes))


def step(layout, view=jaxkv.heads, attend=jaxkv.paged_attention):
    """Writes a projection's keys and values, and attends with its queries."""
    layout = CacheLayout.of(layout)

    def write_and_attend(projection, *caches):
        q, k, v = (view(projection, *part) for part in (QUERIES, KEYS, VALUES))
        op = jaxkv.reshape_and_cache_flash_diffkv if layout.single_array else jaxkv.reshape_and_cache_flash
        new = op(k, v, *caches, SLOTS, layout=layout)
        return new, attend(q, new, TABLES, LENS, layout=layout)

    return write_and_attend


def sliced(array, start, stop):
    return array[:, :, start:stop].reshape(array.shape[0], -1, array.shape[-1])


def assert_same(got, want):
    """The bits of caches; sums of attention may be rounded otherwise where a device has fewer heads."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if g.ndim == 3 and g.shape[0] == TOKENS:
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)))


def refuses(name, shape, devices=8):
    text = (
        f"{name} must be a view of [num_tokens, num_kv_heads, q_per_kv + 2, head_size], start and stop on its third "
        f"axis, where heads are split over devices, got a view of {shape} and {devices} devices; jax.shard_map can "
        "give each device an array of its own heads"
    )
    return pytest.raises(ValueError, match=f"^{re.escape(text)}")


# ---- groups


@BOTH
@pytest.mark.parametrize("layout", ["NHD", "HND", "INTERLEAVED", "KV_NHD", "PACKED_NHD", "PALLAS"])
def test_each_device_has_its_own_groups(layout, kind):
    mesh, caches = mesh_of(kind), caches_of(layout, num_blocks=64)
    specs = [head_spec(axes) for axes in CacheLayout.of(layout).arrays]
    inputs = put([PROJECTION, *caches], mesh, P(None, "tp"), *specs)
    call = jax.jit(step(layout), donate_argnums=tuple(range(1, len(inputs))))
    with jax.set_mesh(mesh):
        compiled = call.lower(*inputs).compile()
        new, out = call(*inputs)
    assert not re.findall(COLLECTIVES, compiled.as_text())
    size = sum(c.nbytes for c in caches) // 8
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2
    for cache, spec in zip(jax.tree.leaves(new), specs, strict=True):
        assert cache.sharding.is_equivalent_to(NamedSharding(mesh, spec), cache.ndim)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp")), 3)
    assert_same((new, out), step(layout, sliced)(PROJECTION, *caches))


@BOTH
def test_eager_calls(kind):
    mesh, caches = mesh_of(kind), caches_of("NHD")
    inputs = put([PROJECTION, *caches], mesh, P(None, "tp"), *[P(None, None, "tp")] * 2)
    assert_same(step("NHD")(*inputs), step("NHD", sliced)(PROJECTION, *caches))


@BOTH
@pytest.mark.parametrize("taken", [1, 2])
def test_groups_of_more_than_one_kv_head(taken, kind):
    """Of 16 groups or of 8, each with as many query heads."""
    mesh, caches, groups = mesh_of(kind), caches_of("NHD", 16), 16 // taken
    projection = normal(TOKENS, groups, 3 * taken, SIZE)
    inputs = put([projection, *caches], mesh, P(None, "tp"), *[P(None, None, "tp")] * 2)

    def call(view):
        def write(projection, *caches):
            q, k, v = (view(projection, n * taken, (n + 1) * taken) for n in range(3))
            new = jaxkv.reshape_and_cache_flash(k, v, *caches, SLOTS)
            return new, jaxkv.paged_attention(q, new, TABLES, LENS)

        return write

    assert not re.findall(COLLECTIVES, jax.jit(call(jaxkv.heads)).lower(*inputs).compile().as_text())
    assert_same(jax.jit(call(jaxkv.heads))(*inputs), call(sliced)(projection, *caches))


@pytest.mark.parametrize("groups", [8, 16])
def test_shardings_spread_from_a_projection_to_caches_and_results(groups):
    """The rule of the partitioning: caches that are made inside have no sharding of their own."""
    mesh = mesh_of(AxisType.Auto)
    projection = normal(TOKENS, groups, GROUP + 2, SIZE)
    (array,) = put([projection], mesh, P(None, "tp"))
    caches = caches_of("NHD", groups)

    def call(projection, bias):
        return step("NHD")(projection, *(bias + cache for cache in caches))

    new, out = jax.jit(call)(array, 0.0)
    for result, spec in ((new[0], P(None, None, "tp")), (new[1], P(None, None, "tp")), (out, P(None, "tp"))):
        assert result.sharding.is_equivalent_to(NamedSharding(mesh, spec), result.ndim)
    assert_same((new, out), step("NHD", sliced)(projection, *caches))


@BOTH
@pytest.mark.parametrize("taken", [1, 2])
def test_one_kv_head_for_query_heads_on_many_devices(taken, kind):
    mesh, caches = mesh_of(kind), caches_of("NHD", 1)
    projection = normal(TOKENS, 8, taken + 1, SIZE)

    def attend(projection, *caches):
        return jaxkv.paged_attention(jaxkv.heads(projection, 1, taken + 1), caches, TABLES, LENS)

    inputs = put([projection, *caches], mesh, P(None, "tp"), P(), P())
    assert not re.findall(COLLECTIVES, jax.jit(attend).lower(*inputs).compile().as_text())
    out = jax.jit(attend)(*inputs)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp")), 3)
    assert_same(out, jaxkv.paged_attention(sliced(projection, 1, taken + 1), caches, TABLES, LENS))


@BOTH
def test_groups_that_cannot_be_split_as_the_caches_are(kind):
    mesh = mesh_of(kind)
    array, *caches = put(
        [normal(TOKENS, 4, 6, SIZE), *caches_of("NHD")], mesh, P(), *[P(None, None, "tp")] * 2
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^key must be a view of \[num_tokens, num_kv_heads, …, head_size\]") as error:
        jax.jit(lambda a, *c: jaxkv.reshape_and_cache_flash(jaxkv.heads(a, 0, 2), jaxkv.heads(a, 2, 4), *c, SLOTS))(
            array, *caches
        )
    assert str(error.value) == (
        "key must be a view of [num_tokens, num_kv_heads, …, head_size] with num_kv_heads a multiple of 8, the devices "
        "over which heads are split, got a view of (5, 4, 6, 16)"
    )


# ---- heads that follow each other


@BOTH
@pytest.mark.parametrize("way", ["eager", "jit", "inside"])
@pytest.mark.parametrize("split", ["both", "caches", "array"])
@pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
def test_heads_that_follow_each_other_are_an_error_once_split(flat, split, way, kind):
    mesh = mesh_of(kind)
    array = normal(TOKENS, 24, SIZE)
    array = array.reshape(TOKENS, -1) if flat else array
    inputs = put(
        [array, *caches_of("NHD")],
        mesh,
        P(None, "tp") if split != "caches" else P(),
        *[P(None, None, "tp") if split != "array" else P()] * 2,
    )
    size = SIZE if flat else None

    def write(array, *caches):
        key, value = (jaxkv.heads(array, n, n + HEADS, head_size=size) for n in (0, HEADS))
        return jaxkv.reshape_and_cache_flash(key, value, *caches, SLOTS)

    def attend(array, *caches):
        return jaxkv.paged_attention(jaxkv.heads(array, 0, 16, head_size=size), caches, TABLES, LENS)

    for call, name in ((write, "key"), (attend, "query")):
        if way != "eager":
            call = jax.jit(call if way == "jit" else lambda *x, call=call: call(*(a * 1 for a in x)))
        with jax.set_mesh(mesh), refuses(name, array.shape):
            call(*inputs)


@BOTH
def test_heads_that_are_not_split(kind):
    """Over a mesh axis of one device, or none; and tokens split over others are no one's business."""
    mesh = mesh_of(kind, (8, 1), ("dp", "tp"))
    array, caches = normal(8, 24, SIZE), caches_of("NHD")
    slots = np.arange(8, dtype=np.int32)

    def write(view):
        return lambda array, *caches: jaxkv.reshape_and_cache_flash(
            view(array, 0, 8), view(array, 8, 16), *caches, slots
        )

    want = write(lambda array, start, stop: array[:, start:stop])(array, *caches)
    for spec in (P(), P("dp"), P("dp", "tp")):
        for cache_spec in (P(), P(None, None, "tp")):
            inputs = put([array, *caches], mesh, spec, cache_spec, cache_spec)
            assert_same(jax.jit(write(jaxkv.heads))(*inputs), want)


@BOTH
def test_columns_of_mla_on_a_mesh(kind):
    mesh = mesh_of(kind)
    rows, cache = normal(TOKENS, 32), random_bits(np.random.default_rng(0), (4, 8, 32), "float32")
    want = jaxkv.concat_and_cache_mla(rows[:, :24], rows[:, 24:], cache, SLOTS)
    for spec in (P(), P(None, "tp")):
        inputs = put([rows, cache], mesh, spec, P())
        write = jax.jit(
            lambda r, c: jaxkv.concat_and_cache_mla(jaxkv.heads(r, 0, 24), jaxkv.heads(r, 24, 32), c, SLOTS)
        )
        assert_same(write(*inputs), want)


# ---- shard_map


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_views_of_the_devices_own_heads(made, check_vma):
    """Heads of the part that a device has: 2 of Q, 1 of K and 1 of V, side by side in each part of a 3-D array."""
    mesh, caches = mesh_of(AxisType.Auto), caches_of("NHD")
    array = PROJECTION.reshape(TOKENS, -1, SIZE)
    heads = P(None, None, "tp")

    def local(projection, *caches):
        if made == "inside":
            projection = [jaxkv.heads(projection, *part) for part in (QUERIES, KEYS, VALUES)]
        q, k, v = projection
        new = jaxkv.reshape_and_cache_flash(k, v, *caches, SLOTS)
        return new, jaxkv.paged_attention(q, new, TABLES, LENS)

    call = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P(None, "tp"), heads, heads), out_specs=((heads, heads), P(None, "tp")),
            check_vma=check_vma,
        ),
        donate_argnums=(1, 2),
    )  # fmt: skip
    if made == "outside":  # start and stop count the heads of the array that the device is to have
        array = [jaxkv.heads(array, *part) for part in (QUERIES, KEYS, VALUES)]
    inputs = (array, *put(caches, mesh, heads, heads))
    assert not re.findall(COLLECTIVES, call.lower(*inputs).compile().as_text())
    assert_same(call(*inputs), step("NHD", sliced)(PROJECTION, *caches))


def test_a_view_of_more_heads_than_a_device_has():
    mesh, heads = mesh_of(AxisType.Auto), P(None, None, "tp")
    view, caches = jaxkv.heads(jnp.asarray(normal(TOKENS, 24, SIZE)), 8, 16), caches_of("NHD")
    call = jax.shard_map(
        lambda view, *c: jaxkv.reshape_and_cache_flash(view, view, *c, SLOTS),
        mesh=mesh, in_specs=(P(None, "tp"), heads, heads), out_specs=heads,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^start and stop must be at least 0, in order, and at most 3, the heads of"):
        call(view, *caches)


@pytest.mark.parametrize("order", ["groups", "heads, split", "heads", "middle"])
def test_heads_left_to_the_compiler_inside_a_shard_map_over_blocks(order):
    """Blocks are split by hand over one mesh axis, heads by XLA over the other."""
    mesh = mesh_of(AxisType.Auto, (2, 4), ("dp", "tp"))
    caches = put(caches_of("NHD"), mesh, *[P("dp", None, "tp")] * 2)
    spec = {"groups": P(None, "tp"), "heads, split": P(None, "tp"), "heads": P(), "middle": P(None, None, "tp")}[order]
    whole = PROJECTION if order in ("groups", "middle") else PROJECTION.reshape(TOKENS, -1, SIZE)
    parts = (KEYS, VALUES) if whole.ndim == 4 else ((0, HEADS), (HEADS, 2 * HEADS))

    def call(view):
        def local(array, *caches):
            slots = SLOTS - jax.lax.axis_index("dp") * 16  # two blocks of eight slots a device
            key, value = (view(array, *part) for part in parts)
            return jaxkv.reshape_and_cache_flash(key, value, *caches, jnp.where(slots < 16, slots, -1))

        return jax.jit(
            jax.shard_map(local, mesh=mesh, axis_names={"dp"}, in_specs=(P(), P("dp"), P("dp")), out_specs=P("dp"))
        )

    (array,) = put([whole], mesh, spec)
    if order == "groups":
        assert not re.findall(
            r"all-gather|all-reduce|all-to-all", call(jaxkv.heads).lower(array, *caches).compile().as_text()
        )
        assert_same(call(jaxkv.heads)(array, *caches), call(sliced)(array, *caches))
        return
    with refuses("key", whole.shape, 4):
        call(jaxkv.heads)(array, *caches)

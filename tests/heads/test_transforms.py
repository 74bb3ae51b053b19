"""Views under JAX's transformations: the bits of slices, and caches updated where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from tests.cases.arrays import bits, make_case, random_normal, run_oracle, with_case
from tests.cases.heads import hide
from tests.cases.reads import attend_jax, make_read

KINDS = ["heads", "flat", "one of a group", "two of a group"]
WRITE = jaxkv.reshape_and_cache_flash


def draw(*shape):
    return jnp.asarray(random_normal(np.random.default_rng(sum(shape)), shape, "bfloat16"))


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)))


def hidden(rows, kind):
    """The array that hides rows, and what makes the view of it."""
    array, start, stop, size = hide(rows, kind)
    return jnp.asarray(array), lambda array: jaxkv.heads(array, start, stop, head_size=size)


def assert_in_place(compiled, caches):
    """The whole cache is aliased, and no temporary has half its size."""
    size = sum(c.size * c.dtype.itemsize for c in caches)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


@pytest.mark.parametrize("kind", KINDS)
def test_jit_with_donation_updates_the_same_buffers(kind):
    case = make_case(np.random.default_rng(0), num_blocks=64, num_heads=4)
    (key, key_view), (value, value_view) = hidden(case.key, kind), hidden(case.value, kind)
    step = jax.jit(lambda k, v, *x: WRITE(key_view(k), value_view(v), *x), donate_argnums=(2, 3))
    inputs = (key, value, *map(jnp.asarray, case.caches), jnp.asarray(case.slot_mapping, jnp.int32))
    assert_in_place(step.lower(*inputs).compile(), inputs[2:4])
    before = [c.unsafe_buffer_pointer() for c in inputs[2:4]]
    new = step(*inputs)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert_same(new, run_oracle(case))


def test_refs_are_updated_in_place():
    case = make_case(np.random.default_rng(1), num_heads=4)
    (key, key_view), (value, value_view) = hidden(case.key, "flat"), hidden(case.value, "two of a group")
    refs = [jax.new_ref(jnp.asarray(c)) for c in case.caches]
    before = [ref.unsafe_buffer_pointer() for ref in refs]
    assert WRITE(key_view(key), value_view(value), *refs, jnp.asarray(case.slot_mapping, jnp.int32)) is None
    assert [ref.unsafe_buffer_pointer() for ref in refs] == before
    assert_same([ref[...] for ref in refs], run_oracle(case))


@pytest.mark.parametrize("carried", [False, True], ids=["made inside", "carried"])
def test_scan_over_layers(carried):
    case = make_case(np.random.default_rng(2), num_blocks=64, num_heads=4, num_layers=3, layer=0)
    (key, key_view), (value, value_view) = hidden(case.key, "one of a group"), hidden(case.value, "heads")

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(key, value, caches, slots):
        def one_layer(state, layer):
            views, caches = state
            k, v = views if carried else (key_view(key), value_view(value))
            return (views, WRITE(k, v, *caches, slots, layout=case.layout, layer=layer)), None

        views = (key_view(key), value_view(value)) if carried else ()
        return lax.scan(one_layer, (views, caches), jnp.arange(3))[0]

    caches, slots = tuple(map(jnp.asarray, case.caches)), jnp.asarray(case.slot_mapping, jnp.int32)
    assert_in_place(decode.lower(key, value, caches, slots).compile(), caches)
    _, new = decode(key, value, caches, slots)
    for layer in range(3):
        case = with_case(case, caches=run_oracle(with_case(case, layer=layer)))
    assert_same(new, case.caches)


def test_scan_over_views():
    """A view whose array has an axis more, which scan takes away."""
    projections, caches, slots = draw(3, 5, 2, 4, 16), tuple(draw(2, 6, 8, 2, 16)), jnp.array([0, 7, -1, 9, 40])
    keys, values = (jax.vmap(lambda p, n=n: jaxkv.heads(p, n, n + 1))(projections) for n in (1, 3))

    def step(caches, views):
        return WRITE(*views, *caches, slots), None

    new, _ = lax.scan(step, caches, (keys, values))
    assert_same(new, WRITE(projections[2, :, :, 1], projections[2, :, :, 3], *caches, slots))


# ---- vmap


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "primitives"), [("NHD", 1), ("PALLAS", 3)], ids=["folded", "a loop"])
def test_vmap_of_writes(layout, primitives, kind, backend):
    """The batch is folded into the blocks of one write, or looped over; views stay what they are in both."""
    cases = [
        make_case(np.random.default_rng(i), layout=layout, num_heads=4, head_size=16, slots=[3, -1, 60, 39, 40])
        for i in range(3)
    ]
    sides = [[hidden(getattr(case, name), kind) for case in cases] for name in ("key", "value")]
    key, value = (jnp.stack([array for array, _ in side]) for side in sides)
    view = sides[0][0][1]
    caches = [jnp.stack(x) for x in zip(*(map(jnp.asarray, case.caches) for case in cases), strict=True)]
    slots = jnp.asarray(cases[0].slot_mapping, jnp.int32)

    def write(key, value, *caches):
        return WRITE(view(key), view(value), *caches, slots, layout=layout, backend=backend)

    assert_same(jax.vmap(write)(key, value, *caches), map(np.stack, zip(*map(run_oracle, cases), strict=True)))
    text = str(jax.make_jaxpr(jax.vmap(write))(key, value, *caches))
    assert (" while[" in text or " scan[" in text) == (primitives > 1)


def test_vmap_with_an_axis_layer_in_the_middle():
    """Neither folded nor an axis of layers."""
    pattern = "block layer slot head dim"
    cases = [
        make_case(np.random.default_rng(i), layout=pattern, num_layers=2, layer=i % 2, num_heads=4) for i in range(3)
    ]
    sides = [[hidden(getattr(case, name), "flat") for case in cases] for name in ("key", "value")]
    key, value = (jnp.stack([array for array, _ in side]) for side in sides)
    view = sides[0][0][1]
    caches = [jnp.stack(x) for x in zip(*(map(jnp.asarray, case.caches) for case in cases), strict=True)]
    slots = jnp.stack([jnp.asarray(case.slot_mapping, jnp.int32) for case in cases])

    def write(key, value, slots, layer, *caches):
        return WRITE(view(key), view(value), *caches, slots, layout=pattern, layer=layer)

    got = jax.vmap(write)(key, value, slots, jnp.array([0, 1, 0]), *caches)
    assert_same(got, map(np.stack, zip(*map(run_oracle, cases), strict=True)))


def test_vmap_over_views_and_other_axes():
    """A view as the mapped argument, with the batch on another axis of its array; and one that is not batched."""
    projection, caches = draw(5, 3, 4, 16), draw(2, 3, 6, 8, 2, 16)
    slots = jnp.array([0, 7, -1, 9, 40])
    view = jax.vmap(lambda p: jaxkv.heads(p, 1, 3), in_axes=1, out_axes=1)(projection)
    value = jaxkv.heads(draw(5, 3, 16), 0, 2)
    got = jax.vmap(lambda view, *c: WRITE(view, value, *c, slots), in_axes=(1, 0, 0))(view, *caches)
    for i in range(3):
        want = WRITE(projection[:, i, 1:3], value.array[:, :2], *caches[:, i], slots)
        assert_same([c[i] for c in got], want)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("kind", ["heads", "two of a group"])
def test_vmap_of_attention(kind, backend):
    case = make_read(np.random.default_rng(3), seq_lens=(1, 6), query_lens=(1, 4))
    queries = [case.query, -case.query]
    arrays, views = zip(*(hidden(query, kind) for query in queries), strict=True)

    def attend(query):
        return case.call(jaxkv, lambda a: views[0](query) if a is case.query else jnp.asarray(a), backend=backend)

    got = jax.vmap(attend)(jnp.stack(arrays))
    for g, query in zip(got, queries, strict=True):
        case.query = query
        np.testing.assert_allclose(g, attend_jax(case, backend)[0], rtol=2e-6, atol=1e-7)


def test_vmap_of_mla():
    rows, cache, slots = draw(2, 5, 32), draw(2, 3, 4, 32), jnp.array([3, 11, -1, 0, 12])

    def write(view):
        def one(row, cache):
            parts = [jaxkv.heads(row, 0, 24), jaxkv.heads(row, 24, 32)] if view else [row[:, :24], row[:, 24:]]
            return jaxkv.concat_and_cache_mla(*parts, cache, slots)

        return jax.vmap(one)(rows, cache)

    assert_same([write(True)], [write(False)])


def test_differentiation_raises_and_names_the_way_out():
    array, caches, slots = draw(3, 4, 16), draw(2, 3, 4, 2, 16), jnp.arange(3)

    def loss(array):
        return WRITE(jaxkv.heads(array, 0, 2), jaxkv.heads(array, 2, 4), *caches, slots)[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="is not differentiable"):
        jax.grad(loss)(array)
    stopped = jax.grad(lambda array: loss(lax.stop_gradient(array)) + array.astype(jnp.float32).sum())(array)
    np.testing.assert_array_equal(stopped, jnp.ones_like(array))

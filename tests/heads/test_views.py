"""What a view is: shapes, static parts, what JAX does with it as a pytree, and which ones there are not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv._call import spec_of
from kvcore.arrays import ArraySpec, HeadGroups
from tests.cases.arrays import random_normal
from tests.cases.heads import KINDS, hide, view_of

ROWS = random_normal(np.random.default_rng(0), (3, 4, 16), "float32")
THREE, FLAT, COLUMNS, FOUR = jnp.ones((3, 48, 16)), jnp.ones((3, 96)), jnp.ones((3, 576)), jnp.ones((3, 8, 6, 16))


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_what_it_hides(kind):
    view = view_of(ROWS, kind)
    assert (view.shape, view.dtype, view.ndim) == ((3, 4, 16), np.float32, 3)
    for array in (jnp.asarray(view), np.asarray(view)):
        np.testing.assert_array_equal(array, ROWS)
    assert isinstance(jnp.asarray(view), jax.Array)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_says_where_each_head_lies(kind):
    view = view_of(ROWS, kind)
    spec, memory = spec_of(view), np.asarray(view.array).reshape(-1)
    (token_stride, head_stride, dim_stride), groups = spec.steps, spec.groups or HeadGroups(99, 0)
    for token, head, dim in np.ndindex(*ROWS.shape):
        at = spec.offset + token * token_stride + head // groups.size * groups.stride
        at += head % groups.size * head_stride + dim * dim_stride
        assert memory[at] == ROWS[token, head, dim]


@pytest.mark.parametrize(("array", "part", "spec"), [
    (THREE, (40, 44), ((3, 4, 16), (768, 16, 1), 640, None)),
    (COLUMNS, (512, 576), ((3, 64), (576, 1), 512, None)),
    (FOUR, (0, 4), ((3, 32, 16), (768, 16, 1), 0, HeadGroups(4, 96))),
    (FOUR, (4, 5), ((3, 8, 16), (768, 96, 1), 64, None)),  # one head of each group: strides say it
    (FOUR, (0, 6), ((3, 48, 16), (768, 16, 1), 0, None)),
    (FOUR[:, :1], (2, 5), ((3, 3, 16), (96, 16, 1), 32, None)),
    (FOUR, (6, 6), ((3, 0, 16), (768, 16, 1), 96, HeadGroups(0, 96))),
])  # fmt: skip
def test_groups_are_said_only_where_strides_do_not_say_it(array, part, spec):
    shape, strides, offset, groups = spec
    assert spec_of(jaxkv.heads(array, *part)) == ArraySpec(shape, "float32", strides, None, offset, groups)


def test_the_usual_slices():
    array = jnp.arange(3 * 8 * 6 * 16).reshape(3, 8, 6, 16)
    np.testing.assert_array_equal(jaxkv.heads(array, 0, 4), array[:, :, :4].reshape(3, 32, 16))
    np.testing.assert_array_equal(jaxkv.heads(array[:, 0], 2, 5), array[:, 0, 2:5])
    flat = array.reshape(3, -1)
    np.testing.assert_array_equal(jaxkv.heads(flat, 2, 5, head_size=48), flat[:, 96:240].reshape(3, 3, 48))
    np.testing.assert_array_equal(jaxkv.heads(flat, 2, 5), flat[:, 2:5])


# ---- pytrees


def test_static_parts_hash_and_compare():
    one, other = (jax.tree.structure(jaxkv.heads(x, 1, np.int64(3))) for x in (THREE, THREE[:1]))
    assert one == other
    assert hash(one) == hash(other)
    different = [
        jaxkv.heads(THREE, 1, 2), jaxkv.heads(THREE, 0, 3), jaxkv.heads(FOUR, 1, 3), jaxkv.heads(FLAT, 1, 3),
        jaxkv.heads(FLAT, 1, 3, head_size=16), jaxkv.heads(FLAT, 1, 3, head_size=32),
    ]  # fmt: skip
    trees = {one, *map(jax.tree.structure, different)}
    assert len(trees) == 1 + len(different)


def test_the_array_is_the_only_leaf():
    view = jaxkv.heads(FOUR, 1, 3)
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(view)
    assert leaf is FOUR
    assert jax.tree_util.keystr(path) == ".array"


@pytest.mark.parametrize("leaf", [object(), None, 3, "text", jax.ShapeDtypeStruct((2,), "int8"), np.ones(2)])
def test_nothing_is_checked_where_jax_makes_a_view(leaf):
    view = jaxkv.heads(THREE, 40, 48)
    made = jax.tree.map(lambda _: leaf, view)
    assert made.array is leaf
    assert jax.tree.unflatten(jax.tree.structure(view), [leaf]).array is leaf
    assert repr(made).startswith("heads(")
    assert repr(view) == "heads(float32[3,48,16], 40, 48)"
    assert repr(jaxkv.heads(FLAT, 1, 2, head_size=16)) == "heads(float32[3,96], 1, 2, head_size=16)"


def test_a_call_checks_the_array_that_took_the_place_of_the_first():
    caches, slots = jnp.ones((2, 3, 4, 8, 16)), jnp.arange(3)
    view = jaxkv.heads(THREE, 40, 48)
    with says(
        ValueError, "start and stop must be at least 0, in order, and at most 6, the heads of array, got 40 and 48"
    ):
        jaxkv.reshape_and_cache_flash(jax.tree.map(lambda a: a[:, :6], view), view, *caches, slots)
    with says(ValueError, "the array of a view must have shape (num_tokens, heads, head_size), got (48, 16)"):
        jaxkv.reshape_and_cache_flash(view, jax.tree.map(lambda a: a[0], view), *caches, slots)
    with says(
        ValueError, "start and stop must be at least 0, in order, and at most 6, the heads of array, got 40 and 48"
    ):
        jaxkv.kv_scales(jax.tree.map(lambda a: a[:, :6], view), view, "int8")


def test_jit_takes_and_returns_views_and_compiles_once_for_each_part():
    traced = []

    @jax.jit
    def double(view):
        traced.append(view.start)
        return jax.tree.map(lambda a: 2 * a, view)

    for start in (0, 1, 0, 1):
        view = double(jaxkv.heads(jnp.asarray(ROWS), start, 2))
        np.testing.assert_array_equal(view, 2 * ROWS[:, start:2])
    assert traced == [0, 1]


def test_a_view_is_exported_and_comes_back():
    def write(key, value, cache, slots):
        new = jaxkv.reshape_and_cache_flash(key, value, cache, cache, slots)
        return new, jaxkv.heads(new[0][:, 0], 0, 1)

    cache, slots = jnp.full((3, 4, 4, 16), 7.0), jnp.array([3, -1, 11])
    views = view_of(ROWS, "two of a group"), view_of(2 * ROWS, "flat")
    want, _ = write(ROWS, 2 * ROWS, cache, slots)
    exported = jax.export.export(jax.jit(write), platforms=["cpu", "tpu"])(*views, cache, slots)
    got, view = jax.export.deserialize(exported.serialize()).call(*views, cache, slots)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(view, want[0][:, 0, :1])


def test_any_number_of_tokens_is_exported():
    def step(projection, cache, slots, tables, lens):
        q, k, v = (jaxkv.heads(projection, *part) for part in ((0, 2), (2, 3), (3, 4)))
        caches = jaxkv.reshape_and_cache_flash(k, v, cache, cache, slots)
        return jaxkv.paged_attention(q, caches, tables, lens)

    scope = jax.export.SymbolicScope()
    shapes = ("t, 4, 4, 16", "b, 4, 4, 16", "t", "t, 1", "t")
    types = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(s, scope=scope), d)
        for s, d in zip(shapes, ("float32", "float32", "int32", "int32", "int32"), strict=True)
    ]
    exported = jax.export.export(jax.jit(step), platforms=["cpu"])(*types)
    for tokens in (1, 5):
        rng = np.random.default_rng(tokens)
        arrays = (
            random_normal(rng, (tokens, 4, 4, 16), "float32"), random_normal(rng, (6, 4, 4, 16), "float32"),
            np.arange(tokens, dtype=np.int32), np.zeros((tokens, 1), np.int32), np.full(tokens, 3, np.int32),
        )  # fmt: skip
        np.testing.assert_allclose(exported.call(*arrays), step(*arrays), rtol=1e-6)
    with says(ValueError, "key must have a static shape on cuda, where kernels depend on it, got (t, 4, 4, 16)"):
        jax.export.export(jax.jit(step), platforms=["cuda"])(*types)


# ---- errors


@pytest.mark.parametrize(("array", "arguments", "text"), [
    (THREE, (40, 50), "start and stop must be at least 0, in order, and at most 48, the heads of array, got 40 and 50"),
    (THREE, (-1, 5), "start and stop must be at least 0, in order, and at most 48, the heads of array, got -1 and 5"),
    (THREE, (7, 5), "start and stop must be at least 0, in order, and at most 48, the heads of array, got 7 and 5"),
    (FOUR, (0, 7), "start and stop must be at least 0, in order, and at most 6, the heads of a group, got 0 and 7"),
    (FLAT, (0, 7, 16), "start and stop must be at least 0, in order, and at most 6, the heads of array, got 0 and 7"),
    (FLAT, (0, 97), "start and stop must be at least 0, in order, and at most 96, the columns of array, got 0 and 97"),
    (FLAT, (0, 2, 20), "head_size must divide the 96 columns of array, got 20"),
    (FLAT, (0, 2, 0), "head_size must divide the 96 columns of array, got 0"),
    (FLAT, (0, 2, -16), "head_size must divide the 96 columns of array, got -16"),
    (THREE, (0, 2, 16), "head_size must be None for an array of shape (num_tokens, heads, head_size), got 16"),
    (FOUR, (0, 2, 16), "head_size must be None for an array of shape (num_tokens, groups, heads, head_size), got 16"),
    (FLAT[0], (0, 2), "array must have shape (num_tokens, heads, head_size), (num_tokens, heads * head_size), "
     "(num_tokens, columns) or (num_tokens, groups, heads, head_size), got (96,)"),
])  # fmt: skip
def test_views_that_there_are_not(array, arguments, text):
    start, stop, *head_size = arguments
    with says(ValueError, text):
        jaxkv.heads(array, start, stop, head_size=head_size[0] if head_size else None)


@pytest.mark.parametrize(("arguments", "text"), [
    ((0.0, 2, None), "start must be an int, got 0.0"), ((0, True, None), "stop must be an int, got True"),
    ((None, 2, None), "start must be an int, got None"), ((0, None, None), "stop must be an int, got None"),
    ((0, 2, 16.0), "head_size must be an int, got 16.0"),
])  # fmt: skip
def test_numbers_that_are_no_integers(arguments, text):
    start, stop, head_size = arguments
    with says(TypeError, text):
        jaxkv.heads(FLAT, start, stop, head_size=head_size)


def test_parts_are_static():
    with pytest.raises(TypeError, match=r"^start must be a static int, got a traced value"):
        jax.jit(lambda start: jaxkv.heads(THREE, start, 4))(1)


def test_a_view_has_no_views():
    with says(TypeError, "array must be an array, got a view, heads(float32[3,48,16], 0, 4)"):
        jaxkv.heads(jaxkv.heads(THREE, 0, 4), 0, 2)  # pyright: ignore


def test_ops_say_what_shape_a_view_has():
    cache, slots = jnp.ones((3, 4, 4, 16)), jnp.arange(3)
    with says(ValueError, "key must have shape (num_tokens, 4, 16), got (3, 5, 16)"):
        jaxkv.reshape_and_cache_flash(jaxkv.heads(THREE, 0, 5), jaxkv.heads(THREE, 0, 4), cache, cache, slots)
    with says(ValueError, "value must have shape (3, 4, 16), got (3, 32, 16)"):
        jaxkv.reshape_and_cache_flash(jaxkv.heads(THREE, 0, 4), jaxkv.heads(FOUR, 0, 4), cache, cache, slots)
    with says(ValueError, "key must have shape (num_tokens, num_heads, head_size), got (3, 64)"):
        jaxkv.reshape_and_cache_flash(jaxkv.heads(FLAT, 0, 64), jaxkv.heads(FLAT, 0, 64), cache, cache, slots)
    with says(ValueError, "kv_c must have shape (num_tokens, kv_lora_rank), got (3, 4, 16)"):
        jaxkv.concat_and_cache_mla(jaxkv.heads(THREE, 0, 4), jaxkv.heads(FLAT, 0, 64), cache[:, 0], slots)
    with says(TypeError, "key must have dtype float32, bfloat16 or float16, got float64"):
        jaxkv.kv_scales(jaxkv.heads(np.ones((3, 4, 16)), 0, 2), jaxkv.heads(THREE, 0, 2), "int8")


def test_cases_hide_rows_among_poison():
    """All kinds but one have bytes beside the rows that no op may read."""
    sizes = {kind: hide(ROWS, kind)[0].size for kind in KINDS}
    assert [kind for kind, size in sizes.items() if size == ROWS.size] == ["all heads", "whole groups"]

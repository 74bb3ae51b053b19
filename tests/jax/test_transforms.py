"""jaxkv under JAX's transformations: right, and in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from tests.cases.arrays import bits, make_case, run_oracle, with_case

LAYERS = 4


def arrays(case):
    return (
        jnp.asarray(case.key),
        jnp.asarray(case.value),
        *map(jnp.asarray, case.caches),
        jnp.asarray(case.slot_mapping),
    )


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(np.asarray(w)))


def assert_in_place(compiled, caches):
    """The whole cache is aliased, and no temporary has half its size."""
    size = sum(c.size * c.dtype.itemsize for c in caches)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def write(key, value, key_cache, value_cache, slots, **options):
    return jaxkv.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, **options)


@pytest.fixture
def case():
    return make_case(np.random.default_rng(0), num_blocks=64)


@pytest.fixture
def stacked():
    return make_case(np.random.default_rng(1), num_blocks=64, num_layers=LAYERS, layer=0)


def all_layers(case):
    """The oracle's caches after a write to every layer."""
    for layer in range(LAYERS):
        case = with_case(case, caches=run_oracle(with_case(case, layer=layer)))
    return case.caches


def test_jit_with_donation_updates_the_same_buffers(case):
    step = jax.jit(write, donate_argnums=(2, 3))
    inputs = arrays(case)
    assert_in_place(step.lower(*inputs).compile(), inputs[2:4])
    before = [c.unsafe_buffer_pointer() for c in inputs[2:4]]
    new = step(*inputs)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert all(c.is_deleted() for c in inputs[2:4])
    assert_same(new, run_oracle(case))


def test_without_donation_the_argument_stays_as_it_was(case):
    inputs = arrays(case)
    assert_same(jax.jit(write)(*inputs), run_oracle(case))
    assert_same(inputs[2:4], case.caches)
    assert_same(write(*inputs), run_oracle(case))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "HEAD_MAJOR", "PALLAS", "KV_NHD", "PACKED_NHD", "INTERLEAVED"])
def test_scan_over_layers_in_a_loop_over_steps(layout, cache_dtype):
    kv_cache_dtype = "auto" if cache_dtype == "bfloat16" else "fp8"
    case = make_case(
        np.random.default_rng(2), layout=layout, num_blocks=64, num_layers=LAYERS, layer=0, cache_dtype=cache_dtype,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    key, value, *caches, slots = arrays(case)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(key, value, caches, slots):
        def one_layer(caches, layer):
            new = case.op(jaxkv)(
                key,
                value,
                *caches,
                slots,
                kv_cache_dtype,
                case.k_scale,
                case.v_scale,
                layout=case.layout,
                layer=layer,
            )
            return list(new) if isinstance(new, tuple) else [new], None

        def one_step(_, caches):
            return lax.scan(one_layer, caches, jnp.arange(LAYERS))[0]

        return lax.fori_loop(0, 3, one_step, caches)

    assert_in_place(decode.lower(key, value, caches, slots).compile(), caches)
    assert_same(decode(key, value, caches, slots), all_layers(case))


def test_while_loop_with_slots_that_change():
    case = make_case(np.random.default_rng(3), num_tokens=1, num_blocks=64, slots=[0])
    key, value, *caches, _ = arrays(case)

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def decode(key, value, key_cache, value_cache):
        def body(state):
            step, *caches = state
            return step + 1, *write(key, value, *caches, jnp.array([step * 7], jnp.int32))

        return lax.while_loop(lambda state: state[0] < 5, body, (0, key_cache, value_cache))[1:]

    assert_in_place(decode.lower(key, value, *caches).compile(), caches)
    got = decode(key, value, *caches)
    slots = np.arange(5) * 7
    five = with_case(case, key=case.key.repeat(5, 0), value=case.value.repeat(5, 0), slot_mapping=slots)
    assert_same(got, run_oracle(five))


def test_static_layers(stacked):
    key, value, *caches, slots = arrays(stacked)

    def all_static(key, value, key_cache, value_cache, slots):
        for layer in range(LAYERS):
            key_cache, value_cache = write(
                key, value, key_cache, value_cache, slots, layout=stacked.layout, layer=layer
            )
        return key_cache, value_cache

    step = jax.jit(all_static, donate_argnums=(2, 3))
    assert_in_place(step.lower(key, value, *caches, slots).compile(), caches)
    assert_same(step(key, value, *caches, slots), all_layers(stacked))


def test_traced_scales():
    case = make_case(np.random.default_rng(4), kv_cache_dtype="fp8")
    inputs = arrays(case)
    new = jax.jit(lambda k, v, *x: write(*x, kv_cache_dtype="fp8", k_scale=k, v_scale=v))(
        jnp.float32(case.k_scale), jnp.full(1, case.v_scale, jnp.float32), *inputs
    )
    assert_same(new, run_oracle(case))


@pytest.mark.parametrize("jit", [False, True])
def test_refs_are_updated_in_place(case, jit):
    key, value, *caches, slots = arrays(case)
    refs = [jax.new_ref(c) for c in caches]
    call = jax.jit(write) if jit else write
    before = [r.unsafe_buffer_pointer() for r in refs]
    assert call(key, value, *refs, slots) is None
    assert [r.unsafe_buffer_pointer() for r in refs] == before
    assert_same([r[...] for r in refs], run_oracle(case))


def test_refs_of_one_array():
    case = make_case(np.random.default_rng(5), layout="PACKED_NHD", head_size_v=16)
    key, value, cache, slots = arrays(case)
    ref = jax.new_ref(cache)
    assert jaxkv.reshape_and_cache_flash_diffkv(key, value, ref, slots) is None
    assert_same([ref[...]], run_oracle(case))


@pytest.mark.parametrize("layout", ["NHD", "HND", "PALLAS", "KV_NHD", "PACKED_NHD"])
def test_vmap(layout):
    cases = [
        make_case(np.random.default_rng(i), layout=layout, num_blocks=64, slots=[3, -1, 600, 511, 512, 9])
        for i in range(3)
    ]
    batch = [jnp.stack(x) for x in zip(*map(arrays, cases), strict=True)]
    call = jax.vmap(lambda *x: cases[0].op(jaxkv)(*x, layout=cases[0].layout))
    step = jax.jit(call, donate_argnums=tuple(range(2, len(batch) - 1)))
    assert_in_place(step.lower(*batch).compile(), batch[2:-1])
    new = step(*batch)
    new = new if isinstance(new, tuple) else (new,)
    assert_same(new, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


@pytest.mark.parametrize("pattern", ["layer block slot head dim", "block layer slot head dim"])
def test_vmap_with_layers_and_scales_of_their_own(pattern):
    cases = [
        make_case(np.random.default_rng(i), layout=pattern, num_layers=2, layer=i % 2, kv_cache_dtype="fp8",
                  scales=(0.5 + i, 0.25))
        for i in range(3)
    ]  # fmt: skip
    batch = [jnp.stack(x) for x in zip(*map(arrays, cases), strict=True)]

    def call(key, value, key_cache, value_cache, slots, layer, k_scale):
        return write(
            key, value, key_cache, value_cache, slots, kv_cache_dtype="fp8", k_scale=k_scale, v_scale=0.25,
            layout=pattern, layer=layer,
        )  # fmt: skip

    layers = jnp.array([c.layer for c in cases])
    scales = jnp.array([c.k_scale for c in cases], jnp.float32)
    got = jax.vmap(call)(*batch, layers, scales)
    assert_same(got, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


def test_vmap_of_slots_alone_gives_a_cache_each(case):
    key, value, *caches, slots = arrays(case)
    got = jax.vmap(write, in_axes=(None, None, None, None, 0))(key, value, *caches, jnp.stack([slots, slots[::-1]]))
    turned = with_case(case, slot_mapping=case.slot_mapping[::-1])
    assert_same(got, [np.stack(x) for x in zip(run_oracle(case), run_oracle(turned), strict=True)])


def test_differentiation_raises_and_names_the_way_out(case):
    key, value, *rest = arrays(case)

    def loss(key):
        return write(key, value, *rest)[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError) as error:
        jax.grad(loss)(key)
    assert str(error.value) == (
        "jaxkv.reshape_and_cache_flash is not differentiable: apply jax.lax.stop_gradient to key and value"
    )


def test_checkpoint_and_gradients_past_the_write(case):
    case = make_case(np.random.default_rng(6), bits=False, dtype="float32")
    key, value, *rest = arrays(case)
    rest = [*(jnp.zeros_like(c) for c in rest[:2]), rest[2]]

    @jax.checkpoint
    def loss(key):
        caches = write(*map(lax.stop_gradient, (key, value)), *rest)
        return caches[0].sum() * 0 + (key * key).sum()

    np.testing.assert_allclose(jax.grad(loss)(key), 2 * key, rtol=1e-6)


def test_export_for_a_cpu(case):
    inputs = arrays(case)
    exported = jax.export.export(jax.jit(write), platforms=["cpu", "tpu"])(*inputs)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(*inputs), run_oracle(case))


def test_triton_on_a_cpu_is_an_error(case):
    with pytest.raises(ValueError, match=r"^backend 'triton' needs a CUDA or ROCm device"):
        write(*arrays(case), backend="triton")


def test_numpy_slots_of_64_bits_do_not_wrap(case):
    case.slot_mapping = np.array([2**32 + 1, 5, -(2**32) + 2, 2**33, 0, 1, 2])
    key, value, *caches, _ = arrays(case)
    assert_same(write(key, value, *caches, case.slot_mapping), run_oracle(case))


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_int64_and_fp8_arrays_with_x64(cache_dtype):
    kv_cache_dtype = "fp8_e4m3" if "e4m3" in cache_dtype else "fp8_e5m2"
    with jax.enable_x64(True):
        case = make_case(
            np.random.default_rng(7), cache_dtype=cache_dtype, kv_cache_dtype=kv_cache_dtype,
            slots=[2**32 + 1, 5, -(2**32) + 2, 2**33, 0, 1, 2],
        )  # fmt: skip
        assert arrays(case)[-1].dtype == jnp.int64
        assert_same(
            jax.jit(
                functools.partial(write, kv_cache_dtype=kv_cache_dtype, k_scale=case.k_scale, v_scale=case.v_scale)
            )(*arrays(case)),
            run_oracle(case),
        )

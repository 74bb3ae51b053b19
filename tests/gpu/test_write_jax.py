"""On a GPU, JAX's half of writing: donation, scan, Refs, vmap, export, sharding; one buffer with torch."""

import numpy as np
import pytest

from tests.cases.arrays import bits, make_case, run_oracle
from tests.cases.gpu import HAS_GPU
from tests.cases.gpu_writes import assert_caches

pytestmark = pytest.mark.gpu


def jax_case(**options):
    import jax.numpy as jnp

    case = make_case(np.random.default_rng(7), num_blocks=64, **options)
    return case, [jnp.asarray(a) for a in (case.key, case.value, *case.caches, case.slot_mapping)]


def assert_arrays(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(g)), bits(w))


@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "fp8", "cache_dtype": "float8_e4m3fn"}], ids=["bf16", "fp8"]
)
def test_jit_with_donation_updates_the_same_buffers(options):
    import jax

    import jaxkv

    case, inputs = jax_case(**options)
    step = jax.jit(
        lambda *x: jaxkv.reshape_and_cache_flash(*x, case.kv_cache_dtype, case.k_scale, case.v_scale),
        donate_argnums=(2, 3),
    )
    before = [c.unsafe_buffer_pointer() for c in inputs[2:4]]
    new = step(*inputs)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    assert_arrays(new, run_oracle(case))


@pytest.mark.parametrize("layout", ["NHD", "HND", "KV_NHD", "PACKED_NHD"])
def test_scan_over_layers_in_a_loop_over_steps(layout):
    import jax
    import jax.numpy as jnp
    from jax import lax

    import jaxkv

    case, (key, value, *caches, slots) = jax_case(layout=layout, num_layers=4, layer=0)

    def decode(key, value, caches, slots):
        def one_layer(caches, layer):
            new = case.op(jaxkv)(key, value, *caches, slots, layout=case.layout, layer=layer)
            return list(new) if isinstance(new, tuple) else [new], None

        return lax.fori_loop(0, 3, lambda _, c: lax.scan(one_layer, c, jnp.arange(4))[0], caches)

    before = [c.unsafe_buffer_pointer() for c in caches]
    new = jax.jit(decode, donate_argnums=2)(key, value, caches, slots)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    for layer in range(4):
        case.layer = layer
        case.caches = run_oracle(case)
    assert_arrays(new, case.caches)


@pytest.mark.gpu_smoke
def test_refs_are_updated_in_place():
    import jax

    import jaxkv

    case, (key, value, *caches, slots) = jax_case()
    refs = [jax.new_ref(c) for c in caches]
    before = [r.unsafe_buffer_pointer() for r in refs]
    assert jaxkv.reshape_and_cache_flash(key, value, *refs, slots) is None
    assert [r.unsafe_buffer_pointer() for r in refs] == before
    assert_arrays([r[...] for r in refs], run_oracle(case))


@pytest.mark.parametrize("layout", ["NHD", "PALLAS"])
def test_vmap(layout):
    import jax
    import jax.numpy as jnp

    import jaxkv

    cases = [make_case(np.random.default_rng(i), layout=layout) for i in range(3)]
    batch = [
        jnp.stack([jnp.asarray(a) for a in arrays])
        for arrays in zip(*((c.key, c.value, *c.caches, c.slot_mapping) for c in cases), strict=True)
    ]
    new = jax.vmap(lambda *x: jaxkv.reshape_and_cache_flash(*x, layout=layout))(*batch)
    assert_arrays(new, [np.stack(x) for x in zip(*map(run_oracle, cases), strict=True)])


def test_export_and_call():
    import jax

    import jaxkv

    case, inputs = jax_case()
    exported = jax.export.export(
        jax.jit(jaxkv.reshape_and_cache_flash),
        platforms=["cuda" if HAS_GPU else "cpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")],
    )(*inputs)
    assert_arrays(exported.call(*inputs), run_oracle(case))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_over_all_gpus(kind):
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxkv

    gpus = jax.device_count()
    mesh = jax.make_mesh((gpus,), ("tp",), axis_types=(getattr(AxisType, kind),))
    case = make_case(np.random.default_rng(8), num_heads=4 * gpus)
    rows, cache = (NamedSharding(mesh, P(*[None] * n, "tp", None)) for n in (1, 2))
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(a, s) for a, s in ((case.key, rows), (case.value, rows), *((c, cache) for c in case.caches))
        ]
        slots = jax.device_put(case.slot_mapping.astype(np.int32), NamedSharding(mesh, P(None)))
        new = jax.jit(jaxkv.reshape_and_cache_flash, donate_argnums=(2, 3))(*inputs, slots)
    assert_arrays(new, run_oracle(case))


@pytest.mark.gpu_smoke
def test_both_frameworks_share_one_cache():
    """torch writes through DLPack into the buffer that JAX made, and the other way round."""
    import jax.numpy as jnp
    import torch

    import jaxkv
    import torchkv

    case, (key, value, *caches, slots) = jax_case()
    shared = [torch.from_dlpack(c) for c in caches]
    torchkv.reshape_and_cache_flash(*map(torch.from_dlpack, (key, value)), *shared, torch.from_dlpack(slots))
    if HAS_GPU:
        torch.cuda.synchronize()
    assert_caches(shared, run_oracle(case))
    back = [jnp.from_dlpack(c) for c in shared]
    assert_arrays(jaxkv.reshape_and_cache_flash(key, value, *back, slots), run_oracle(case))

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv
from tests.cases.arrays import bits, from_torch, run_oracle, with_case
from tests.cases.torch_compile import assert_bits
from tests.cases.torch_writes import BACKENDS, as_integers, diffkv, flash, small, tensors
from torchkv._library import write as _library

# ---- registration


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "HEAD_MAJOR", "head_size_v": 24},
        {"kv_cache_dtype": "fp8"},
        {"num_layers": 2, "layer": 1},
        {"layout": "PACKED_NHD", "head_size_v": 24},
        {"layout": "KV_NHD", "kv_cache_dtype": "fp8_e5m2"},
        {"layout": "INTERLEAVED", "num_layers": 2, "layer": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(options, requires_grad, rng):
    case = small(rng, bits=False, **options)
    key, value, caches, slots = tensors(case)
    for cache in caches:
        as_integers(cache).zero_()  # it compares values, and finds NaN unequal to itself
    scales = [None if s is None else torch.tensor(s) for s in (case.k_scale, case.v_scale)]
    op = _library.diffkv if case.layout.single_array else _library.flash
    for layer in [(case.layer, None), (None, torch.tensor([case.layer]))] if case.layout.has_layer else [(None, None)]:
        arguments = (
            key.requires_grad_(requires_grad),
            value.requires_grad_(requires_grad),
            *caches,
            slots,
            case.kv_cache_dtype,
            *scales,
            case.layout.pattern,
            *layer,
            None,
        )
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_schemas():
    options = (
        "Tensor slot_mapping, str kv_cache_dtype, Tensor? k_scale, Tensor? v_scale, str? layout, "
        "SymInt? layer, Tensor? layer_index, str? backend) -> ()"
    )
    assert str(_library.flash._schema) == (
        "torchkv::reshape_and_cache_flash(Tensor key, Tensor value, "
        f"Tensor(a!) key_cache, Tensor(b!) value_cache, {options}"
    )
    assert str(_library.diffkv._schema) == (
        f"torchkv::reshape_and_cache_flash_diffkv(Tensor key, Tensor value, Tensor(a!) kv_cache, {options}"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_in_place(layout, backend, rng):
    case = small(rng, layout=layout)
    key, value, caches, slots = tensors(case)
    addresses = [c.data_ptr() for c in caches]
    inputs = [t.clone() for t in (key, value, slots)]
    assert case.op(torchkv)(key, value, *caches, slots, backend=backend) is None
    assert [c.data_ptr() for c in caches] == addresses
    assert_bits(caches, run_oracle(case))
    assert_bits((key, value, slots), [from_torch(t) for t in inputs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_int32_slots(layout, backend, rng):
    case = small(rng, layout=layout, slots=[3, -1, 47, 48, -(2**31)])
    key, value, caches, slots = tensors(case)
    case.op(torchkv)(key, value, *caches, slots.int(), backend=backend)
    assert_bits(caches, run_oracle(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_int64_slots_that_int32_would_wrap(backend, rng):
    case = small(rng, slots=[2**32, 2**32 + 1, -(2**32) + 2, 2**63 - 1, 4])
    key, value, caches, slots = tensors(case)
    flash(key, value, *caches, slots, backend=backend)
    assert_bits(caches, run_oracle(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(layer, dtype) for layer in (0, 2, 3, -1) for dtype in (torch.int32, torch.int64)]
    + [(2**32, torch.int64), (1 - 2**32, torch.int64)],
)
def test_layer_tensors(layer, dtype, shape, backend, rng):
    case = small(rng, num_layers=3, layer=layer)
    key, value, caches, slots = tensors(case)
    index = torch.full(shape, layer, dtype=dtype)
    flash(key, value, *caches, slots, layout=case.layout, layer=index, backend=backend)
    assert_bits(caches, run_oracle(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scale",
    [lambda s: s, np.float32, torch.tensor, lambda s: torch.tensor([s])],
    ids=["float", "NumPy", "scalar", "vector"],
)
def test_scales_of_every_type(scale, backend, rng):
    case = small(rng, kv_cache_dtype="fp8", scales=(0.5, 3))
    key, value, caches, slots = tensors(case)
    k_scale, v_scale = (scale(float(s)) for s in (case.k_scale, case.v_scale))
    flash(key, value, *caches, slots, "fp8", k_scale, v_scale, backend=backend)
    assert_bits(caches, run_oracle(case))


def test_fake_tensors_need_no_memory():
    with FakeTensorMode():
        key = torch.empty(1 << 20, 8, 128, dtype=torch.bfloat16, device="cuda")
        cache = torch.empty(1 << 20, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
        slots = torch.empty(1 << 20, dtype=torch.int64, device="cuda")
        assert flash(key, key, cache, cache.clone(), slots) is None
        packed = torch.empty(1 << 20, 16, 8, 256, dtype=torch.bfloat16, device="cuda")
        assert diffkv(key, key, packed, slots) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_require_grad(backend, rng):
    case = small(rng, dtype="float32")
    key, value, caches, slots = tensors(case)
    key.requires_grad_()
    value.requires_grad_()
    twice = key * 2
    flash(twice, value, *caches, slots, backend=backend)
    assert all(not c.requires_grad and c.grad_fn is None for c in caches)
    assert_bits(caches, run_oracle(with_case(case, key=from_torch(twice))))
    twice.sum().backward()
    assert (key.grad == 2).all()


# ---- find_duplicate_slots


@pytest.mark.parametrize("of", [list, np.asarray, torch.tensor, jnp.asarray], ids=["list", "NumPy", "torch", "JAX"])
@pytest.mark.parametrize(
    ("slots", "duplicates"),
    [
        ([], []),
        ([5], [5][:0]),
        ([3, 1, 2], []),
        ([-1, -1, 0, -7, -7], []),
        ([9, 3, 9, 0, 3, 3, 0, 1], [0, 3, 9]),
    ],
    ids=str,
)
def test_find_duplicate_slots(slots, duplicates, of):
    found = torchkv.find_duplicate_slots(of(slots))
    assert isinstance(found, np.ndarray)
    assert found.tolist() == duplicates


def test_find_duplicate_slots_in_strided_tensors():
    slots = torch.tensor([[4, 9], [5, 9], [4, 8]])
    assert torchkv.find_duplicate_slots(slots[:, 0]).tolist() == [4]
    assert torchkv.find_duplicate_slots(slots[:, 1].int()).tolist() == [9]


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_autograd_is_told_that_the_caches_changed(backend, rng):
    """A cache that is saved for backward and written later has to be an error, not a wrong gradient."""
    case = small(rng, dtype="float32")
    key, value, caches, slots = tensors(case)
    weight = torch.ones_like(caches[0], requires_grad=True)
    loss = (weight * caches[0]).sum()
    torchkv.reshape_and_cache_flash(key, value, *caches, slots, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_in_inference_mode(rng):
    case = small(rng)
    with torch.inference_mode():
        key, value, caches, slots = tensors(case)
        torchkv.reshape_and_cache_flash(key, value, *caches, slots, backend="interpret")
    for got, want in zip(caches, run_oracle(case), strict=True):
        np.testing.assert_array_equal(bits(from_torch(got)), bits(want))

"""torchkv reads and writes tensors of any strides."""

import pytest
import torch

import torchkv
from tests.cases.arrays import from_torch, random_bits, run_oracle, to_torch, with_case
from tests.cases.torch_compile import assert_bits
from tests.cases.torch_writes import BACKENDS, as_integers, flash, fused, options_of, small, tensors, two

INPUTS = {
    "contiguous": two(lambda n, h, d: (n, h, d), lambda x: x),
    "fused qkv": fused,
    "heads first": two(lambda n, h, d: (h, n, d), lambda x: x.transpose(0, 1)),
    "dims first": two(lambda n, h, d: (d, n, h), lambda x: x.permute(1, 2, 0)),
    "every other token": two(lambda n, h, d: (2 * n, h, d), lambda x: x[1::2]),
    "every other element": two(lambda n, h, d: (n, h, 2 * d), lambda x: x[:, :, ::2]),
    "an odd offset": two(lambda n, h, d: (n, h, d + 3), lambda x: x[:, :, 3:]),
    "one token for all": two(lambda n, h, d: (1, h, d), lambda x: x.expand(7, -1, -1)),
    "one head for all": two(lambda n, h, d: (n, 1, d), lambda x: x.expand(-1, 3, -1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_HND", "INTERLEAVED"])
@pytest.mark.parametrize("name", INPUTS)
def test_strided_inputs(name, layout, backend, rng):
    key, value = INPUTS[name](rng, 7, 3, 16, "bfloat16")
    case = small(rng, layout=layout, num_tokens=7)
    case = with_case(case, key=from_torch(key).copy(), value=from_torch(value).copy())
    _, _, caches, slots = tensors(case)
    case.op(torchkv)(key, value, *caches, slots, layout=layout, backend=backend)
    assert_bits(caches, run_oracle(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_cast(backend, rng):
    key, value = fused(rng, 7, 3, 16, "float32")
    case = small(rng, num_tokens=7, dtype="float32", kv_cache_dtype="fp8", cache_dtype="float8_e4m3fn")
    case = with_case(case, key=from_torch(key).copy(), value=from_torch(value).copy())
    _, _, caches, slots = tensors(case)
    flash(key, value, *caches, slots, "fp8", case.k_scale, case.v_scale, backend=backend)
    assert_bits(caches, run_oracle(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.repeat_interleave(3)[::3],
        lambda x: torch.stack([x + 1, x, x - 1], 1)[:, 1],
        lambda x: torch.cat([x[:1], x])[1:],
        lambda x: x[2:3].expand(len(x)),
    ],
    ids=["every third", "a column", "an offset", "one for all"],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_slot_mapping(view, dtype, backend, rng):
    case = small(rng, num_tokens=7)
    key, value, caches, slots = tensors(case)
    slots = view(slots.to(dtype))
    if slots.stride() == (0,):  # one slot for all: which token wins is open unless they are the same
        key, value = (x[:1].expand_as(x) for x in (key, value))
    case = with_case(case, key=from_torch(key), value=from_torch(value), slot_mapping=from_torch(slots).copy())
    flash(key, value, *caches, slots, backend=backend)
    assert_bits(caches, run_oracle(case))


# How a cache of some shape lies in a larger tensor: that tensor's shape, and the view.
LIES = {
    "contiguous": (lambda s: s, lambda x: x),
    "an offset": (lambda s: (s[0] + 3, *s[1:]), lambda x: x[2:-1]),
    "every other block": (lambda s: (2 * s[0], *s[1:]), lambda x: x[1::2]),
    "padded rows": (lambda s: (*s[:-1], s[-1] + 5), lambda x: x[..., 2:-3]),
    "padded everywhere": (lambda s: tuple(n + 2 for n in s), lambda x: x[(slice(1, -1),) * x.dim()]),
    "reversed axes": (lambda s: s[::-1], lambda x: x.permute(*range(x.dim())[::-1])),
    "turned axes": (lambda s: s[2:] + s[:2], lambda x: x.movedim((-2, -1), (0, 1))),
    "every other element": (lambda s: (*s, 2), lambda x: x[..., 1]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HND", "HEAD_MAJOR", "PACKED_NHD", "BLOCK_KV_HND", "INTERLEAVED"])
@pytest.mark.parametrize("name", LIES)
def test_strided_caches(name, layout, backend, rng):
    larger, view = LIES[name]
    options = {"kv_cache_dtype": "fp8", "cache_dtype": "float8_e4m3fn"} if name == "an offset" else {}
    options["head_size_v"] = 16 if "KV" in layout or layout == "INTERLEAVED" else 24
    case = small(rng, layout=layout, **options)
    wholes = [to_torch(random_bits(rng, larger(c.shape), c.dtype.name)) for c in case.caches]
    case = with_case(case, caches=[from_torch(view(whole)).copy() for whole in wholes])
    expected = [whole.clone() for whole in wholes]
    for whole, cache in zip(expected, run_oracle(case), strict=True):
        as_integers(view(whole)).copy_(as_integers(to_torch(cache)))

    key, value, _, slots = tensors(case)
    case.op(torchkv)(key, value, *map(view, wholes), slots, **options_of(case), backend=backend)
    assert_bits(wholes, [from_torch(e) for e in expected])  # what lies between the caches' elements included


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HND", "PALLAS", "layer block slot head dim"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4])
def test_caches_by_unbind(dim, layout, backend, rng):
    """K and V as views of one tensor, whatever the axis on which they are apart."""
    stacked = {"num_layers": 3, "layer": 1} if "layer" in layout else {}
    case = small(rng, layout=layout, **stacked)
    shape = case.caches[0].shape
    kv = to_torch(random_bits(rng, (*shape[:dim], 2, *shape[dim:]), "bfloat16"))
    case = with_case(case, caches=[from_torch(c).copy() for c in kv.unbind(dim)])
    key, value, _, slots = tensors(case)
    flash(key, value, *kv.unbind(dim), slots, layout=case.layout, layer=case.layer, backend=backend)
    assert_bits(kv.unbind(dim), run_oracle(case))

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv
from tests.cases.arrays import bits, from_torch, make_case, random_bits, run_oracle, to_torch, with_case
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code
from torchkv import CacheLayout
from torchkv._library import write as _library

BACKENDS = [None, "interpret"]
flash = torchkv.reshape_and_cache_flash
diffkv = torchkv.reshape_and_cache_flash_diffkv


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def small(rng, **options):
    return make_case(rng, **({"num_tokens": 5, "num_heads": 3, "head_size": 16, "num_blocks": 6} | options))


def tensors(case):
    """key, value, caches and slots as fresh tensors."""
    return (
        *(to_torch(a.copy()) for a in (case.key, case.value)),
        [to_torch(c.copy()) for c in case.caches],
        to_torch(case.slot_mapping.copy()),
    )


def options_of(case):
    scales = {"k_scale": case.k_scale, "v_scale": case.v_scale}
    return {"kv_cache_dtype": case.kv_cache_dtype, "layout": case.layout, "layer": case.layer} | scales


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


# ---- strides


def fused(rng, tokens, heads, size, dtype):
    """key and value as slices of a fused qkv projection."""
    qkv = to_torch(random_bits(rng, (tokens, 4 * heads * size), dtype))
    _, key, value = qkv.split([2 * heads * size, heads * size, heads * size], dim=1)
    return key.unflatten(1, (heads, size)), value.unflatten(1, (heads, size))


def two(shape_of, view):
    """key and value from two tensors of their own."""

    def make(rng, tokens, heads, size, dtype):
        return tuple(view(to_torch(random_bits(rng, shape_of(tokens, heads, size), dtype))) for _ in range(2))

    return make


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


def as_integers(tensor):
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)


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


# ---- torch.compile


# name: what to write, and how the compiled function calls the op with key, value, caches, slots
COMPILED = {
    "two caches": ({}, lambda k, v, kc, vc, s: flash(k, v, kc, vc, s)),
    "a CacheLayout": (
        {"layout": "HND"},
        lambda k, v, kc, vc, s: flash(k, v, kc, vc, s, layout=CacheLayout.HND),
    ),
    "head-major": ({"layout": "HEAD_MAJOR"}, lambda k, v, kc, vc, s: flash(k, v, kc, vc, s)),
    "a pattern": (
        {"layout": "head block slot dim"},
        lambda k, v, kc, vc, s: flash(k, v, kc, vc, s, layout="head block slot dim"),
    ),
    "a layer": ({"num_layers": 3, "layer": 2}, lambda k, v, kc, vc, s: flash(k, v, kc, vc, s, layer=2)),
    "one array": ({"layout": "PACKED_NHD"}, lambda k, v, kv, s: diffkv(k, v, kv, s)),
    "one array, kv in front": (
        {"layout": "KV_NHD"},
        lambda k, v, kv, s: diffkv(k, v, kv, s, layout=CacheLayout.KV_NHD),
    ),
    "one array, two views": ({"layout": "KV_NHD"}, lambda k, v, kv, s: flash(k, v, *kv.unbind(), s)),
    "one array, two views by index": (
        {"layout": "BLOCK_KV_NHD"},
        lambda k, v, kv, s: flash(k, v, kv[:, 0], kv[:, 1], s),
    ),
    "one array, strided views": (
        {"layout": "INTERLEAVED"},
        lambda k, v, kv, s: flash(k, v, kv[:, :, ::2], kv[:, :, 1::2], s),
    ),
}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("options", "write"), COMPILED.values(), ids=COMPILED)
def test_compiled_without_copies(options, write, rng):
    case = small(rng, **options)
    key, value, caches, slots = tensors(case)
    addresses = [c.data_ptr() for c in caches]
    assert_no_copies(compiled_code(write, key, value, *caches, slots))
    assert_bits(caches, run_oracle(case))
    assert [c.data_ptr() for c in caches] == addresses


@pytest.mark.usefixtures("compiler")
def test_compiled_with_a_layer_tensor_and_scales(rng):
    case = small(rng, num_layers=3, layer=1, kv_cache_dtype="fp8")
    key, value, caches, slots = tensors(case)

    def write(key, value, key_cache, value_cache, slots, k_scale, v_scale, layer):
        flash(key, value, key_cache, value_cache, slots, "fp8", k_scale, v_scale, layer=layer)

    scales = torch.tensor(case.k_scale), torch.tensor(case.v_scale)
    assert_no_copies(compiled_code(write, key, value, *caches, slots, *scales, torch.tensor(1)))
    assert_bits(caches, run_oracle(case))


@pytest.mark.usefixtures("compiler")
def test_compiled_with_slices_of_a_fused_projection(rng):
    case = small(rng)
    _, _, caches, slots = tensors(case)
    qkv = to_torch(random_bits(rng, (5, 4 * 48), "bfloat16"))

    def write(qkv, key_cache, value_cache, slots):
        _, key, value = qkv.split([96, 48, 48], dim=1)
        flash(key.view(-1, 3, 16), value.view(-1, 3, 16), key_cache, value_cache, slots)

    assert_no_copies(compiled_code(write, qkv, *caches, slots))
    key, value = (from_torch(qkv[:, i : i + 48]).reshape(5, 3, 16) for i in (96, 144))
    assert_bits(caches, run_oracle(with_case(case, key=key, value=value)))


@pytest.mark.usefixtures("compiler")
def test_compiled_with_caches_that_are_slices_of_larger_buffers(rng):
    case = small(rng)
    key, value, _, slots = tensors(case)
    wholes = [to_torch(random_bits(rng, (9, 3, 8, 20), "bfloat16")) for _ in range(2)]
    views = [whole[2:8, :, :, 3:-1].transpose(1, 2) for whole in wholes]
    case = with_case(case, caches=[from_torch(v).copy() for v in views])
    assert_no_copies(compiled_code(lambda *arguments: flash(*arguments), key, value, *views, slots))
    assert_bits(views, run_oracle(case))


@pytest.mark.usefixtures("compiler")
def test_compiled_writes_to_every_layer_of_one_cache(rng):
    cases = [small(rng, layout="layer kv block slot head dim", num_layers=3, layer=layer) for layer in range(3)]
    _, _, (cache,), slots = tensors(cases[0])
    rows = [tensors(case)[:2] for case in cases]

    def write(rows, cache, slots):
        for layer, (key, value) in enumerate(rows):
            diffkv(key, value, cache, slots, layout="layer kv block slot head dim", layer=layer)

    assert_no_copies(compiled_code(write, rows, cache, slots), writes=3)
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want, slot_mapping=cases[0].slot_mapping))
    assert_bits([cache], want)


@pytest.mark.usefixtures("compiler")
def test_compiled_writes_to_views_of_a_buffer_of_a_module(rng):
    case = small(rng, layout="KV_NHD")
    key, value, (kv,), slots = tensors(case)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kv", kv)

        def forward(self, key, value, slots):
            flash(key, value, *self.kv.unbind(), slots)

    module = Attention()
    assert_no_copies(compiled_code(module, key, value, slots))
    assert_bits([module.kv], run_oracle(case))
    assert module.kv.data_ptr() == kv.data_ptr()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dim", [0, 1])
def test_compiled_with_views_from_outside(dim, rng):
    """The bits are right where K and V, as arguments, are views of one tensor, though inductor copies some of them."""
    case = small(rng, layout=["KV_NHD", "BLOCK_KV_NHD"][dim])
    key, value, (kv,), slots = tensors(case)
    write = torch.compile(lambda *arguments: flash(*arguments), fullgraph=True, backend="aot_eager")
    write(key, value, *kv.unbind(dim), slots)
    assert_bits([kv], run_oracle(case))


@pytest.mark.usefixtures("compiler")
def test_any_number_of_tokens_is_compiled_once(rng):
    counter = CompileCounterWithBackend("inductor")
    write = torch.compile(lambda *arguments: flash(*arguments), fullgraph=True, backend=counter)
    for tokens in (5, 7, 8, 13, 33, 48):
        case = small(rng, num_tokens=tokens, num_blocks=8)
        key, value, caches, slots = tensors(case)
        write(key, value, *caches, slots)
        assert_bits(caches, run_oracle(case))
    assert counter.frame_count <= 2  # for the first number, and for all
    for tokens in (0, 1):  # inductor treats these two specially
        case = small(rng, num_tokens=tokens, num_blocks=8)
        key, value, caches, slots = tensors(case)
        write(key, value, *caches, slots)
        assert_bits(caches, run_oracle(case))


@pytest.mark.usefixtures("compiler")
def test_every_size_dynamic(rng):
    counter = CompileCounterWithBackend("inductor")
    write = torch.compile(lambda *arguments: flash(*arguments), fullgraph=True, dynamic=True, backend=counter)
    for sizes in [
        {"num_tokens": 5, "num_heads": 3, "head_size": 16, "num_blocks": 6, "head_size_v": 24},
        {"num_tokens": 9, "num_heads": 2, "head_size": 24, "num_blocks": 7, "block_size": 4},
        {"num_tokens": 4, "num_heads": 5, "head_size": 10, "num_blocks": 3, "head_size_v": 20},
    ]:
        case = make_case(rng, **sizes)
        key, value, caches, slots = tensors(case)
        write(key, value, *caches, slots[:-1])
        assert_bits(caches, run_oracle(with_case(case, slot_mapping=case.slot_mapping[:-1])))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("compiler")
def test_any_layer_is_compiled_once(rng):
    counter = CompileCounterWithBackend("inductor")
    write = torch.compile(lambda *arguments, layer: flash(*arguments, layer=layer), fullgraph=True, backend=counter)
    for make, most in ((int, 3), (torch.tensor, 4)):  # for 0, for 1, and for all; a tensor is a tensor
        for layer in range(6):
            case = small(rng, num_layers=6, layer=layer)
            key, value, caches, slots = tensors(case)
            write(key, value, *caches, slots, layer=make(layer))
            assert_bits(caches, run_oracle(case))
        assert counter.frame_count <= most


@pytest.mark.usefixtures("compiler")
def test_compiled_beside_gradients(rng):
    case = small(rng, dtype="float32", bits=False, kv_cache_dtype="fp8", scales=(0.5, 2.0))
    key, value, caches, slots = tensors(case)
    weight = torch.full((), 2.0, requires_grad=True)

    def step(key, value, key_cache, value_cache, slots):
        scaled = key * weight
        flash(scaled, value, key_cache, value_cache, slots, "fp8", 0.5, 2.0)
        return scaled.sum()

    torch.compile(step, fullgraph=True, backend="aot_eager")(key, value, *caches, slots).backward()
    torch.testing.assert_close(weight.grad, key.sum())
    assert all(not c.requires_grad for c in caches)
    assert_bits(caches, run_oracle(with_case(case, key=from_torch(key * weight))))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v, s: (k[:, :2], v, s), "key must have shape (num_tokens, 3, 16), got (5, 2, 16)"),
        (lambda k, v, s: (k, v, s.float()), "slot_mapping must have dtype int32 or int64, got float32"),
        (lambda k, v, s: (k[:3], v[:3], s), "slot_mapping must have at most num_tokens = 3 entries, got 5"),
    ],
    ids=["shape", "dtype", "slots"],
)
def test_bad_input_fails_when_compiled(change, message, rng):
    key, value, caches, slots = tensors(small(rng))
    before = [from_torch(c).copy() for c in caches]
    write = torch.compile(lambda *arguments: flash(*arguments), fullgraph=True, backend="aot_eager")
    key, value, slots = change(key, value, slots)
    with pytest.raises(Exception, match=re.escape(message)):
        write(key, value, *caches, slots)
    assert_bits(caches, before)


def test_export(rng):
    case = small(rng)
    key, value, caches, slots = tensors(case)

    class Write(torch.nn.Module):
        def forward(self, key, value, key_cache, value_cache, slots):
            flash(key, value, key_cache, value_cache, slots, layout="NHD")

    tokens = torch.export.Dim("tokens", min=2, max=1024)
    dynamic = ({0: tokens}, {0: tokens}, None, None, {0: tokens})
    program = torch.export.export(Write(), (key, value, *caches, slots), dynamic_shapes=dynamic)
    assert_bits(caches, case.caches)
    case = small(rng, num_tokens=11)
    key, value, caches, slots = tensors(case)
    program.module()(key, value, *caches, slots)
    assert_bits(caches, run_oracle(case))


# ---- vmap


def batch_of(rng, size=3, slots=None, **options):
    """Cases with slots of their own: no two cases write to one slot, so that they may share caches."""
    case = small(rng, **options)
    blocks, block_size = case.layout.place([c.shape for c in case.caches], head_size=16).extents[1:3]
    slots = rng.permutation(blocks * block_size)[: size * 5].reshape(size, 5)
    slots[:, 2] = -1
    return [
        with_case(
            case,
            key=random_bits(rng, case.key.shape, case.key.dtype.name),
            value=random_bits(rng, case.value.shape, case.value.dtype.name),
            caches=[random_bits(rng, c.shape, c.dtype.name) for c in case.caches],
            slot_mapping=slots[i],
        )
        for i in range(size)
    ]


def stacked(cases, dim=0):
    """key, value and slots of cases with a batch axis."""
    key = torch.stack([to_torch(c.key) for c in cases], dim)
    value = torch.stack([to_torch(c.value) for c in cases])
    return key, value, torch.stack([to_torch(c.slot_mapping) for c in cases])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_NHD"])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_vmap_with_shared_caches(dim, layout, backend, rng):
    cases = batch_of(rng, layout=layout)
    caches = [to_torch(c.copy()) for c in cases[0].caches]

    def write(key, value, slots):
        assert cases[0].op(torchkv)(key, value, *caches, slots, backend=backend) is None
        return slots

    torch.vmap(write, in_dims=(dim, 0, 0))(*stacked(cases, dim))
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want))
    assert_bits(caches, want)


def test_vmap_with_shared_caches_and_key_longer_than_slots(rng):
    cases = batch_of(rng)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = stacked(cases)
    torch.vmap(lambda k, v, s: (flash(k, v, *caches, s), s)[1])(key, value, slots[:, :4])
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want, slot_mapping=case.slot_mapping[:4]))
    assert_bits(caches, want)


def test_vmap_with_shared_caches_and_shared_rows(rng):
    cases = batch_of(rng)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = stacked(cases)
    torch.vmap(lambda v, s: (flash(key[0], v, *caches, s), s)[1])(value, slots)
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want, key=cases[0].key))
    assert_bits(caches, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layout", "dim"), [("NHD", 0), ("NHD", 2), ("HND", 4), ("KV_NHD", 1), ("PACKED_HND", 3)])
def test_vmap_with_caches_of_their_own(layout, dim, backend, rng):
    cases = batch_of(rng, layout=layout)
    caches = [
        torch.stack([to_torch(c) for c in arrays], dim) for arrays in zip(*[c.caches for c in cases], strict=True)
    ]

    def write(key, value, slots, *caches):
        assert cases[0].op(torchkv)(key, value, *caches, slots, layout=layout, backend=backend) is None
        return slots

    torch.vmap(write, in_dims=(0, 0, 0, *[dim] * len(caches)))(*stacked(cases), *caches)
    for i, case in enumerate(cases):
        assert_bits([c.select(dim, i) for c in caches], run_oracle(case))


def test_vmap_with_scales_and_layers_of_their_own(rng):
    cases = batch_of(rng, num_layers=3, layer=1, kv_cache_dtype="fp8")
    scales = [0.5, 0.37, 3.0]
    cases = [with_case(c, layer=i, k_scale=s) for i, (c, s) in enumerate(zip(cases, scales, strict=True))]
    caches = [torch.stack([to_torch(c) for c in arrays]) for arrays in zip(*[c.caches for c in cases], strict=True)]

    def write(key, value, slots, key_cache, value_cache, k_scale, layer):
        flash(key, value, key_cache, value_cache, slots, "fp8", k_scale, cases[0].v_scale, layer=layer)
        return slots

    torch.vmap(write)(*stacked(cases), *caches, torch.tensor(scales), torch.arange(3))
    for i, case in enumerate(cases):
        assert_bits([c[i] for c in caches], run_oracle(case))


def test_vmap_in_vmap(rng):
    cases = batch_of(rng, size=4)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = (x.unflatten(0, (2, 2)) for x in stacked(cases))
    torch.vmap(torch.vmap(lambda k, v, s: (flash(k, v, *caches, s), s)[1]))(key, value, slots)
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want))
    assert_bits(caches, want)


@pytest.mark.parametrize(
    ("mapped", "message"),
    [
        (["key"], "vmap must map slot_mapping where it does not map the caches"),
        (["key", "value"], "vmap must map slot_mapping where it does not map the caches"),
        (["slot_mapping", "key_cache"], "vmap must map all caches or none"),
        (["slot_mapping", "value_cache"], "vmap must map all caches or none"),
        (["slot_mapping", "k_scale"], "vmap must map the caches where it maps scales or layer"),
        (["slot_mapping", "v_scale"], "vmap must map the caches where it maps scales or layer"),
        (["slot_mapping", "layer"], "vmap must map the caches where it maps scales or layer"),
        (
            ["key", "key_cache", "value_cache"],
            "key must have shape (num_tokens, num_heads, head_size), got (5, 48)",
        ),
    ],
    ids=str,
)
def test_vmap_that_cannot_be(mapped, message, rng):
    case = small(rng, num_layers=2, layer=1, kv_cache_dtype="fp8")
    key, value, caches, slots = tensors(case)
    arguments = {
        "key": key,
        "value": value,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slot_mapping": slots,
    }
    arguments |= {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(2.0), "layer": torch.tensor(1)}
    if message.startswith("key"):
        arguments["key"] = key.flatten(1)
    batched = {name: torch.stack([arguments[name]] * 2) for name in mapped}
    before = {name: from_torch(x).copy() for name, x in (arguments | batched).items() if "cache" in name}

    def write(batched):
        flash(**arguments | batched, kv_cache_dtype="fp8", layout=case.layout)
        return next(iter(batched.values()))

    with pytest.raises(ValueError) as error:  # noqa: PT011
        torch.vmap(write)(batched)
    assert str(error.value) == message
    for name, cache in before.items():
        assert_bits([(arguments | batched)[name]], [cache])


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

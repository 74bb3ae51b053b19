"""torchkv under torch.compile and torch.export: no copies, no recompilation."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.cases.arrays import from_torch, make_case, random_bits, run_oracle, to_torch, with_case
from tests.cases.torch_compile import assert_bits, assert_no_copies, compiled_code
from tests.cases.torch_writes import diffkv, flash, small, tensors
from torchkv import CacheLayout, PagedKVCache

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
@pytest.mark.parametrize("method", ["write", "attend", "read"])
@pytest.mark.parametrize("pattern", ["block head slot dim", "block head dim/x slot x, block head slot dim", "MLA"])
def test_a_cache_that_nothing_was_asked_of_is_compiled_once(pattern, method):
    """What a layout and a spec keep of themselves is there before torch.compile looks for it."""
    latent = pattern == "MLA"
    layout = CacheLayout("block slot latent" if latent else pattern)  # not one that other tests have used
    sizes = {"num_heads": 1, "head_size": 24, "head_size_v": 16} if latent else {"num_heads": 2, "head_size": 16}
    cache = PagedKVCache.create(num_blocks=4, block_size=4, dtype=torch.float32, layout=layout, **sizes)
    key, value = (torch.randn(3, 16), torch.randn(3, 8)) if latent else torch.randn(2, 3, 2, 16)
    slots, tables, lens = torch.tensor([4, 5, 6]), torch.tensor([[1]]), torch.tensor([3])
    query = torch.randn(1, 2, cache.head_size)

    def call():
        if method == "write":
            cache.write(key, value, slots)
        elif method == "attend":
            cache.attend(query, tables, lens)
        else:
            cache.read(slots)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    compiled()
    compiled()
    assert counter.frame_count == 1


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

"""torchkv.rope_and_cache under opcheck, FakeTensor, torch.compile, torch.export and vmap, and what autograd says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import torchkv
from tests.cases.arrays import from_torch, to_torch
from tests.cases.rope import CASES, run_oracle
from tests.cases.torch_compile import assert_no_copies, compiled_code
from tests.cases.torch_ropes import BY_NAME, assert_same, caches_of, fresh, op_arguments, rotate, run_torch
from torchkv._library import rope as _library
from torchkv._torch import rope as torch_rope

NAMES = ["norms", "mrope", "one array without a layout", "int8 by token and head of all layers", "MLA, fp8_e4m3"]
WAYS = ["new", "out", "in place"]


def plain(call):
    """The call without NaN: opcheck compares values, and finds NaN unequal to itself."""
    for cache in call.caches:
        cache[...] = 0
    call.query, call.key, call.value = (
        np.nan_to_num(x.astype(np.float32), nan=1).clip(-9, 9).astype(x.dtype)
        for x in (call.query, call.key, call.value)
    )
    return call


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, way):
    call = plain(BY_NAME[name].make())
    caches, more = caches_of(call), {}
    op = _library.rope_and_cache
    if way != "new":
        op, more = _library.rope_and_cache_out, {"out": torch.zeros_like(to_torch(call.query))}
    if way == "in place":
        more = {"out": fresh(call.query), "query": None}
    assert set(torch.library.opcheck(op, op_arguments(call, op, caches, **more)).values()) == {"SUCCESS"}


def test_schemas():
    options = (
        "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!)? value_cache, Tensor(c!)? k_scale_cache, "
        "Tensor(d!)? v_scale_cache, Tensor positions, Tensor cos_sin, Tensor slot_mapping, str rope, int? rotary_dim, "
        "int[]? mrope_section, Tensor? q_norm, Tensor? k_norm, float eps, str kv_cache_dtype, Tensor? k_scale, "
        "Tensor? v_scale, str? layout, str? scale_layout, SymInt? layer, Tensor? layer_index, str? backend"
    )
    assert str(_library.rope_and_cache._schema) == f"torchkv::rope_and_cache(Tensor query, {options}) -> Tensor"
    assert str(_library.rope_and_cache_out._schema) == (
        f"torchkv::rope_and_cache_out(Tensor(e!) out, Tensor? query, {options}) -> ()"
    )


def test_fake_tensors():
    call = BY_NAME["norms"].make()
    with FakeTensorMode() as mode:
        caches = [mode.from_tensor(cache) for cache in caches_of(call)]
        strided = mode.from_tensor(to_torch(call.query).transpose(0, 1).contiguous().transpose(0, 1))

        def run(_, *rest, **options):
            return torchkv.rope_and_cache(strided, *rest, **options)

        out = call(run, lambda array: mode.from_tensor(to_torch(array)), caches)
    assert (out.shape, out.dtype, out.is_contiguous()) == (call.query.shape, torch.bfloat16, True)


# ---- torch.compile


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_copies(name, way):
    call = BY_NAME[name].make()
    query, caches = fresh(call.query), caches_of(call)
    out = {"new": None, "out": torch.full_like(query, 7), "in place": query}[way]
    inputs = [fresh(x) for x in (call.key, call.value, call.positions, call.cos_sin, call.slot_mapping)]
    options = {n: fresh(x) if hasattr(x, "shape") else x for n, x in call.options.items()}
    scales = {n: options.pop(n) for n in ("k_scale", "v_scale")}
    scales = {n: torch.tensor(x) if isinstance(x, float) else x for n, x in scales.items()}

    def step(query, out, caches, key, value, *rest, **scales):
        return torchkv.rope_and_cache(query, key, value, caches, *rest, **options, **scales, out=out)

    code = compiled_code(lambda *arguments: step(*arguments, **scales), query, out, caches, *inputs)
    assert_no_copies(code.replace("rope_and_cache_out", "rope_and_cache"))
    want = run_oracle(call)
    assert_same(caches, want[1:])
    if out is not None:
        assert_same([out], want[:1])
    else:
        assert_same([torch.compile(step, fullgraph=True)(query, None, caches, *inputs, **scales)], want[:1])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", WAYS)
def test_compiled_with_slices_of_a_projection_and_views_of_a_cache(way):
    call = BY_NAME["KV_NHD"].make()
    qkv = torch.cat([fresh(x).flatten(1) for x in (call.query, call.key, call.value)], dim=1)
    (kv,) = caches_of(call)
    rest = [fresh(x) for x in (call.positions, call.cos_sin, call.slot_mapping)]

    def step(qkv, kv, *rest):
        query, key, value = (x.unflatten(1, (-1, 16)) for x in qkv.split([128, 32, 32], dim=1))
        out = {"new": None, "out": torch.empty_like(query), "in place": query}[way]
        return torchkv.rope_and_cache(query, key, value, kv.unbind(), *rest, rope="gptj", out=out)

    address, before = kv.data_ptr(), qkv.clone()
    code = compiled_code(step, qkv, kv, *rest)
    assert not re.search(r"clone|copy|cpp_|extern_kernels", code), code
    _, kv_want = want = run_oracle(call)
    assert_same([kv], [kv_want])
    assert kv.data_ptr() == address
    if way == "in place":
        assert_same([qkv[:, :128].unflatten(1, (8, 16))], want[:1])
        assert torch.equal(qkv[:, 128:].view(torch.int16), before[:, 128:].view(torch.int16))
    else:
        assert_same([torch.compile(step, fullgraph=True)(qkv, kv, *rest)], want[:1])
        assert torch.equal(qkv.view(torch.int16), before.view(torch.int16))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["norms", "mrope"])
def test_any_number_of_tokens_is_compiled_once(name):
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(torchkv.rope_and_cache, fullgraph=True, backend=counter)
    for tokens in (5, 7, 8, 13, 33):
        call = replace(BY_NAME[name], num_tokens=tokens, positions=None).make()
        caches = caches_of(call)
        assert_same([call(step, fresh, caches), *caches], run_oracle(call))
    assert counter.frame_count <= 2  # for the first number, and for all


@pytest.mark.usefixtures("compiler")
def test_bad_calls_fail_when_compiled():
    call = BY_NAME["norms"].make()
    call.key = call.key[:, :1]
    caches = caches_of(call)
    step = torch.compile(torchkv.rope_and_cache, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=re.escape("key must have shape (num_tokens, 2, 16), got (7, 1, 16)")):
        call(step, fresh, caches)
    assert_same(caches, call.caches)


def test_export():
    call, longer = BY_NAME["norms"].make(), BY_NAME["norms"].make(seed=1)

    class Layer(torch.nn.Module):
        def forward(self, query, key, value, key_cache, value_cache, positions, cos_sin, slots, q_norm, k_norm):
            return torchkv.rope_and_cache(
                query, key, value, (key_cache, value_cache), positions, cos_sin, slots, q_norm=q_norm, k_norm=k_norm,
                layout="NHD",
            )  # fmt: skip

    def inputs(call, caches):
        arrays = call.query, call.key, call.value
        rest = call.positions, call.cos_sin, call.slot_mapping, call.options["q_norm"], call.options["k_norm"]
        return (*map(fresh, arrays), *caches, *map(fresh, rest))

    tokens, caches = torch.export.Dim("tokens", min=2, max=512), caches_of(call)
    axes = [{0: tokens}] * 3 + [None] * 2 + [{0: tokens}, None, {0: tokens}, None, None]
    program = torch.export.export(Layer(), inputs(call, caches), dynamic_shapes=tuple(axes))
    assert_same(caches, call.caches)
    caches = caches_of(longer)
    assert_same([program.module()(*inputs(longer, caches)), *caches], run_oracle(longer))


# ---- vmap


def batch(name, size=3):
    """Calls that differ in all their numbers, with slots of their own."""
    calls = [BY_NAME[name].make(seed) for seed in range(size)]
    for call, slots in zip(calls, np.random.default_rng(0).permutation(40)[: size * 7].reshape(size, 7), strict=True):
        call.slot_mapping = slots
    return calls


def stacked(calls, name, dim=0):
    return torch.stack([to_torch(getattr(call, name)) for call in calls], dim)


ROWS = ["query", "key", "value", "positions", "slot_mapping"]


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", ["norms", "mrope"])
def test_vmap_with_caches_of_their_own(name, backend):
    calls = batch(name)
    caches = [torch.stack([to_torch(x) for x in arrays], 1) for arrays in zip(*[c.caches for c in calls], strict=True)]
    cos_sin, options = to_torch(calls[0].cos_sin), calls[0].options | {"backend": backend}
    options |= {n: None if options[n] is None else to_torch(options[n]) for n in ("q_norm", "k_norm")}
    for call in calls:
        call.options |= {n: calls[0].options[n] for n in ("q_norm", "k_norm")}

    def step(query, key, value, positions, slots, caches):
        return torchkv.rope_and_cache(query, key, value, caches, positions, cos_sin, slots, **options)

    out = torch.vmap(step, in_dims=(0, 1, 0, 0, 0, 1))(
        *[stacked(calls, n, int(n == "key")) for n in ROWS], caches
    )  # fmt: skip
    for i, call in enumerate(calls):
        assert_same([out[i], *(cache[:, i] for cache in caches)], run_oracle(call))


@pytest.mark.parametrize("name", ["norms", "mrope", "mrope, gptj, 8 of 40"])
@pytest.mark.parametrize("slots", [7, 4])
@pytest.mark.parametrize("mapped", [ROWS, ["positions", "slot_mapping"]], ids=["all", "no rows"])
def test_vmap_with_shared_caches_is_one_call(mapped, slots, name, monkeypatch):
    calls, seen = batch(name), []
    for call in calls:
        call.slot_mapping = call.slot_mapping[:slots]
        call.options, call.cos_sin = calls[0].options, calls[0].cos_sin
        for row in set(ROWS) - {*mapped}:
            setattr(call, row, getattr(calls[0], row))
    caches, cos_sin = caches_of(calls[0]), to_torch(calls[0].cos_sin)
    options = {n: to_torch(x) if hasattr(x, "shape") else x for n, x in calls[0].options.items()}
    write = torch_rope.write
    monkeypatch.setattr(torch_rope, "write", lambda *arguments: seen.append(write(*arguments)))
    rows = {n: to_torch(getattr(calls[0], n)) for n in ROWS}

    def step(given):
        x = rows | given
        return torchkv.rope_and_cache(
            x["query"], x["key"], x["value"], caches, x["positions"], cos_sin, x["slot_mapping"], **options
        )

    out = torch.vmap(step)({n: stacked(calls, n) for n in mapped})
    assert len(seen) == 1
    for i, call in enumerate(calls):
        for later in calls[i + 1 :]:
            later.caches = run_oracle(call)[1:]
        assert_same([out[i]], run_oracle(call)[:1])
    assert_same(caches, run_oracle(calls[-1])[1:])


def test_vmap_with_tables_of_their_own():
    calls = batch("neox, head_size 40")
    caches = caches_of(calls[0])
    for i, call in enumerate(calls):
        call.cos_sin = call.cos_sin * (i + 1)

    def step(query, key, value, positions, slots, cos_sin):
        return torchkv.rope_and_cache(query, key, value, caches, positions, cos_sin, slots)

    out = torch.vmap(step)(*[stacked(calls, n) for n in [*ROWS, "cos_sin"]])
    for i, call in enumerate(calls):
        assert_same([out[i]], run_oracle(call)[:1])


def test_vmap_into_given_tensors():
    calls = batch("neox, head_size 40")
    caches = caches_of(calls[0])
    cos_sin, rows = to_torch(calls[0].cos_sin), [stacked(calls, n) for n in ROWS]
    outs = torch.full_like(rows[0], 7)

    def step(query, key, value, positions, slots, out):
        return torchkv.rope_and_cache(query, key, value, caches, positions, cos_sin, slots, out=out)

    torch.vmap(step)(*rows, outs)
    for i, call in enumerate(calls):
        assert_same([outs[i]], run_oracle(call)[:1])
    torch.vmap(lambda query, *rest: step(query, *rest, query))(*rows)
    assert torch.equal(rows[0], outs)
    with pytest.raises(ValueError, match=r"^vmap must map the tensors that are given for results$"):
        torch.vmap(lambda *rows: step(*rows, outs[0]))(*rows)


@pytest.mark.parametrize(("mapped", "text"), [
    (["query", "positions"], "vmap must map slot_mapping where it does not map the caches"),
    (["slot_mapping", "value_cache"], "vmap must map all caches or none"),
])  # fmt: skip
def test_vmap_that_cannot_be(mapped, text):
    call = BY_NAME["neox, head_size 40"].make()
    given = {n: fresh(getattr(call, n)) for n in [*ROWS, "cos_sin"]}
    given |= dict(zip(("key_cache", "value_cache"), caches_of(call), strict=True))

    def step(batched):
        x = given | batched
        caches = x.pop("key_cache"), x.pop("value_cache")
        return torchkv.rope_and_cache(**x, caches=caches)

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        torch.vmap(step)({n: torch.stack([given[n]] * 2) for n in mapped})
    assert str(caught.value) == text


# ---- autograd


@pytest.mark.parametrize("name", ["query", "key", "value", "cos_sin", "q_norm"])
@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_gradients_are_refused(name, backend):
    call = BY_NAME["norms"].make()
    caches = caches_of(call)

    def run(query, key, value, caches, positions, cos_sin, slots, **options):
        given = {"query": query, "key": key, "value": value, "cos_sin": cos_sin} | options
        given[name] = given[name].requires_grad_()
        return torchkv.rope_and_cache(caches=caches, positions=positions, slot_mapping=slots, **given)

    text = "torchkv.rope_and_cache is not differentiable: detach its arguments, or call it under torch.no_grad()"
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        call(run, fresh, caches, backend=backend)
    assert_same(caches, call.caches)
    with torch.no_grad():
        assert_same([call(run, fresh, caches, backend=backend), *caches], run_oracle(call))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_what_is_written_has_a_new_version(backend):
    call = BY_NAME["norms"].make()
    caches, out = caches_of(call), torch.empty_like(to_torch(call.query))
    before = [x._version for x in (out, *caches)]
    rotate(call, caches, out=out, backend=backend)
    assert all(x._version > version for x, version in zip((out, *caches), before, strict=True))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_inference_mode(backend):
    call = CASES[1].make()
    outside = caches_of(call)
    with torch.inference_mode():
        assert_same(run_torch(call, backend=backend), run_oracle(call))
        assert_same([rotate(call, outside, backend=backend), *outside], run_oracle(call))
        inside = caches_of(call)
        inside = [cache.clone() for cache in inside]
    out = rotate(call, inside, backend=backend)  # tensors of inference, written outside of it
    assert not out.is_inference()
    assert_same([out, *inside], run_oracle(call))
    assert from_torch(out).shape == call.query.shape

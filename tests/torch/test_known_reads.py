"""Reads and rotations like earlier ones are launched without torch's dispatcher: seen on CPU tensors."""

import pytest
import torch

import torchkv
from tests.cases.torch_known import versions
from torchkv._triton import attention as _attention

# ---- reading


def read_operands(dtype=torch.float32, tokens=2):
    generator = torch.Generator().manual_seed(0)
    query, key_cache, value_cache = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, 4, 16), (6, 4, 2, 16), (6, 4, 2, 16))
    )
    tables = torch.tensor([[1, 5, 2], [3, 0, 4]])
    return query, (key_cache, value_cache), tables, torch.tensor([9, 4])


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_attention(seen):
    query, caches, tables, lens = read_operands()
    for dispatched in (1, 0, 0):
        query = query.clone()  # at another address
        got = torchkv.paged_attention(query, caches, tables, lens, return_lse=True)
        assert seen.ways() == (dispatched, 1)
        want = torchkv.paged_attention(query, caches, tables, lens, return_lse=True, backend="torch")
        seen.ways()
        same(got, want)
    for options in (dict(causal=False), dict(scale=1.0), dict(soft_cap=1.0), dict(sinks=torch.zeros(4))):
        for dispatched in (1, 0):
            torchkv.paged_attention(query, caches, tables, lens, **options)
            assert seen.ways() == (dispatched, 1)
    torchkv.paged_attention(query[:1], caches, tables[:1], lens[:1])
    assert seen.ways() == (1, 1)
    torchkv.paged_attention(query, caches, tables, lens)
    torchkv.paged_attention(query[:1], caches, tables[:1], lens[:1])
    assert seen.ways() == (0, 2)


def test_split_attention(seen, monkeypatch):
    plan_attention = _attention.plan_attention
    monkeypatch.setattr(plan_attention, "choose_splits", lambda *_: 2)
    monkeypatch.setattr(plan_attention, "plan_attention", plan_attention.plan_attention.__wrapped__)
    query, caches, tables, lens = read_operands()
    want = torchkv.paged_attention(query, caches, tables, lens, sinks=torch.ones(4), return_lse=True)
    got = torchkv.paged_attention(query, caches, tables, lens, sinks=torch.ones(4), return_lse=True)
    assert seen.ways() == (1, 4)
    assert [kernel.name for kernel, _ in seen.compiled] == ["merge_attention_kernel", "paged_attention_kernel"]
    same(got, want)


def test_gather(seen):
    _, caches, tables, lens = read_operands()
    want = torchkv.gather_kv(caches, tables, lens, 11)
    got = torchkv.gather_kv(tuple(c.clone() for c in caches), tables, lens, 11)
    assert seen.ways() == (1, 2)
    same(got, want)
    torchkv.gather_kv(caches, tables, lens, 10)
    assert seen.ways() == (1, 1)


def test_scales_of_layers(seen):
    query, caches, tables, lens = read_operands()
    layers = [torch.stack([c, c * 0.5, -c]).to(torch.float8_e4m3fn) for c in caches]
    k_scale, v_scale = torch.tensor([[0.5], [2.0], [3.0]]), torch.tensor([[1.5, 0.25], [3.0, 0.5], [0.1, 0.2]])
    options = dict(layout="layer block slot head dim", kv_cache_dtype="fp8")
    for i, layer in enumerate((2, 1, 0, 2, 1)):
        more = options | dict(k_scale=k_scale, v_scale=v_scale, layer=layer)
        got = torchkv.paged_attention(query, layers, tables, lens, **more)
        assert seen.ways() == (i < 3, 1)
        alone = options | dict(k_scale=k_scale[layer], v_scale=v_scale[layer], layer=layer)
        torch.testing.assert_close(got, torchkv.paged_attention(query, layers, tables, lens, backend="torch", **alone))
        seen.ways()
    assert len(seen.compiled) == 1


@pytest.mark.parametrize("op", ["attention", "gather"])
def test_into_given_tensors(op, seen):
    query, caches, tables, lens = read_operands()

    def call(**results):
        if op == "attention":
            return torchkv.paged_attention(query, caches, tables, lens, return_lse=True, **results)
        return torchkv.gather_kv(caches, tables, lens, 11, **results)

    def given(out, lse):
        return {"out": out, "lse": lse} if op == "attention" else {"out": (out, lse)}

    want = call()
    seen.ways()
    results = [torch.full_like(t, 7) for t in want]
    for dispatched in (1, 0, 0):
        got = call(**given(*results))
        assert all(a is b for a, b in zip(got, results, strict=True))
        assert seen.ways() == (dispatched, 1)
        same(got, want)
    assert versions(results) == [2, 2]  # of the known ones: the fixture's kernel does not tell
    if op == "attention":
        with pytest.raises(ValueError, match="out and query must not overlap in memory"):
            call(**given(query, results[1]))
    with pytest.raises(ValueError, match=r"out(\[0\])? must have shape"):
        call(**given(results[0][:1], results[1]))


def test_one_scale_for_keys_and_values(seen):
    query, caches, tables, lens = read_operands()
    caches, scale = tuple(c.to(torch.float8_e4m3fn) for c in caches), torch.tensor(0.5)
    for scales, dispatched in (((scale, scale), 1), ((scale, scale), 0), ((scale, scale.clone()), 1)):
        got = torchkv.paged_attention(
            query, caches, tables, lens, kv_cache_dtype="fp8", k_scale=scales[0], v_scale=scales[1]
        )
        assert seen.ways() == (dispatched, 1)
    got = torchkv.paged_attention(query, caches, tables, lens, kv_cache_dtype="fp8", k_scale=scale, v_scale=scale)
    half = torchkv.paged_attention(query * 0.5, caches, tables, lens, kv_cache_dtype="fp8") * 0.5
    torch.testing.assert_close(got, half)


@pytest.mark.parametrize("op", ["attention", "gather"])
def test_a_layer_in_memory(op, seen):
    query, caches, tables, lens = read_operands()
    caches = tuple(torch.stack([c, c + 1, c + 2], 1) for c in caches)
    index = torch.arange(3)

    def call(layer, **options):
        options |= {"layout": "block layer slot head dim", "layer": layer}
        if op == "attention":
            return torchkv.paged_attention(query, caches, tables, lens, return_lse=True, **options)
        return torchkv.gather_kv(caches, tables, lens, 11, **options)

    for i, layer in enumerate((1, 2, 0)):  # of which one begins at a multiple of 16
        got = call(index[layer])
        assert seen.ways() == (i < 1, 1)
        same(got, call(layer, backend="torch"))
        seen.ways()


def test_gradients_are_refused_every_time(seen):
    query, caches, tables, lens = read_operands()
    torchkv.paged_attention(query, caches, tables, lens)
    seen.ways()
    query.requires_grad_()
    for dispatched in (1, 0):
        with torch.no_grad():
            torchkv.paged_attention(query, caches, tables, lens)
        assert seen.ways() == (dispatched, 1)
    with pytest.raises(NotImplementedError, match=r"torchkv\.paged_attention is not differentiable"):
        torchkv.paged_attention(query, caches, tables, lens)
    query.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match=r"torchkv\.paged_attention is not differentiable"):
            torchkv.paged_attention(dual, caches, tables, lens)
    assert not seen.started


# ---- rotating


def rotate(query, caches, out=None, tokens=None, **options):
    key, value = (query[:, i : i + 2].clone(memory_format=torch.contiguous_format) for i in (0, 2))
    positions, slots = torch.arange(len(query)) + 1, torch.arange(len(query))[:tokens] + 5
    angles = torch.arange(20.0)[:, None] * torch.arange(1.0, 9.0) / 8
    table = torch.cat([angles.cos(), angles.sin()], -1)
    return torchkv.rope_and_cache(query, key, value, caches, positions, table, slots, rope="neox", out=out, **options)


def test_one_scale_for_rotated_keys_and_values(seen):
    query, scale = torch.randn(4, 4, 16), torch.tensor(0.5)
    for k_scale, v_scale, dispatched in ((scale, scale, 1), (scale.clone(),) * 2 + (0,), (scale, scale.clone(), 1)):
        caches, wanted = (tuple(torch.full((6, 4, 2, 16), 7, dtype=torch.uint8) for _ in "kv") for _ in range(2))
        options = dict(kv_cache_dtype="fp8", k_scale=k_scale, v_scale=v_scale)
        rotate(query, wanted, backend="torch", **options)
        seen.ways()
        rotate(query, caches, **options)
        assert seen.ways() == (dispatched, 1)
        assert all(map(torch.equal, caches, wanted))


@pytest.mark.parametrize("out", [None, "query", "another"])
def test_rotations(out, seen):
    for tokens, written, dispatched in ((4, 4, 1), (4, 4, 0), (3, 2, 0), (0, 0, 0), (6, 5, 0)):
        query = torch.randn(tokens, 4, 16)
        caches, wanted = (tuple(torch.full((6, 4, 2, 16), 7.0) for _ in "kv") for _ in range(2))
        want = rotate(query.clone(), wanted, tokens=written, backend="torch")
        seen.ways()
        result = {None: None, "query": query, "another": torch.empty_like(query)}[out]
        got = rotate(query, caches, out=result, tokens=written)
        assert result is None or got is result
        assert seen.ways() == (dispatched, int(tokens > 0))
        same((got, *caches), (want, *wanted))

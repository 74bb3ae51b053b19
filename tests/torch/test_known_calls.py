"""Calls like earlier ones are launched without torch's dispatcher, and only these: seen on CPU tensors."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchkv
from tests.cases.arrays import from_torch, run_oracle, to_torch, with_case
from tests.cases.launches import OnHost
from tests.cases.torch_compile import assert_bits
from tests.cases.torch_writes import small, tensors
from torchkv._library import base
from torchkv._library import read as _read_ops
from torchkv._library import rope as _rope_ops
from torchkv._library import write as _write_ops
from torchkv._triton import read as _read
from torchkv._triton import rope as _rope
from torchkv._triton import write as _write


def ops():
    """Each op with what makes a call of its arguments, new launches, and its other backends."""
    write, read, rope = _write_ops, _read_ops, _rope_ops
    for op, call_of in (
        (write.flash, write._flash_call),
        (write.diffkv, write._diffkv_call),
        (write.flash_quant, write._flash_quant_call),
        (write.mla, write._mla_call),
    ):
        yield op, call_of, _write.Writes(), write._BACKENDS
    yield read.attention, read._attention_call, _read.attention_launches(), read._ATTENTION_BACKENDS
    yield read.attention_out, read._attention_out_call, _read.attention_out_launches(), read._ATTENTION_BACKENDS
    yield read.gather, read._gather_call, _read.gather_launches(), read._GATHER_BACKENDS
    yield read.gather_out, read._gather_out_call, _read.gather_out_launches(), read._GATHER_BACKENDS
    yield rope.rope_and_cache, rope._call, _rope.Rotations(out=False), rope._BACKENDS
    yield rope.rope_and_cache_out, rope._out_call, _rope.Rotations(out=True), rope._BACKENDS


class Seen(OnHost):
    """Launches on the host, and the ops that torch's dispatcher called."""

    def __init__(self, monkeypatch, library):
        super().__init__(monkeypatch)
        self.dispatched = []
        for each in ops():
            self.register(monkeypatch, library, *each)

    def register(self, monkeypatch, library, op, call_of, launches, backends):
        """Makes the op's kernel for CPUs do what the one for GPUs does."""
        name, returns = op._schema.name.removeprefix("torchkv::"), bool(op._schema.returns)
        defaults = [parameter.default_value for parameter in op._schema.arguments]

        def on_host(*arguments):
            arguments = (*arguments, *defaults[len(arguments) :])
            self.dispatched.append(name)
            results = launches.again(arguments)
            if results is None:
                call = call_of(*arguments)
                other = call.backend == "torch"
                results = backends.torch(call.check(), call) if other else launches.first(call, arguments)
            return results if returns else None

        library.impl(name, on_host, "CPU", allow_override=True)
        monkeypatch.setitem(base._again, op, launches.again)

    def ways(self):
        """How often the dispatcher was asked since the last time, and how many kernels were started."""
        counts = len(self.dispatched), len(self.started)
        self.dispatched.clear()
        self.started.clear()
        return counts


@pytest.fixture
def seen(monkeypatch):
    library = torch.library.Library("torchkv", "IMPL")
    yield Seen(monkeypatch, library)
    library._destroy()


WRITES = {
    "two arrays": dict(),
    "one array": dict(layout="PACKED_NHD"),
    "a layer": dict(num_layers=3, layer=2),
    "fp8": dict(kv_cache_dtype="fp8", scales=(0.5, 3.0)),
    "int8, a scale a token and head": dict(kv_cache_dtype="int8", per_token_head=True),
}


def write(case, key, value, memory, slots, scales, **options):
    if case.scale_caches:
        op = torchkv.reshape_and_cache_flash_per_token_head_quant
        op(key, value, *memory, slots, case.kv_cache_dtype, layout=case.layout, layer=case.layer, **options)
    else:
        op = torchkv.reshape_and_cache_flash_diffkv if case.layout.single_array else torchkv.reshape_and_cache_flash
        options = {"layout": case.layout, "layer": case.layer} | options
        op(key, value, *memory, slots, case.kv_cache_dtype, *scales, **options)


def operands(case, tokens=None):
    memory = [to_torch(array.copy()) for array in (*case.caches, *(case.scale_caches or ()))]
    key, value, _, slots = tensors(case)
    return key, value, memory, slots[:tokens]


@pytest.mark.parametrize("name", WRITES)
def test_writes(name, seen, rng):
    case = small(rng, **WRITES[name])
    scales = [None if s is None else torch.tensor(s) for s in (case.k_scale, case.v_scale)]
    for tokens, dispatched in ((5, 1), (5, 0), (3, 0), (0, 0), (5, 0)):
        key, value, memory, slots = operands(case, tokens)  # others each time
        write(case, key, value, memory, slots, scales)
        assert seen.ways() == (dispatched, int(tokens > 0))
        assert_bits(memory, run_oracle(with_case(case, slot_mapping=from_torch(slots))))
    assert len(seen.compiled) == 1


def test_writes_to_each_layer(seen, rng):
    case = small(rng, num_layers=3, layer=0)
    key, value, memory, slots = operands(case)
    wanted = case.caches
    for i, layer in enumerate((0, 1, 2, 1, 0)):
        torchkv.reshape_and_cache_flash(key, value, *memory, slots, layout=case.layout, layer=layer)
        assert seen.ways() == (i < 3, 1)
        wanted = run_oracle(with_case(case, caches=wanted, layer=layer))
    assert_bits(memory, wanted)
    index = torch.arange(3)
    for i, layer in enumerate((index[1], index[2], index[0])):  # of other alignments
        torchkv.reshape_and_cache_flash(key, value, *memory, slots, layout=case.layout, layer=layer)
        assert seen.ways() == (i < 1, 1)
        wanted = run_oracle(with_case(case, caches=wanted, layer=int(layer)))
    assert_bits(memory, wanted)
    with pytest.raises(ValueError, match="layer must be at least 0 and below 3, got 3"):
        torchkv.reshape_and_cache_flash(key, value, *memory, slots, layout=case.layout, layer=3)


def test_latent_rows(seen, rng):
    cache, rows = torch.zeros(3, 4, 48), torch.randn(2, 48)
    for part in (32, 32, 48, 48):  # 48: without a rotary part, the op splits the row
        cache.fill_(7)
        torchkv.concat_and_cache_mla(*(rows.tensor_split([part], 1)), cache, torch.tensor([5, 0]))
        assert torch.equal(cache.view(12, 48)[[5, 0]], rows)
        assert (cache.view(12, 48)[1:5] == 7).all()
    assert len(seen.dispatched) == 3
    assert len(seen.started) == 4


# ---- what is not known


def strided(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


def moved(tensor):
    """A copy whose address is no multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


OTHERS = {
    "strides": (strided, lambda v: v, lambda c: c),
    "strides of a cache": (lambda k: k, lambda v: v, lambda c: torch.stack([c, c], 1)[:, 0]),
    "an address": (moved, lambda v: v, lambda c: c),
    "an address of a cache": (lambda k: k, lambda v: v, moved),
    "gradients": (lambda k: k.requires_grad_(), lambda v: v, lambda c: c),
    "blocks": (lambda k: k, lambda v: v, lambda c: torch.cat([c, c[:1]])),
    "one tensor twice": (lambda k: k, None, lambda c: c),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors(name, seen, rng):
    case = small(rng, dtype="float32")
    key, value, memory, slots = operands(case)
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    of_key, of_value, of_cache = OTHERS[name]
    key, value, memory, slots = operands(case)
    key, memory = of_key(key), [of_cache(c) for c in memory]
    value = key if of_value is None else of_value(value)
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    assert seen.ways() == (2, 2)
    wanted = with_case(case, value=from_torch(value), caches=[from_torch(of_cache(to_torch(c))) for c in case.caches])
    assert_bits(memory, run_oracle(wanted))


def test_bad_calls_like_a_good_one(seen, rng):
    case = small(rng, kv_cache_dtype="fp8", scales=(0.5, 3.0))
    key, value, memory, slots = operands(case)
    scale = torch.tensor(0.5)
    torchkv.reshape_and_cache_flash(key, value, *memory, slots, "fp8", scale, scale)
    seen.ways()
    more = torch.cat([slots, slots])
    for arguments, error, message in (
        ((key, value[:3], *memory, slots, "fp8"), ValueError, "value must have shape (5, "),
        ((key, value, *memory, more, "fp8"), ValueError, "slot_mapping must have at most num_tokens = 5 "),
        ((key, value, *memory, slots.float(), "fp8"), TypeError, "slot_mapping must have dtype int32 or int64"),
        ((key, value, memory[0], memory[0], slots, "fp8"), ValueError, "key_cache and value_cache must not overlap"),
        ((key, value, *memory, slots.tolist(), "fp8"), TypeError, "slot_mapping must be a torch.Tensor, got list"),
        ((key, value, *memory, slots, "fp8", torch.ones(2)), ValueError, "k_scale must have shape"),
    ):
        with pytest.raises(error) as caught:
            torchkv.reshape_and_cache_flash(*arguments)
        assert str(caught.value).startswith(message)
    assert not seen.started


def test_overlaps_are_seen_every_time(seen, rng):
    case = small(rng)
    key, value, memory, slots = operands(case)

    def views(distance):  # interleaved, of the same strides whatever the distance
        rows = torch.zeros(16, *memory[0].shape, dtype=torch.bfloat16).movedim(0, -1)
        return rows[..., 0], rows[..., distance]

    for i, distance in enumerate((8, 8, 8)):
        first, second = views(distance)
        torchkv.reshape_and_cache_flash(key, value, first, second, slots)
        assert seen.ways() == (i < 1, 1)
    first, _ = views(8)
    with pytest.raises(ValueError, match="key_cache and value_cache must not overlap in memory"):
        torchkv.reshape_and_cache_flash(key, value, first, first.view(first.shape), slots)


# ---- what torch wants to see


class Dispatch(TorchDispatchMode):
    ops = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops = (*self.ops, func)
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    ops = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops = (*self.ops, func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    ops = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.ops = (*cls.ops, func)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def known(seen, rng):
    """A function that writes, its arguments, and a check of what it wrote; it was called before."""
    case = small(rng)
    key, value, memory, slots = operands(case)
    arguments = (key, value, *memory, slots)
    torchkv.reshape_and_cache_flash(*arguments)
    torchkv.reshape_and_cache_flash(*arguments)
    assert seen.ways() == (1, 2)
    for cache, array in zip(memory, case.caches, strict=True):
        cache.copy_(to_torch(array))

    def check():
        assert_bits(memory, run_oracle(case))

    return torchkv.reshape_and_cache_flash, arguments, check


@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_modes_see_the_op(mode, known, seen):
    function, arguments, check = known
    with mode() as entered:
        function(*arguments)
    assert seen.ways() == (1, 1)
    assert _write_ops.flash in entered.ops
    check()


def test_subclasses_see_the_op(known, seen):
    function, (key, *others), check = known
    function(key.as_subclass(Subclass), *others)
    assert _write_ops.flash in Subclass.ops
    assert seen.ways() == (1, 1)
    check()


def test_fake_tensors(known, seen):
    function, arguments, _ = known
    with FakeTensorMode() as mode:
        function(*map(mode.from_tensor, arguments))
        with pytest.raises(Exception, match="convert all Tensors to FakeTensors first"):
            function(*arguments)
    assert seen.ways() == (0, 0)


def test_vmap(known, seen):
    function, (key, value, *caches, slots), _ = known
    keys, others = torch.stack([key, key + 1]), torch.stack([slots, slots + 10])
    torch.vmap(lambda k, s: (function(k, value, *caches, s), s)[1])(keys, others)
    assert seen.dispatched == ["reshape_and_cache_flash"]
    torch.vmap(lambda x: (function(key, value, *caches, slots + x), x)[1])(torch.arange(2))
    assert len(seen.dispatched) == 2

    def not_mapped(x):
        function(key, value, *caches, slots)
        return x

    torch.vmap(not_mapped)(torch.arange(2))
    assert len(seen.dispatched) == 3


@pytest.mark.parametrize("transform", ["jvp", "make_fx", "trace"])
def test_transforms(transform, known, seen):
    function, (key, *others), _ = known

    def step(key):
        function(key, *others)
        return key + 0

    if transform == "jvp":
        torch.func.jvp(step, (key,), (torch.ones_like(key),))
    elif transform == "make_fx":
        graph = make_fx(step)(key)
        assert "torchkv.reshape_and_cache_flash" in graph.code
    else:
        torch.jit.trace(step, (key,), check_trace=False)
    assert len(seen.dispatched) == 1


def test_compiled_code_calls_the_op(known, seen):
    function, arguments, check = known
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    assert any(node.target is _write_ops.flash for node in graphs[0].graph.nodes)
    assert seen.ways() == (1, 1)
    check()


def test_profiles_show_the_op(known, seen):
    function, arguments, _ = known
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments)
    assert "torchkv::reshape_and_cache_flash" in {event.key for event in profile.key_averages()}
    assert seen.ways() == (1, 1)
    function(*arguments)
    assert seen.ways() == (0, 1)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_contexts_that_are_known_in_themselves(context, known, seen):
    function, arguments, check = known
    with context():
        function(*arguments)
        function(*arguments)
    assert seen.ways() == (1, 2)
    function(*arguments)
    assert seen.ways() == (0, 1)
    check()


def test_autograd_is_told_of_known_writes(monkeypatch, rng):
    """The launch itself is left out."""
    monkeypatch.setattr(_write.Writes, "again", lambda *_: ())
    key, value, memory, slots = operands(small(rng))
    versions = [cache._version for cache in memory]
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    assert [cache._version for cache in memory] == [version + 1 for version in versions]
    assert key._version == 0


def test_no_tensor_is_kept(seen, rng):
    case = small(rng)
    key, value, memory, slots = operands(case)
    kept = [weakref.ref(tensor) for tensor in (key, value, *memory, slots)]
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    seen.ways()
    del key, value, memory, slots
    gc.collect()
    assert [tensor() for tensor in kept] == [None] * 5


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
    plan_attention = _read.plan_attention
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


def test_gradients_are_refused_every_time(seen):
    query, caches, tables, lens = read_operands()
    torchkv.paged_attention(query, caches, tables, lens)
    with torch.no_grad():
        torchkv.paged_attention(query.requires_grad_(), caches, tables, lens)
    seen.ways()
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
        assert seen.ways() == (dispatched if tokens else int(out == "another"), int(tokens > 0))
        same((got, *caches), (want, *wanted))

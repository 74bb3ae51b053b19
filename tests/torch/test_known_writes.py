"""Writes like earlier ones are launched without torch's dispatcher, and only these: seen on CPU tensors."""

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
from tests.cases.torch_compile import assert_bits
from tests.cases.torch_known import versions
from tests.cases.torch_writes import small, tensors
from torchkv._library import write as _write_ops
from torchkv._triton import known as _known

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


@pytest.mark.parametrize("layout", ["NHD", "PACKED_NHD"])
def test_one_scale_for_keys_and_values(layout, seen, rng):
    case = small(rng, layout=layout, kv_cache_dtype="fp8", scales=(0.5, 0.5))
    scale = torch.tensor(0.5)
    for scales, dispatched in (([scale] * 2, 1), ([scale.clone()] * 2, 0), ([scale, scale.clone()], 1)):
        key, value, memory, slots = operands(case)
        write(case, key, value, memory, slots, scales)
        assert seen.ways() == (dispatched, 1)
        assert_bits(memory, run_oracle(case))


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


@pytest.mark.parametrize("granularity", ["layer", "layer and head"])
def test_scales_of_layers(granularity, seen, rng):
    """One launch for all layers: it finds each layer's own."""
    case = small(rng, num_layers=3, layer=0, kv_cache_dtype="fp8", scales=granularity)
    key, value, memory, slots = operands(case)
    scales, index = [torch.from_numpy(s) for s in (case.k_scale, case.v_scale)], torch.arange(3)
    wanted = case.caches
    for i, layer in enumerate((0, 1, 2, 1, 0, index[1], index[2], index[0])):
        write(case, key, value, memory, slots, scales, layer=layer)
        assert seen.ways() == (i < 3 or i == 5, 1)
        wanted = run_oracle(with_case(case, caches=wanted, layer=int(layer)))
        assert_bits(memory, wanted)
    assert len(seen.compiled) == 2


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


def test_autograd_is_told_of_known_writes(known, seen):
    function, (key, value, *caches, slots), _ = known
    before = versions(caches)
    function(key, value, *caches, slots)
    assert seen.ways() == (0, 1)
    assert versions(caches) == [version + 1 for version in before]
    assert versions((key, value, slots)) == [0, 0, 0]


@pytest.mark.parametrize("inference", [(), (0,), (0, 1)])
def test_caches_made_in_inference_mode(inference, seen, rng):
    case = small(rng)
    key, value, memory, slots = operands(case)
    with torch.inference_mode():
        for i in inference:
            memory[i] = memory[i].clone()
    for dispatched in (1, 0):
        torchkv.reshape_and_cache_flash(key, value, *memory, slots)
        assert seen.ways() == (dispatched, 1)
    assert [c._version for i, c in enumerate(memory) if i not in inference] == [1] * (2 - len(inference))
    assert_bits(memory, run_oracle(case))


def test_versions_rise_in_inference_mode(seen, rng):
    """Guards take tensors made in inference mode, outside it, for others within it, which have versions."""
    case = small(rng)
    with torch.inference_mode():
        key, value, memory, slots = operands(case)
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    assert seen.ways() == (1, 1)
    key, value, memory, slots = operands(case)
    with torch.inference_mode():
        for dispatched in (1, 0):
            torchkv.reshape_and_cache_flash(key, value, *memory, slots)
            assert seen.ways() == (dispatched, 1)
    assert versions(memory) == [1, 1]  # by the known one; of the first, it is the op that tells


def test_calls_that_never_come_back_are_forgotten(monkeypatch):
    monkeypatch.setattr(_known, "MOST_LAUNCHES", 16)
    calls, tensors = _known.KnownCalls(), (torch.zeros(4), torch.zeros(4))
    for i in range(100):
        calls.add((*tensors, i), tensors, lambda i=i: i, aligned=1)
    found = [i for i in range(100) if calls.find((*tensors, i))]
    assert len(found) <= 16
    assert found[-1] == 99


def test_no_tensor_is_kept(seen, rng):
    case = small(rng)
    key, value, memory, slots = operands(case)
    kept = [weakref.ref(tensor) for tensor in (key, value, *memory, slots)]
    torchkv.reshape_and_cache_flash(key, value, *memory, slots)
    seen.ways()
    del key, value, memory, slots
    gc.collect()
    assert [tensor() for tensor in kept] == [None] * 5

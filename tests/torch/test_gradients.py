"""Reading a cache drops no gradient in silence: it raises where autograd follows an argument, however it is called."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import torchkv

MESSAGE = "torchkv.{} is not differentiable: detach its arguments, or call it under torch.no_grad()"


def arguments(kv_cache_dtype="auto"):
    torch.manual_seed(0)
    caches = [torch.randn(6, 4, 2, 16) for _ in range(2)]
    scales = {}
    if kv_cache_dtype == "int8 of each head":
        caches, scales = [c.mul(9).to(torch.int8) for c in caches], {"kv_cache_dtype": "int8"}
        scales |= {"k_scale": torch.rand(6, 4, 2), "v_scale": torch.rand(6, 4, 2)}
    elif kv_cache_dtype != "auto":
        caches, scales = [c.mul(9).to(torch.int8) for c in caches], {"kv_cache_dtype": kv_cache_dtype}
        scales |= {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor([0.5, 2.0])}
    return {
        "query": torch.randn(2, 4, 16),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_tables": torch.tensor([[0, 3], [5, 1]]),
        "seq_lens": torch.tensor([5, 7]),
        "sinks": torch.randn(4),
        **scales,
    }


def function(op, x, **more):
    """The public function, as attention or as a gather."""
    x = x | more
    caches = [x.pop("key_cache"), x.pop("value_cache")]
    if op == "paged_attention":
        return torchkv.paged_attention(caches=caches, return_lse=True, **x)
    x = {n: a for n, a in x.items() if n not in ("query", "sinks")}
    return torchkv.gather_kv(caches, max_len=8, **x)


def torch_op(op, x, **more):
    """The same by torch.ops."""
    x = {"kv_cache_dtype": "auto", "k_scale": None, "v_scale": None, "layout": None, "backend": None} | x | more
    x |= {"layer": None, "layer_index": None, "head_size_v": None}
    x["caches"] = [x.pop("key_cache"), x.pop("value_cache")]
    if op == "paged_attention":
        options = {"query_start_loc": None, "scale": None, "causal": True, "sliding_window": None, "soft_cap": None}
        return torch.ops.torchkv.paged_attention(**x, **options)
    x = {n: a for n, a in x.items() if n not in ("query", "sinks")}
    return torch.ops.torchkv.gather_kv(**x, max_len=8, dtype=None, head_size=None)


WAYS = {"function": function, "torch.ops": torch_op}
FOLLOWED = [
    ("paged_attention", "query", "auto"),
    ("paged_attention", "key_cache", "auto"),
    ("paged_attention", "value_cache", "auto"),
    ("paged_attention", "sinks", "auto"),
    ("paged_attention", "k_scale", "int8"),
    ("paged_attention", "v_scale", "int8"),
    ("paged_attention", "k_scale", "int8 of each head"),
    ("gather_kv", "key_cache", "auto"),
    ("gather_kv", "value_cache", "auto"),
    ("gather_kv", "k_scale", "int8"),
    ("gather_kv", "v_scale", "int8 of each head"),
]


def follow(x, name):
    """One of the arguments requires gradients, as something that was computed."""
    return x | {name: x[name] * torch.ones((), requires_grad=True)}


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def raises(op):
    return pytest.raises(NotImplementedError, match=re.escape(MESSAGE.format(op)) + "$")


@pytest.mark.parametrize("backend", [None, "interpret"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "name", "kv_cache_dtype"), FOLLOWED)
def test_what_requires_gradients_is_refused(op, name, kv_cache_dtype, way, backend):
    x = arguments(kv_cache_dtype)
    followed = follow(x, name)
    with raises(op):
        WAYS[way](op, followed, backend=backend)
    with torch.no_grad():
        want = WAYS[way](op, followed, backend=backend)
    with torch.inference_mode():
        WAYS[way](op, followed, backend=backend)
    got = WAYS[way](op, followed | {name: followed[name].detach()}, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "name", "kv_cache_dtype"), FOLLOWED[::2])
def test_fake_tensors_that_require_gradients_are_refused(op, name, kv_cache_dtype, way):
    with FakeTensorMode() as mode:
        x = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in arguments(kv_cache_dtype).items()}
        assert not WAYS[way](op, x)[0].requires_grad
        with raises(op):
            WAYS[way](op, follow(x, name))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "name", "kv_cache_dtype"), [FOLLOWED[0], FOLLOWED[7]])
def test_compiled_functions_refuse_them(op, name, kv_cache_dtype, way, fullgraph):
    weight = torch.ones((), requires_grad=True)
    call = WAYS[way]

    def straight(x):
        return call(op, x)

    def computed(x):
        return call(op, x | {name: x[name] * weight})

    for function, x in (
        (straight, follow(arguments(kv_cache_dtype), name)),
        (computed, arguments(kv_cache_dtype)),
    ):
        compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
        with pytest.raises(Exception, match=re.escape(MESSAGE.format(op))) as error:
            compiled(x)
        # Without a graph break, dynamo wraps every error in one of its own.
        assert isinstance(error.value, NotImplementedError) or fullgraph
        with torch.no_grad():
            compiled(x)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("way", "backend"), [("function", "aot_eager"), ("torch.ops", "aot_eager"), ("torch.ops", "inductor")]
)
@pytest.mark.parametrize("op", ["paged_attention", "gather_kv"])
def test_compiled_beside_gradients(op, way, backend):
    """What is detached inside a compiled function stays so in its backward graph, and in what inductor makes of it."""
    call, x = WAYS[way], arguments()
    name = "query" if op == "paged_attention" else "key_cache"

    def detached(weight):
        scaled = x[name] * weight
        return sum(a.nan_to_num(neginf=0).sum() for a in call(op, x | {name: scaled.detach()})) + scaled.sum()

    def without(weight):
        scaled = x[name] * weight
        with torch.no_grad():
            out = call(op, x | {name: scaled})
        return sum(a.nan_to_num(neginf=0).sum() for a in out) + scaled.sum()

    def only(followed):
        with torch.no_grad():
            return call(op, x | {name: followed})

    for function in (detached, without):
        weight = torch.full((), 2.0, requires_grad=True)
        torch.compile(function, fullgraph=True, backend=backend)(weight).backward()
        torch.testing.assert_close(weight.grad, x[name].sum())
    torch.compile(only, fullgraph=True, backend=backend)(x[name].clone().requires_grad_())


def test_transforms_of_torch_func_are_refused():
    x = arguments()
    query = x["query"]

    def loss(query):
        return function("paged_attention", x | {"query": query})[0].sum()

    batch = torch.stack([query, query + 1])
    for transformed in (
        lambda: torch.func.grad(loss)(query),
        lambda: torch.func.vjp(loss, query),
        lambda: torch.func.jvp(loss, (query,), (query,)),
        lambda: torch.func.vmap(torch.func.grad(loss))(batch),
        lambda: torch.func.grad(lambda q: torch.func.vmap(loss)(q).sum())(batch),
        lambda: torch.func.jvp(torch.func.vmap(loss), (batch,), (batch,)),
        lambda: torch.func.vmap(loss)(batch.requires_grad_()),
    ):
        with raises("paged_attention"):
            transformed()
    want = torch.stack([loss(q) for q in batch.detach()])
    torch.testing.assert_close(torch.func.vmap(loss)(batch.detach()), want)

    def gathered(cache):
        return function("gather_kv", x | {"value_cache": cache})[1].sum()

    with raises("gather_kv"):
        torch.func.grad(gathered)(x["value_cache"])


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_is_refused(way):
    x = arguments()
    with forward_ad.dual_level():
        WAYS[way]("paged_attention", x)
        with raises("paged_attention"):
            WAYS[way]("paged_attention", x | {"sinks": forward_ad.make_dual(x["sinks"], x["sinks"])})


@pytest.mark.usefixtures("dynamo")
def test_export_refuses_parameters_but_under_no_grad():
    x = arguments()

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(16, 16)

        def forward(self, query):
            return function("paged_attention", x | {"query": self.project(query)})[0]

    module = Attention()
    with raises("paged_attention"):
        torch.export.export(module, (x["query"],))
    with torch.no_grad():
        program = torch.export.export(module, (x["query"],))
        torch.testing.assert_close(program.module()(x["query"]), module(x["query"]))

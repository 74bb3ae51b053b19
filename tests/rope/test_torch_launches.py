"""Launches of torchkv.rope_and_cache, interpreted in the place of a GPU: what is compiled, and what is known again."""

from dataclasses import replace

import pytest
import torch

from kvcore.plan import rope as plan_rope
from tests.cases.launches import OnHost
from tests.cases.rope import run_oracle
from tests.cases.torch_ropes import BY_NAME, assert_same, caches_of, fresh, op_arguments
from torchkv._library import rope as _library
from torchkv._triton import rope as _triton


@pytest.fixture
def launched(monkeypatch):
    """Launches on CPU tensors. Gives what was compiled, and which of its pointers are aligned."""
    return OnHost(monkeypatch).compiled


class Op:
    """One of the ops, as it is on a GPU: new calls are launched by `first`, others by `again`."""

    def __init__(self, way):
        self.way, self.news = way, 0
        self.op = _library.rope_and_cache if way == "new" else _library.rope_and_cache_out
        self.launches = _triton.Ropes(gives=way == "new")

    def __call__(self, call, **more):
        caches = [cache.clone() for cache in caches_of(call)]
        if self.way == "out":
            more = {"out": torch.full(call.query.shape, 7.0).to(fresh(call.query).dtype)} | more
        elif self.way == "in place":
            more = {"query": None, "out": fresh(call.query).clone()} | more
        arguments = op_arguments(call, self.op, caches, **more)
        arguments = tuple(self.aligned(x, (*caches, *more.values())) for x in arguments)
        result = self.launches.again(arguments)
        if result is None:
            self.news += 1
            of = _library._call if self.way == "new" else _library._out_call
            result = self.launches.first(of(*arguments), arguments)
        return [result, *caches]

    @staticmethod
    def aligned(x, kept):
        """A copy that begins at a multiple of 16, which NumPy's memory may not; what is kept stays as it is."""
        if not isinstance(x, torch.Tensor) or any(x is y for y in kept):
            return x
        return x.clone()


@pytest.mark.parametrize(("name", "way"), [
    ("norms", "new"), ("norms", "out"), ("norms", "in place"), ("mrope", "new"), ("one array without a layout", "new"),
    ("fewer slots than tokens", "out"), ("int8 by token and head of all layers", "new"),
    ("fp8_e4m3, scales of heads", "new"), ("MLA, fp8_e4m3", "out"), ("MLA, fp8_e4m3", "in place"),
])  # fmt: skip
def test_launches(name, way, launched):
    op = Op(way)
    for seed in range(2):
        call = BY_NAME[name].make(seed)
        assert_same(op(call), run_oracle(call))
    assert (len(launched), op.news) == (1, 1)
    fewer = replace(BY_NAME[name], num_tokens=4, slots=(3, 1), positions=None).make()
    assert_same(op(fewer), run_oracle(fewer))
    if name != "mrope":  # whose rows of positions then lie elsewhere
        assert (len(launched), op.news) == (1, 1)
    none = replace(BY_NAME[name], num_tokens=0, slots=(), positions=None).make()
    assert_same(op(none), run_oracle(none))


def test_many_tokens_have_a_plan_of_their_own(launched, monkeypatch):
    monkeypatch.setattr(plan_rope, "MANY_TOKENS", 6)
    op = Op("new")
    for tokens, news in ((5, 1), (7, 2), (4, 2), (6, 2)):
        call = replace(BY_NAME["neox, head_size 40"], num_tokens=tokens).make()
        assert_same(op(call), run_oracle(call))
        assert op.news == news


def test_what_differs_is_new(launched):
    call, op = BY_NAME["norms"].make(), Op("new")
    want = run_oracle(call)
    assert_same(op(call), want)
    for news, more in enumerate(
        (
            {"query": fresh(call.query).transpose(0, 1).contiguous().transpose(0, 1)},
            {"cos_sin": torch.cat([fresh(call.cos_sin)] * 2, 1)[:, :16]},
            {"q_norm": torch.stack([fresh(call.options["q_norm"])] * 2, 1)[:, 0]},
            {"positions": fresh(call.positions).int()},
            {"slot_mapping": torch.stack([fresh(call.slot_mapping)] * 2, 1)[:, 0]},
        ),
        start=2,
    ):
        assert_same(op(call, **more), want)
        assert op.news == len(launched) == news
    call.options["eps"] = 0.25
    assert_same(op(call), run_oracle(call))
    call.options["rope"] = "gptj"
    assert_same(op(call), run_oracle(call))
    assert op.news == 8


def test_what_begins_at_no_multiple_of_16_is_compiled_for_that(launched):
    call, op = BY_NAME["norms"].make(), Op("out")
    want = run_oracle(call)
    assert_same(op(call), want)
    room = torch.full((7 * 8 * 16 + 1,), 7.0, dtype=torch.bfloat16)
    out = room[1:].view(7, 8, 16)
    for _ in range(2):
        assert_same(op(call, out=out), want)
    assert room[0] == 7
    assert ["out_ptr" in aligned for _, aligned in launched] == [True, False]


@pytest.mark.parametrize(("first", "steps"), [(0, (128, 8, 1)), (0, (8, 16, 1)), (1, (8, 16, 1))])
def test_an_out_that_overlaps_itself_is_seen_whatever_was_launched_before(first, steps, launched):
    call, op = BY_NAME["norms"].make(), Op("out")
    names = ("query", "key", "value", "positions", "slot_mapping")
    few = {name: fresh(getattr(call, name)).clone()[:first] for name in names}  # of the same strides
    room = torch.zeros(7 * 128, dtype=torch.bfloat16)
    op(call, **few, out=room.as_strided((first, 8, 16), steps))
    with pytest.raises(ValueError, match=r"^out must not overlap itself in memory"):
        op(call, out=room.as_strided((7, 8, 16), steps))
    assert len(launched) == 1


def test_overlaps_are_seen_after_a_call_that_was_refused(launched):
    """A call's key tells how far the next one's reaches only if the two have as many tokens."""
    op = Op("out")
    case = replace(BY_NAME["neox, head_size 128"], num_q_heads=2, slots=(3, 1), positions=None)
    op(replace(case, num_tokens=3).make())
    call = replace(case, num_tokens=4).make()
    with pytest.raises(ValueError, match="value must have shape"):
        op(call, key=fresh(call.key)[:1].clone())
    room = torch.zeros(6, 2, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^out and key must not overlap in memory$"):
        op(call, out=room[2:], key=room[:4])


def test_errors_come_after_a_hit_too(launched):
    call, op = BY_NAME["norms"].make(), Op("out")
    op(call)
    query = fresh(call.query).clone()
    for more, text in (
        ({"key": fresh(call.key)[:6].clone()}, r"value must have shape \(6, 2, 16\), got \(7, 2, 16\)"),
        ({"positions": fresh(call.positions)[:6].clone()}, r"positions must have shape \(7,\), got \(6,\)"),
        ({"out": torch.zeros(6, 8, 16, dtype=torch.bfloat16)}, r"out must have shape \(7, 8, 16\), got \(6, 8, 16\)"),
        ({"slot_mapping": torch.zeros(8, dtype=torch.int64)}, r"slot_mapping must have at most num_tokens = 7 entries"),
        ({"query": query, "out": query.view(-1)[8:].new_empty(0)}, r"out must have shape"),
    ):
        with pytest.raises(ValueError, match=text):
            op(call, **more)
    room = torch.zeros(8 * 128 + 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^out and query must not overlap in memory$"):
        op(call, query=room[:896].view(7, 8, 16), out=room[128:1024].view(7, 8, 16))
    same = room[:896].view(7, 8, 16).copy_(fresh(call.query))
    assert_same(op(call, query=same, out=same.view(7, 8, 16)), run_oracle(call))  # which is in place

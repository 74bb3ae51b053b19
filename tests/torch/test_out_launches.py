"""Kernels launched into given tensors: interpreted in the place of a GPU, and on one."""

import pytest
import torch

import torchkv
from kvcore.plan.kernel import INTERPRETER
from tests.cases.arrays import to_torch
from tests.cases.gpu import DEVICE, captured
from tests.cases.launches import replace
from tests.cases.torch_ops import gather_arguments as gather_op_arguments
from tests.cases.torch_results import attend, gather_arguments, op_arguments, part, read_case, results_of, same
from torchkv._call import AttentionCall, GatherCall
from torchkv._library import read as _read_library
from torchkv._triton import attention as _attention
from torchkv._triton.attention import Attentions
from torchkv._triton.gather import Gathers
from torchkv._triton.launch import INTERPRETED


@pytest.fixture
def launched(monkeypatch):
    """Launches as on a GPU, but in the interpreter; what was compiled with which results aligned."""
    compiled = []

    def load(kernel, pointers, aligned):
        compiled.append(aligned & {"out_ptr", "lse_ptr", "key_ptr", "value_ptr"})
        return kernel

    replace(monkeypatch, load=load, ON_GPU=INTERPRETED, target=lambda: INTERPRETER)
    return compiled


def test_launches_into_given_tensors(launched):
    arguments, (out, lse) = op_arguments()
    call = AttentionCall(*arguments)
    want = _read_library.attention(*call._replace(backend="interpret")[: len(arguments)])
    new, into = Attentions(results=False), Attentions(results=True)
    same(new.launch(call)[1], want)
    both = {"out_ptr", "lse_ptr"}
    assert launched == [both]
    for offsets in ((0, 0), (1, 4), (4, 2), (4, 4)):
        given = part(out.shape, offsets[0]), part(lse.shape, offsets[1])
        got = into.launch(call._replace(results=given))[1]
        assert got[0] is given[0]
        assert got[1] is given[1]
        same(given, want)
    assert launched == [both, both, {"lse_ptr"}, {"out_ptr"}]  # the last one found what was compiled for the first
    assert (len(new._launches), len(into._launches)) == (1, 3)

    query = call.query
    with pytest.raises(ValueError, match=r"^out and query must not overlap in memory$"):
        into.launch(call._replace(results=(query, part(lse.shape, 0))))
    with pytest.raises(ValueError, match=r"^out must have shape \(4, 4, 32\), got \(4, 4, 16\)$"):
        into.launch(call._replace(results=(part((4, 4, 16), 0), part(lse.shape, 0))))
    assert len(into._launches) == 3


def test_split_launches_into_given_tensors(launched, monkeypatch):
    arguments, (out, lse) = op_arguments()
    plan_attention = _attention.plan_attention
    monkeypatch.setattr(plan_attention, "choose_splits", lambda *_: 2)
    monkeypatch.setattr(plan_attention, "plan_attention", plan_attention.plan_attention.__wrapped__)
    call = AttentionCall(*arguments)
    _, want = Attentions(results=False).launch(call)
    given = part(out.shape, 1), part(lse.shape, 0)
    Attentions(results=True).launch(call._replace(results=given))
    same(given, want)
    assert launched == [{"out_ptr", "lse_ptr"}] * 2 + [{"lse_ptr"}, {"out_ptr", "lse_ptr"}]


def test_gathers_launched_into_given_tensors(launched):
    args, options = gather_arguments(read_case())
    want = torchkv.gather_kv(*args, **options)
    caches, tables, lengths, _ = args
    call = GatherCall(*gather_op_arguments(caches, tables, lengths, 21, layout="block slot head dim"))
    same(Gathers(results=False).launch(call)[1], want)
    gathers = Gathers(results=True)
    given = part(want[0].shape, 4), part(want[1].shape, 1)
    assert gathers.launch(call._replace(results=given))[1][0] is given[0]
    same(given, want)
    assert launched == [{"key_ptr", "value_ptr"}, {"key_ptr"}]
    with pytest.raises(ValueError, match=r"^out\[0\] and out\[1\] must not overlap in memory$"):
        gathers.launch(call._replace(results=(given[1], given[1])))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "window and sinks", "int8, a scale for each head"])
def test_a_graph_writes_to_given_tensors(name):
    case = read_case(name)
    want = attend(case, backend="torch")
    out, lse = (t.to(DEVICE) for t in results_of(case))
    inputs = {}  # the same tensors in every call, as a graph wants it

    def on_device(array):
        if id(array) not in inputs:  # no copy to the device while a graph is captured
            inputs[id(array)] = to_torch(array, DEVICE)
        return inputs[id(array)]

    def step():
        return case.call(torchkv, on_device, out=out, lse=lse)

    result, replay = captured(step)
    out.fill_(7)
    lse.fill_(7)
    replay()
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.cpu(), want[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.cpu(), want[1], rtol=2e-2, atol=2e-2)
    new = case.call(torchkv, on_device, return_lse=True)
    same((out, lse), new)
    for offset in (1, 2, 4):  # what does not begin at a multiple of 16 bytes has a kernel of its own
        given = [
            torch.full((t.numel() + 4,), 7.0, device=DEVICE)[offset:][: t.numel()].view(t.shape) for t in (out, lse)
        ]
        same(case.call(torchkv, on_device, out=given[0], lse=given[1], return_lse=True), new)


@pytest.mark.gpu
def test_gathers_on_a_gpu_into_given_tensors():
    args, options = gather_arguments(read_case())
    args = (tuple(c.to(DEVICE) for c in args[0]), *(a.to(DEVICE) for a in args[1:3]), args[3])
    want = torchkv.gather_kv(*args, **options)
    memory = torch.full((2, want[0].numel() + 1), 7.0, device=DEVICE)
    given = want[0].clone().fill_(7), memory[1, 1:].view(want[1].shape)
    same(torchkv.gather_kv(*args, **options, out=given), want)
    assert (memory[0] == 7).all()
    with pytest.raises(ValueError, match=r"^out\[0\] and out\[1\] must not overlap in memory$"):
        torchkv.gather_kv(*args, **options, out=(given[0], given[0]))

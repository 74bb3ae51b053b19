"""torchkv.merge_attention: parts that saw nothing count for nothing, forward and backward."""

import numpy as np
import pytest
import torch

import jaxkv
from torchkv import merge_attention

INF, NAN = float("inf"), float("nan")


def parts(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 4, 2, 8, dtype=dtype), 3 * torch.randn(3, 4, 2)


def plain(outs, lses):
    """The definition, in float64."""
    weights = torch.exp(lses.double())
    out = (outs.double() * weights[..., None]).sum(0) / weights.sum(0)[..., None]
    return out.float(), weights.sum(0).log().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts(dtype):
    outs, lses = parts(dtype)
    out, lse = merge_attention(outs, lses)
    want, want_lse = plain(outs, lses)
    assert out.dtype == dtype
    torch.testing.assert_close(out, want.to(dtype))
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("shift", [1e4, -1e4, 3e38, -3e38])
def test_large_log_sum_exps(shift):
    outs, lses = parts()
    lses = (lses + shift).to(torch.float32)
    out, lse = merge_attention(outs, lses)
    want, want_lse = plain(outs, lses - shift)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, (want_lse + shift).float())


@pytest.mark.parametrize("value", [0.0, INF, NAN])
@pytest.mark.parametrize("empty", [-INF, INF])
def test_parts_that_saw_nothing(empty, value):
    outs, lses = parts()
    want, want_lse = merge_attention(outs[::2], lses[::2])
    assert want.all()
    outs[1], lses[1] = value, empty
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_no_part_saw_anything(dtype):
    outs, lses = parts(dtype)
    want, want_lse = merge_attention(outs, lses)
    lses[:, 1, 0] = torch.tensor([-INF, INF, -INF])
    outs[0, 1, 0] = NAN
    out, lse = merge_attention(outs, lses)
    want[1, 0], want_lse[1, 0] = 0, -INF
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=0)
    assert not torch.signbit(out[1, 0]).any()


def test_no_tokens():
    out, lse = merge_attention(torch.empty(1, 0, 2, 8), torch.empty(1, 0, 2))
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_parts(dtype):
    out, lse = merge_attention(torch.empty(0, 4, 2, 8, dtype=dtype), torch.empty(0, 4, 2))
    torch.testing.assert_close(out, torch.zeros(4, 2, 8, dtype=dtype), rtol=0, atol=0)
    torch.testing.assert_close(lse, torch.full((4, 2), -INF), rtol=0, atol=0)


@pytest.mark.parametrize(("change", "kind", "message"), [
    (
        lambda o, s: (o[0], s), ValueError,
        "outs must have shape (parts, num_tokens, num_q_heads, head_size_v), got (4, 2, 8)",
    ),
    (lambda o, s: (o, s.mT), ValueError, "lses must have shape (3, 4, 2), got (3, 2, 4)"),
    (lambda o, s: (o, s[:1]), ValueError, "lses must have shape (3, 4, 2), got (1, 4, 2)"),
    (lambda o, s: (o.int(), s), TypeError, "outs must have dtype float32, bfloat16 or float16, got int32"),
    (lambda o, s: (o, s.half()), TypeError, "lses must have dtype float32, got float16"),
])  # fmt: skip
def test_both_frameworks_refuse_parts_that_do_not_fit_with_the_same_text(change, kind, message):
    outs, lses = change(*parts())
    for merge, given in ((merge_attention, (outs, lses)), (jaxkv.merge_attention, (outs.numpy(), lses.numpy()))):
        with pytest.raises(kind) as error:
            merge(*given)
        assert str(error.value) == message


def test_parts_on_several_devices_are_refused():
    outs, lses = parts()
    with pytest.raises(ValueError, match=r"^lses must be on device cpu, as outs, got meta$"):
        merge_attention(outs, lses.to("meta"))


@pytest.mark.parametrize("other", [1.0, -INF, INF])
def test_a_log_sum_exp_of_nan_is_not_hidden(other):
    outs, lses = parts()
    lses[0, 1, 0], lses[1:, 1, 0] = NAN, other
    out, lse = merge_attention(outs, lses)
    assert out[1, 0].isnan().all()
    assert lse[1, 0].isnan()
    assert not out[1, 1].isnan().any()


def test_results_of_parts_that_count_are_not_hidden():
    outs, lses = parts()
    outs[1, 2, 1, 3] = NAN
    outs[0, 0, 0, 5] = INF
    out, lse = merge_attention(outs, lses)
    want = plain(outs, lses)[0]
    torch.testing.assert_close(out, want, equal_nan=True)
    assert lse.isfinite().all()


def test_gradients():
    outs, lses = parts()
    outs, lses = (x.double().requires_grad_() for x in (outs, lses))
    # The function computes in float32: its gradients against those of the definition in float64.
    weights = torch.exp(lses)
    ((outs * weights[..., None]).sum(0) / weights.sum(0)[..., None]).sin().sum().backward(retain_graph=True)
    weights.sum(0).log().cos().sum().backward()
    leaves = [x.detach().float().requires_grad_() for x in (outs, lses)]
    out, lse = merge_attention(*leaves)
    (out.sin().sum() + lse.cos().sum()).backward()
    for leaf, want in zip(leaves, (outs, lses), strict=True):
        assert want.grad.abs().max() > 0.1
        torch.testing.assert_close(leaf.grad, want.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, INF, NAN])
@pytest.mark.parametrize("empty", [-INF, INF])
def test_gradients_of_parts_that_saw_nothing_are_zero(empty, value):
    outs, lses = parts()
    outs[1], lses[1] = value, empty
    outs[:, 3], lses[:, 3] = value, empty  # a row of which no part saw anything
    leaves = [x.clone().requires_grad_() for x in (outs, lses)]
    out, lse = merge_attention(*leaves)
    (out.sin().sum() + lse.nan_to_num(neginf=0).cos().sum()).backward()
    others = [x[::2, :3].clone().requires_grad_() for x in (outs, lses)]
    out, lse = merge_attention(*others)
    (out.sin().sum() + lse.cos().sum()).backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert not leaf.grad[1].any()
        assert not leaf.grad[:, 3].any()
        torch.testing.assert_close(leaf.grad[::2, :3], other.grad, rtol=1e-5, atol=1e-6)
        assert other.grad.all()


def test_it_is_compiled_without_a_graph_break():
    torch._dynamo.reset()
    outs, lses = parts()
    lses[1, 2] = -INF
    outs[1, 2] = NAN
    got = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")(outs, lses)
    for a, b in zip(got, merge_attention(outs, lses), strict=True):
        np.testing.assert_array_equal(a, b)

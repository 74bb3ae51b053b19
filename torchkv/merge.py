"""The merge of partial results of attention."""

import torch
from torch import Tensor

from kvcore.contract.checks import check_devices, check_result
from kvcore.contract.read import check_merge
from torchkv._arguments import check_tensors, dtype_name, refuse_gradients, spec_of
from torchkv._memory import check_results_apart


def merge_attention(
    outs: Tensor, lses: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merges partial results of attention over parts of the positions, as devices compute that share a context.

    A row of the result is `sum(exp(lse_p) * out_p) / sum(exp(lse_p))` over the partial results p, and its log-sum-exp
    `log(sum(exp(lse_p)))`. A partial result whose log-sum-exp there is -inf or +inf (which other kernels give) saw no
    positions: it is left out, whatever it holds, NaN too. Of a row without any the result is zeros, and -inf. A
    log-sum-exp that is NaN makes the row NaN. Differentiable: rows that are left out have gradients of zero.

    Args:
        outs: `[parts, num_tokens, num_q_heads, head_size_v]`: partial results, from a `paged_attention` over each part.
        lses: `[parts, num_tokens, num_q_heads]` float32, from the same calls. Sinks belong to one part only.
        out: A tensor of the result's shape and dtype that it is written to, and that is returned; it may be strided,
            but not overlap the arguments, and then nothing is differentiable. None: a new one.
        lse: The same for the log-sum-exp.

    Returns:
        What one call over all the positions gives: result of outs' dtype, and log-sum-exp.

    Raises:
        ValueError: a shape or a device does not fit, or out or lse overlaps another tensor.
        TypeError: a dtype does not fit.
        NotImplementedError: out or lse is given, grad mode is on, and an argument requires gradients.

    Example:
        >>> outs = torch.tensor([[[[1.0, 2.0]]], [[[5.0, 6.0]]]])  # of 2 parts, for 1 token and 1 head
        >>> lses = torch.zeros((2, 1, 1))  # both parts have the same weight
        >>> out, lse = torchkv.merge_attention(outs, lses)
        >>> out.tolist(), round(lse.item(), 4)
        ([[[3.0, 4.0]]], 0.6931)
    """
    check_tensors(outs=outs, lses=lses)
    check_merge(spec_of(outs), spec_of(lses))
    if out is not None or lse is not None:
        _check_merged(outs, lses, out, lse)
    empty = torch.isinf(lses)
    lses = lses.masked_fill(empty, -torch.inf)
    top = lses.detach().amax(0) if len(lses) else lses.new_zeros(lses.shape[1:])
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    # Masked before the product: 0 times NaN is NaN, and so is its gradient.
    merged = torch.sum(outs.masked_fill(empty[..., None], 0).float() * (weights / total)[..., None], dim=0)
    merged_lse = (top + total.log()).masked_fill(nothing, -torch.inf)
    return (
        merged.to(outs.dtype) if out is None else out.copy_(merged),
        merged_lse if lse is None else lse.copy_(merged_lse),
    )


def _check_merged(outs: Tensor, lses: Tensor, out: Tensor | None, lse: Tensor | None) -> None:
    results = {name: tensor for name, tensor in (("out", out), ("lse", lse)) if tensor is not None}
    check_tensors(**results)
    refuse_gradients("merge_attention with out or lse", outs, lses, out, lse)
    for name, tensor in results.items():
        like = outs if name == "out" else lses
        check_result(name, spec_of(tensor)._replace(strides=None), like.shape[1:], dtype_name(like))
        check_devices([(name, spec_of(tensor))], f"{name}s", spec_of(like))
    if not torch.compiler.is_compiling():  # where tensors have no addresses
        check_results_apart(tuple(results), tuple(results.values()), {"outs": outs, "lses": lses})

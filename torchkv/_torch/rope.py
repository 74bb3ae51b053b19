"""Norm and rotation as vectorised torch, and the write of what comes of them. Bits as the oracle's.

Each operation is one of torch's, so that each result is rounded: none is fused with the next.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcore.contract.rope import Rope, RopeOptions
from kvcore.formats import FLOAT32, FLOATS
from torchkv._rotated import RopeCall
from torchkv._torch.formats import encode
from torchkv._torch.write import write


class _Angles(NamedTuple):
    """Angles of tokens.

    Attributes:
        cosines: `[num_tokens, 1, pairs]` of float32.
        sines: The same of sines.
        exist: `[num_tokens, 1, 1]`: whether the table has the token's position.
    """

    cosines: Tensor
    sines: Tensor
    exist: Tensor


def rope_and_cache(described: Rope, call: RopeCall) -> Tensor:
    """Writes with advanced indexing. Returns the rotated query, in the call's tensor for it if there is one."""
    options, rows = described.options, call.write
    angles = _angles(call.positions, call.cos_sin, options.sections)
    query = _rotated(_normed(call.query, call.q_norm, options.eps), angles, options)
    rotated = encode(query, FLOATS[described.query.dtype]).view(call.query.dtype)

    num_written = rows.slot_mapping.shape[0]
    key, value = rows.key[:num_written], rows.value[:num_written]
    angles = _Angles(*(x[:num_written] for x in angles))
    if described.latent:
        if call.k_norm is not None:
            key = _canonical(_normed(key, call.k_norm, options.eps))
        value = _canonical(_rotated(value.float().unsqueeze(1), angles, options)).squeeze(1)
        rows = rows._replace(latent=True, v_scale=rows.k_scale)
    else:
        key = _canonical(_rotated(_normed(key, call.k_norm, options.eps), angles, options))
    write(described.write, rows._replace(key=key, value=value))
    return rotated if call.out is None else call.out.copy_(rotated)


def _angles(positions: Tensor, cos_sin: Tensor, sections: Sequence[int] | None) -> _Angles:
    """Cosines and sines of each token's pairs."""
    rows, (max_position, rotary_dim) = positions.long(), cos_sin.shape
    if sections is None:
        rows = rows.unsqueeze(0)
    exist = ((rows >= 0) & (rows < max_position)).all(0)
    if max_position == 0:
        cos_sin = cos_sin.new_zeros((1, rotary_dim))
    rows, pairs = rows.masked_fill(~exist, 0), rotary_dim // 2
    if sections is None:
        rows = rows[0].unsqueeze(1)
    else:
        section_of_pair = [section for section, size in enumerate(sections) for _ in range(size)]
        rows = rows[section_of_pair].T
    pair = torch.arange(pairs, device=cos_sin.device)
    cosines, sines = (cos_sin[rows, start + pair].float().unsqueeze(1) for start in (0, pairs))
    return _Angles(cosines, sines, exist[:, None, None])


def _normed(x: Tensor, weights: Tensor | None, eps: float) -> Tensor:
    """`x * (1 / sqrt(mean(x * x) + eps)) * weights` of rows `[…, n]`, in float32; without weights x, in float32.

    Divisions are of tensors: where a divisor is a number, CUDA multiplies by its reciprocal.
    """
    x = x.float()
    if weights is None:
        return x
    mean = _sum_in_pairs(x * x) / x.new_full((), x.shape[-1])
    # MKL's square root, which torch takes on CPUs, misses the last bit. That of float64, rounded, cannot.
    root = (mean + eps).double().sqrt().float()
    return x * (torch.ones_like(root) / root) * weights.float()


def _sum_in_pairs(x: Tensor) -> Tensor:
    """The sum of rows `[…, n]`, `[…, 1]`: zeros make n a power of two, then neighbours are added until one is left."""
    size = x.shape[-1]
    x = pad(x, (0, (1 << (size - 1).bit_length()) - size))
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x


def _rotated(x: Tensor, angles: _Angles, options: RopeOptions) -> Tensor:
    """Heads `[num_tokens, num_heads, head_size]` of float32, rotated; zeros where the table has no such position."""
    cosines, sines, exist = angles
    pairs = cosines.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if options.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    new = a * cosines - b * sines, b * cosines + a * sines
    turned = torch.stack(new, -1).flatten(-2) if options.interleaved else torch.cat(new, -1)
    return torch.cat([turned, rest], -1).masked_fill(~exist, 0)


def _canonical(x: Tensor) -> Tensor:
    """The same float32 numbers, every NaN with the same bits."""
    return encode(x, FLOAT32).view(torch.float32)

"""Llama in torch, eager: the twin of `jax_model`."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from torchkv import PagedKVCache

from .gguf_model import LlamaConfig, LlamaModel
from .session import Sampling


@dataclass(frozen=True)
class Layer:
    """Weights of one layer on the device; matrices are [out, in]."""

    attention_norm: Tensor
    qkv: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """Weights on the device; `head` is the embedding itself where the model ties them."""

    embedding: Tensor
    layers: list[Layer]
    final_norm: Tensor
    head: Tensor


def load_weights(model: LlamaModel, dtype: torch.dtype, device: torch.device) -> Weights:
    """Carries the weights to a device."""

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.require(array, requirements="W")).to(device, dtype)

    embedding = put(model.embedding)
    return Weights(
        embedding,
        [Layer(**{name: put(array) for name, array in vars(layer).items()}) for layer in model.layers],
        put(model.final_norm),
        embedding if model.head is None else put(model.head),
    )


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x [..., in] by weight [out, in]: [..., out].

    On a CPU, the library behind torch is slow at few rows: `weight @ x.T` takes a quarter of the time of
    `x @ weight.T` for 2 or 4 rows, and for one row half of it, even though the row is doubled (49,152 × 576,
    2 cores of an AMD EPYC: 4.9 ms for 2 rows against 26; 10.7 for 1).
    """
    rows = x.numel() // x.shape[-1]
    if x.is_cuda or x.dtype != torch.float32 or rows >= 16:
        return F.linear(x, weight)
    flat = x.reshape(rows, -1)
    flat = torch.cat([flat, flat]) if rows == 1 else flat
    return (weight @ flat.T)[:, :rows].T.contiguous().view(*x.shape[:-1], -1)


def forward(
    config: LlamaConfig,
    weights: Weights,
    cos_sin: Tensor,  # float32 [context, dim]
    cache: PagedKVCache,
    tokens: Tensor,  # int32 [B, T]
    positions: Tensor,  # int64 [B, T]: T in a row
    written: Tensor,  # bool [B, T]: the tokens to be written to the cache
    tables: Tensor,  # int32 [B, blocks]
) -> Tensor:
    """All layers: each rotates queries and keys, writes keys and values to the cache, then attends over the cache.

    Returns:
        Hidden states [B, T, hidden], not yet normalised. The cache is changed in place.
    """
    batch, count = tokens.shape
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    block_size = cache.spec.block_size
    blocks = tables.gather(1, positions // block_size)
    slots = torch.where(written, blocks * block_size + positions % block_size, -1).view(-1)
    # Tokens that are not written count, too: they come after all that are, and nothing is made of what they see.
    seq_lens = positions[:, -1] + 1
    starts = None if count == 1 else torch.arange(batch + 1, device=tokens.device) * count
    places = positions.reshape(-1)
    x = F.embedding(tokens, weights.embedding)
    shape = (config.hidden_size,)
    for index, layer in enumerate(weights.layers):
        normed = F.rms_norm(x, shape, layer.attention_norm, config.norm_epsilon)
        # Slices of the fused projection: nothing is copied.
        qkv = project(normed, layer.qkv).view(batch * count, sum(heads), config.head_size)
        query, key, value = qkv.split(heads, dim=1)
        query = cache.rope_and_cache(query, key, value, places, cos_sin, slots, rope="neox", layer=index)
        mixed = cache.attend(query, tables, seq_lens, query_start_loc=starts, layer=index)
        x = x + project(mixed.view(batch, count, -1), layer.attention_out)
        normed = F.rms_norm(x, shape, layer.mlp_norm, config.norm_epsilon)
        gate, up = project(normed, layer.gate_up).chunk(2, dim=-1)
        x = x + project(F.silu(gate) * up, layer.down)
    return x


def logits(config: LlamaConfig, weights: Weights, x: Tensor) -> Tensor:
    """Logits of the token after each hidden state [B, hidden]: [B, vocabulary]."""
    x = F.rms_norm(x, (config.hidden_size,), weights.final_norm, config.norm_epsilon)
    return project(x, weights.head)


def next_tokens(
    config: LlamaConfig, weights: Weights, x: Tensor, positions: Tensor, sampling: Sampling | None
) -> Tensor:
    """The token after each hidden state [B, hidden], for its position [B]: the likeliest, or a sample. int64 [B]."""
    scores = logits(config, weights, x)
    if sampling is not None:
        scores = scores.float() + sampling.temperature * gumbel(sampling.seed, positions, scores.shape[1])
    return scores.argmax(dim=-1)


def gumbel(seed: int, positions: Tensor, vocabulary: int) -> Tensor:
    """The draws of `session.Sampling` for a batch's tokens at positions [B]: float32 [B, vocabulary]."""

    def mix(h: Tensor) -> Tensor:  # of numbers below 2^32, in int64: torch has no arithmetic in uint32
        h = h & 0xFFFFFFFF
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    sequences, ids = (torch.arange(count, device=positions.device) for count in (len(positions), vocabulary))
    rows = mix(mix(mix(torch.full_like(sequences, seed)) + sequences) + positions)
    bits = mix(rows[:, None] + ids[None])
    return -torch.log(-torch.log(((bits >> 9).float() + 0.5) * 2**-23))

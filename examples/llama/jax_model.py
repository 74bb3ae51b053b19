"""Llama in JAX: prefill, and a decode loop that is one program."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxkv import PagedKVCache, heads

from .gguf_model import LlamaConfig, LlamaModel
from .jax_parts import Devices

Weights = dict[str, Any]


class State(NamedTuple):
    """What the decode loop carries; all of it is donated, so the cache is updated where it lies."""

    tokens: Array  # int32 [num_sequences, context]
    lengths: Array  # int32 [num_sequences]: tokens so far
    finished: Array  # bool [num_sequences]
    step: Array  # int32 []: tokens made so far, by the sequences that go on
    cache: PagedKVCache


def load_weights(model: LlamaModel, dtype: str, devices: Devices) -> Weights:
    """Carries the weights to the devices, matrices of the layers as [in, ...].

    XLA multiplies a few rows by [in, out] up to twice as fast as by [out, in] on a CPU (`x @ w`, 4 rows,
    gate_up: 12 ms for 30 layers against 25). The embedding stays as it is: it is a table of rows first, and
    the head too. The layers' norms are one array; their matrices are not, see `multiply`.

    The queries, the key and the value of a KV head are together, [hidden, num_kv_heads, q_per_kv + 2, head_size], so
    that devices with some of the heads have a part in one piece; so are the MLP's gate and up, [hidden, 2, mlp].
    """
    config = model.config
    group, size, hidden = config.num_heads // config.num_kv_heads, config.head_size, config.hidden_size
    more = devices.config(config).num_kv_heads - config.num_kv_heads  # heads of zeros

    def put(array: np.ndarray) -> Array:
        return devices.put(jnp.asarray(array, dtype))

    def matrices(name: str, arrays: Iterable[np.ndarray]) -> list[Array]:
        return [devices.put_matrix(name, jnp.asarray(array, dtype)) for array in arrays]

    def grouped(qkv: np.ndarray) -> np.ndarray:
        query, key, value = np.split(qkv.T, [group * size * config.num_kv_heads, -size * config.num_kv_heads], axis=1)
        parts = (part.reshape(hidden, config.num_kv_heads, -1, size) for part in (query, key, value))
        return np.pad(np.concatenate(list(parts), axis=2), ((0, 0), (0, more), (0, 0), (0, 0)))

    layers = {
        "attention_norm": put(np.stack([layer.attention_norm for layer in model.layers])),
        "qkv": matrices("qkv", (grouped(layer.qkv) for layer in model.layers)),
        "attention_out": matrices(
            "attention_out",
            (np.pad(layer.attention_out.T, ((0, more * group * size), (0, 0))) for layer in model.layers),
        ),
        "mlp_norm": put(np.stack([layer.mlp_norm for layer in model.layers])),
        "gate_up": matrices("gate_up", (layer.gate_up.T.reshape(hidden, 2, -1) for layer in model.layers)),
        "down": matrices("down", (layer.down.T for layer in model.layers)),
    }
    weights = {"embedding": put(model.embedding), "layers": layers, "final_norm": put(model.final_norm)}
    if model.head is not None:
        weights["head"] = devices.put_matrix("head", jnp.asarray(model.head, dtype))
    return weights


def multiply(x: Array, matrices: Sequence[Array], index: int | Array) -> Array:
    """Multiplies x [..., in] by the matrix [in, ...] of one layer: [..., ...].

    In a loop over layers, the index is traced, and a slice of stacked matrices would be a copy of a layer's weights:
    twice the time of a step on a CPU. A branch for each layer uses them where they lie.
    """
    if isinstance(index, int):
        return jnp.tensordot(x, matrices[index], axes=1)
    return lax.switch(index, [partial(jnp.tensordot, b=matrix, axes=1) for matrix in matrices], x)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * jnp.broadcast_to(weight, x.shape)


def forward(
    config: LlamaConfig,
    weights: Weights,
    cache: PagedKVCache,
    tokens: Array,  # int32 [B, T]
    positions: Array,  # int32 [B, T]: T in a row
    written: Array,  # bool [B, T]: the tokens to be written to the cache
    tables: Array,  # int32 [B, blocks]
) -> tuple[Array, PagedKVCache]:
    """All layers, for as many tokens of each sequence.

    Returns:
        Hidden states [B, T, hidden], not yet normalised, and the cache.
    """
    batch, count = tokens.shape
    block_size = cache.spec.block_size
    blocks = jnp.take_along_axis(tables, positions // block_size, axis=1)
    slots = jnp.where(written, blocks * block_size + positions % block_size, -1).reshape(-1)
    # Tokens that are not written count, too: they come after all that are, and nothing is made of what they see.
    seq_lens = positions[:, -1] + 1
    starts = None if count == 1 else jnp.arange(batch + 1) * count
    flat = tokens.reshape(-1), positions.reshape(-1)
    x, cache = run_layers(config, weights, cache, *flat, slots, tables, seq_lens, starts)
    return x.reshape(batch, count, -1), cache


def run_layers(
    config: LlamaConfig,
    weights: Weights,
    cache: PagedKVCache,
    tokens: Array,  # int32 [T]: of all sequences, one after another
    positions: Array,  # int32 [T]
    slots: Array,  # int32 [T]; -1: not written
    tables: Array,  # int32 [B, blocks]
    seq_lens: Array,  # int32 [B], these tokens among them
    starts: Array | None,  # int32 [B + 1]: where each sequence's tokens begin; None: one each
) -> tuple[Array, PagedKVCache]:
    """All layers: each rotates queries and keys, writes keys and values to the cache, then attends over the cache.

    On a CPU they are one loop, which compiles in a quarter of the time that unrolled layers take, and is as fast. On a
    GPU they are unrolled: there, the host chooses the branches of `multiply`.

    Returns:
        Hidden states [T, hidden], not yet normalised, and the cache.
    """
    count = len(tokens)
    group = config.num_heads // config.num_kv_heads
    layers, cos_sin = weights["layers"], weights["cos_sin"]

    def one_layer(carry: tuple[Array, PagedKVCache], index: int | Array) -> tuple[tuple[Array, PagedKVCache], None]:
        x, cache = carry
        normed = rms_norm(x, layers["attention_norm"][index], config.norm_epsilon)
        qkv = multiply(normed, layers["qkv"], index)
        qkv = qkv.reshape(count, config.num_kv_heads, group + 2, config.head_size)
        # Views: kernels read queries, keys and values where the projection has them.
        query, key, value = heads(qkv, 0, group), heads(qkv, group, group + 1), heads(qkv, group + 1, group + 2)
        query, cache = cache.rope_and_cache(query, key, value, positions, cos_sin, slots, rope="neox", layer=index)
        mixed = cache.attend(query, tables, seq_lens, query_start_loc=starts, layer=index)
        x = x + multiply(mixed.reshape(count, -1), layers["attention_out"], index)
        normed = rms_norm(x, layers["mlp_norm"][index], config.norm_epsilon)
        gate_up = multiply(normed, layers["gate_up"], index)
        x = x + multiply(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], layers["down"], index)
        return (x, cache), None

    carry = weights["embedding"][tokens], cache
    if jax.default_backend() == "cpu":
        carry, _ = lax.scan(one_layer, carry, jnp.arange(config.num_layers, dtype=jnp.int32))
    else:
        for index in range(config.num_layers):
            carry, _ = one_layer(carry, index)
    return carry


def next_tokens(config: LlamaConfig, weights: Weights, x: Array, positions: Array) -> Array:
    """The token after each hidden state [B, hidden], for its position [B]: the likeliest, or a sample. int32 [B]."""
    scores = logits(config, weights, x)
    if weights["sampling"] is not None:
        temperature, seed = weights["sampling"]
        scores = scores.astype(jnp.float32) + temperature * gumbel(seed, positions, scores.shape[1])
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def logits(config: LlamaConfig, weights: Weights, x: Array) -> Array:
    """Logits [B, vocabulary] of hidden states [B, hidden]."""
    x = rms_norm(x, weights["final_norm"], config.norm_epsilon)
    head = weights.get("head", weights["embedding"])  # [vocabulary, hidden]
    return lax.dot_general(x, head, (((1,), (1,)), ((), ())))


def gumbel(seed: Array, positions: Array, vocabulary: int, sequences: Array | None = None) -> Array:
    """The draws of `session.Sampling` for a batch's tokens at positions [B]: float32 [B, vocabulary].

    `seed` is one for all, or one each; sequences are numbered from 0, or as given.
    """

    def mix(h: Array) -> Array:
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    sequences = jnp.arange(len(positions), dtype=jnp.uint32) if sequences is None else sequences
    rows = mix(mix(mix(seed) + sequences) + positions.astype(jnp.uint32))
    bits = mix(rows[:, None] + jnp.arange(vocabulary, dtype=jnp.uint32)[None])
    return -jnp.log(-jnp.log(((bits >> 9).astype(jnp.float32) + 0.5) * 2**-23))


def append(config: LlamaConfig, state: State, new: Array, active: Array) -> State:
    """Adds one token to each sequence that is active [B]."""
    rows = jnp.arange(new.shape[0])
    columns = jnp.where(active, state.lengths, state.tokens.shape[1])  # out of bounds: dropped
    stops = jnp.isin(new, jnp.array(config.stop_ids, jnp.int32))
    return state._replace(
        tokens=state.tokens.at[rows, columns].set(new, mode="drop"),
        lengths=state.lengths + active.astype(state.lengths.dtype),
        finished=state.finished | (active & stops),
    )


def prefill(
    config: LlamaConfig,
    weights: Weights,
    tables: Array,
    prompts: Array,  # int32 [B]: prompt lengths
    state: State,
    piece: Array,  # int32 [B, T]: this piece of the prompts
    start: Array,  # int32 []: position of its first token
) -> State:
    """Runs one piece of the prompts, and appends the first new token where a prompt ends in it."""
    batch, count = piece.shape
    positions = jnp.broadcast_to(start + jnp.arange(count), (batch, count))
    x, cache = forward(config, weights, state.cache, piece, positions, positions < prompts[:, None], tables)
    last = prompts - 1 - start  # where in this piece the prompt ends, if it does
    ends = (last >= 0) & (last < count)
    x = x[jnp.arange(batch), jnp.clip(last, 0, count - 1)]
    return append(config, state._replace(cache=cache), next_tokens(config, weights, x, state.lengths), ends)


def decode(config: LlamaConfig, weights: Weights, tables: Array, state: State, until: Array) -> State:
    """Steps until every sequence is finished or `until` tokens have been made: one loop, one program."""

    def going(state: State) -> Array:
        return (state.step < until) & ~jnp.all(state.finished)

    def step(state: State) -> State:
        positions = (state.lengths - 1)[:, None]
        tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
        active = ~state.finished
        x, cache = forward(config, weights, state.cache, tokens, positions, active[:, None], tables)
        new = next_tokens(config, weights, x[:, 0], state.lengths)
        return append(config, state._replace(cache=cache, step=state.step + 1), new, active)

    return lax.while_loop(going, step, state)

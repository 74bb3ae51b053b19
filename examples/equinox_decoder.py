# /// script
# requires-python = ">=3.12"
# dependencies = ["jaxkv[jax]", "equinox>=0.13.8"]
#
# [tool.uv.sources]
# jaxkv = { path = "..", editable = true }
# ///
"""A Llama in Equinox whose keys and values live in a paged cache: ragged prefill, jitted decoding, in place.

    uv run examples/equinox_decoder.py

The weights are random. The same tokens come from one device, after a checkpoint, and from a mesh. See docs/flax.md.
"""

import os
import tempfile
from pathlib import Path

if __name__ == "__main__":  # four devices, where the host has no others
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv

LAYERS, HIDDEN, MLP, VOCABULARY, MAX_LENGTH = 2, 64, 128, 256, 128
Q_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 4, 16, 8
COLUMNS, ROWS = P(None, "tp"), P("tp", None)  # which axis of a matrix a mesh splits


class Linear(eqx.Module):
    """A matrix, and how a mesh splits it."""

    weight: jax.Array
    split: P = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, split: P, key: jax.Array):
        self.weight = jax.random.normal(key, (inputs, outputs)) * inputs**-0.5
        self.split = split

    def __call__(self, x):
        return x @ self.weight


class Layer(eqx.Module):
    norm: eqx.nn.RMSNorm
    mlp_norm: eqx.nn.RMSNorm
    to_query: Linear
    to_key: Linear
    to_value: Linear
    from_heads: Linear
    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, key: jax.Array):
        keys = iter(jax.random.split(key, 7))
        self.norm, self.mlp_norm = eqx.nn.RMSNorm(HIDDEN), eqx.nn.RMSNorm(HIDDEN)
        self.to_query = Linear(HIDDEN, Q_HEADS * HEAD_SIZE, COLUMNS, next(keys))
        self.to_key = Linear(HIDDEN, KV_HEADS * HEAD_SIZE, COLUMNS, next(keys))
        self.to_value = Linear(HIDDEN, KV_HEADS * HEAD_SIZE, COLUMNS, next(keys))
        self.from_heads = Linear(Q_HEADS * HEAD_SIZE, HIDDEN, ROWS, next(keys))
        self.gate, self.up = Linear(HIDDEN, MLP, COLUMNS, next(keys)), Linear(HIDDEN, MLP, COLUMNS, next(keys))
        self.down = Linear(MLP, HIDDEN, ROWS, next(keys))

    def __call__(self, x, cache, layer, positions, slots, table, **tables):
        normed = jax.vmap(self.norm)(x)
        query, key, value = (
            to(normed).reshape(len(x), -1, HEAD_SIZE) for to in (self.to_query, self.to_key, self.to_value)
        )
        query, cache = cache.rope_and_cache(query, key, value, positions, table, slots, layer=layer)
        x = x + self.from_heads(cache.attend(query, **tables, layer=layer).reshape(len(x), -1))
        normed = jax.vmap(self.mlp_norm)(x)
        return x + self.down(jax.nn.silu(self.gate(normed)) * self.up(normed)), cache


class Decoder(eqx.Module):
    embed: jax.Array
    layers: list[Layer]
    norm: eqx.nn.RMSNorm
    head: Linear

    def __init__(self, key: jax.Array):
        embed, head, *layers = jax.random.split(key, 2 + LAYERS)
        self.embed = jax.random.normal(embed, (VOCABULARY, HIDDEN))
        self.layers = [Layer(key) for key in layers]
        self.norm, self.head = eqx.nn.RMSNorm(HIDDEN), Linear(HIDDEN, VOCABULARY, COLUMNS, head)

    def __call__(self, cache, tokens, positions, **tables):
        """The cache, and the next token after each of `tokens`, whose keys and values are put into the cache."""
        starts = tables.get("query_start_loc")
        slots = jaxkv.slot_mapping(tables["block_tables"], starts, tables["seq_lens"], BLOCK_SIZE, len(tokens))
        config = {"head_dim": HEAD_SIZE, "rope_theta": 1e4, "max_position_embeddings": MAX_LENGTH}
        rope, x = jaxkv.rope_table(config), self.embed[tokens]
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, cache, number, positions, slots, rope, **tables)
        return cache, self.head(jax.vmap(self.norm)(x)).argmax(-1).astype(jnp.int32)


@eqx.filter_jit(donate="warn-except-first")  # the cache, and nothing else: what is used again is in the first argument
def prefill(kept, cache):
    model, tokens, positions, tables = kept
    cache, tokens = model(cache, tokens, positions, **tables)
    return cache, tokens[tables["query_start_loc"][1:] - 1]


@eqx.filter_jit(donate="warn-except-first")
def decode(kept, cache, steps: int):
    model, tokens, lengths, block_tables = kept

    def step(carry, _):
        cache, tokens, lengths = carry
        cache, tokens = model(cache, tokens, lengths, block_tables=block_tables, seq_lens=lengths + 1)
        return (cache, tokens, lengths + 1), tokens

    (cache, *_), answers = jax.lax.scan(step, (cache, tokens, lengths), length=steps)
    return cache, answers


def split(model: Decoder, cache: jaxkv.PagedKVCache, mesh: jax.sharding.Mesh) -> tuple[Decoder, jaxkv.PagedKVCache]:
    """A model and a cache on a mesh: each device has some heads of both."""

    def is_linear(node):
        return isinstance(node, Linear)

    def place(node, spec=None):
        return jax.device_put(node, NamedSharding(mesh, spec or (node.split if is_linear(node) else P())))

    return jax.tree.map(place, model, is_leaf=is_linear), jax.tree.map(place, cache, cache.partition_spec(heads="tp"))


def addresses(cache: jaxkv.PagedKVCache) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for array in cache.caches for shard in array.addressable_shards]


def main(prompts: list[np.ndarray], steps: int) -> np.ndarray:
    """Returns the tokens `[1 + 2 * steps, num_seqs]` after the prompts, found three times."""
    per_sequence = MAX_LENGTH // BLOCK_SIZE
    num_blocks = len(prompts) * per_sequence
    block_tables = jax.random.permutation(jax.random.key(0), num_blocks).reshape(-1, per_sequence)  # in any order
    prompt_lengths = [len(prompt) for prompt in prompts]
    tokens = jnp.asarray(np.concatenate(prompts), jnp.int32)  # one prompt after another
    positions = jnp.concatenate([jnp.arange(length) for length in prompt_lengths])
    starts, lengths = jnp.asarray(np.cumsum([0, *prompt_lengths])), jnp.asarray(prompt_lengths)
    tables = {"block_tables": block_tables, "query_start_loc": starts, "seq_lens": lengths}

    def empty_cache() -> jaxkv.PagedKVCache:
        return jaxkv.PagedKVCache.create(
            num_layers=LAYERS, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_heads=KV_HEADS, head_size=HEAD_SIZE,
            dtype="float32",
        )  # fmt: skip

    def first_half(model: Decoder, cache: jaxkv.PagedKVCache) -> tuple[jaxkv.PagedKVCache, jax.Array]:
        before = addresses(cache)
        cache, first = prefill((model, tokens, positions, tables), cache)
        cache, rest = decode((model, first, lengths, block_tables), cache, steps)
        print(f"{len(before)} buffers of {cache} are where they were: {addresses(cache) == before}")
        assert addresses(cache) == before
        return cache, jnp.concatenate([first[None], rest])

    def second_half(model: Decoder, cache: jaxkv.PagedKVCache, answers: jax.Array) -> np.ndarray:
        _, rest = decode((model, answers[-1], lengths + steps, block_tables), cache, steps)
        return np.concatenate([answers, rest])

    devices = jax.devices()[: max(count for count in (1, 2, 4) if count <= jax.device_count())]
    mesh = jax.make_mesh((len(devices),), ("tp",), axis_types=(AxisType.Auto,), devices=devices)
    model = Decoder(jax.random.key(0))
    cache, answers = first_half(model, empty_cache())
    with tempfile.TemporaryDirectory() as folder:
        eqx.tree_serialise_leaves(Path(folder) / "state.eqx", (model, cache))
        like = eqx.filter_eval_shape(lambda: (Decoder(jax.random.key(0)), empty_cache()))
        restored, restored_cache = eqx.tree_deserialise_leaves(Path(folder) / "state.eqx", like)
    expected = second_half(model, cache, answers)

    on_mesh, cache = split(model, empty_cache(), mesh)
    cache, answers_on_mesh = first_half(on_mesh, cache)
    same = np.array_equal(second_half(on_mesh, cache, answers_on_mesh), expected)
    print(f"the same tokens on a mesh of {len(devices)}: {same}")
    assert same
    same = np.array_equal(second_half(*split(restored, restored_cache, mesh), answers), expected)
    print(f"the same tokens after a checkpoint: {same}")
    assert same
    return expected


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print(main([rng.integers(VOCABULARY, size=length) for length in (5, 19, 11)], steps=32))

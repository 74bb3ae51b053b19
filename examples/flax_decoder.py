# /// script
# requires-python = ">=3.12"
# dependencies = ["jaxkv[jax]", "flax>=0.12.12", "orbax-checkpoint>=0.12.8"]
#
# [tool.uv.sources]
# jaxkv = { path = "..", editable = true }
# ///
"""A Llama in Flax NNX whose keys and values live in a paged cache: ragged prefill, jitted decoding, in place.

    uv run examples/flax_decoder.py

The weights are random. The same tokens come from one device, after a checkpoint, and from a mesh. See docs/flax.md.
"""

import functools
import os
import tempfile
from pathlib import Path

if __name__ == "__main__":  # four devices, where the host has no others
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import jaxkv

LAYERS, HIDDEN, MLP, VOCABULARY, MAX_LENGTH = 2, 64, 128, 256, 128
Q_HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 4, 16, 8
COLUMNS, ROWS = (None, "tp"), ("tp", None)  # which axis of a matrix a mesh splits


def linear(inputs: int, outputs: int, split: tuple[str | None, ...], rngs: nnx.Rngs) -> nnx.Linear:
    metadata = {"out_sharding": split, "eager_sharding": False}  # `split` puts it there, once there is a mesh
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_metadata=metadata, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.mlp_norm = nnx.RMSNorm(HIDDEN, rngs=rngs), nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.to_query = linear(HIDDEN, Q_HEADS * HEAD_SIZE, COLUMNS, rngs)
        self.to_key = linear(HIDDEN, KV_HEADS * HEAD_SIZE, COLUMNS, rngs)
        self.to_value = linear(HIDDEN, KV_HEADS * HEAD_SIZE, COLUMNS, rngs)
        self.from_heads = linear(Q_HEADS * HEAD_SIZE, HIDDEN, ROWS, rngs)
        self.gate, self.up = linear(HIDDEN, MLP, COLUMNS, rngs), linear(HIDDEN, MLP, COLUMNS, rngs)
        self.down = linear(MLP, HIDDEN, ROWS, rngs)

    def __call__(self, x, cache, layer, positions, slots, table, **tables):
        normed = self.norm(x)
        query, key, value = (
            to(normed).reshape(len(x), -1, HEAD_SIZE) for to in (self.to_query, self.to_key, self.to_value)
        )
        query, cache = cache.rope_and_cache(query, key, value, positions, table, slots, layer=layer)
        x = x + self.from_heads(cache.attend(query, **tables, layer=layer).reshape(len(x), -1))
        normed = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(normed)) * self.up(normed)), cache


class Decoder(nnx.Module):
    def __init__(self, num_blocks: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.layers = nnx.List(Layer(rngs) for _ in range(LAYERS))
        self.norm, self.head = nnx.RMSNorm(HIDDEN, rngs=rngs), linear(HIDDEN, VOCABULARY, COLUMNS, rngs)
        cache = jaxkv.PagedKVCache.create(
            num_layers=LAYERS, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_heads=KV_HEADS, head_size=HEAD_SIZE,
            dtype="float32",
        )  # fmt: skip
        self.cache = nnx.Cache(cache)  # a Variable: what a jitted function puts into it comes out of jit

    def __call__(self, tokens, positions, **tables):
        """The next token after each of `tokens`, whose keys and values are put into the cache."""
        starts = tables.get("query_start_loc")
        slots = jaxkv.slot_mapping(tables["block_tables"], starts, tables["seq_lens"], BLOCK_SIZE, len(tokens))
        config = {"head_dim": HEAD_SIZE, "rope_theta": 1e4, "max_position_embeddings": MAX_LENGTH}
        rope, cache, x = jaxkv.rope_table(config), self.cache.get_value(), self.embed(tokens)
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, cache, number, positions, slots, rope, **tables)
        self.cache.set_value(cache)
        return self.head(self.norm(x)).argmax(-1).astype(jnp.int32)


@functools.partial(nnx.jit, donate_argnames="model")
def prefill(model, tokens, positions, **tables):
    return model(tokens, positions, **tables)[tables["query_start_loc"][1:] - 1]


@functools.partial(nnx.jit, donate_argnames="model", static_argnames="steps")
def decode(model, tokens, lengths, block_tables, steps):
    @nnx.scan(in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0), length=steps)
    def step(carry, block_tables):
        model, tokens, lengths = carry
        tokens = model(tokens, lengths, block_tables=block_tables, seq_lens=lengths + 1)
        return (model, tokens, lengths + 1), tokens

    return step((model, tokens, lengths), block_tables)[1]


def split(model: Decoder, mesh: jax.sharding.Mesh) -> None:
    """Puts a model on a mesh: each device has some heads of the weights and of the cache."""
    weights, cache = nnx.state(model, nnx.Param), model.cache.get_value()
    nnx.update(model, jax.device_put(weights, nnx.get_named_sharding(weights, mesh)))
    specs = cache.partition_spec(heads="tp")
    model.cache.set_value(jax.device_put(cache, jax.tree.map(functools.partial(NamedSharding, mesh), specs)))


def addresses(model: Decoder) -> list[int]:
    arrays = model.cache.get_value().caches
    return [shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards]


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

    def first_half(model: Decoder) -> jax.Array:
        before = addresses(model)
        first = prefill(model, tokens, positions, **tables)
        rest = decode(model, first, lengths, block_tables, steps)
        print(f"{len(before)} buffers of {model.cache.get_value()} are where they were: {addresses(model) == before}")
        assert addresses(model) == before
        return jnp.concatenate([first[None], rest])

    def second_half(model: Decoder, answers: jax.Array) -> np.ndarray:
        return np.concatenate([answers, decode(model, answers[-1], lengths + steps, block_tables, steps)])

    devices = jax.devices()[: max(count for count in (1, 2, 4) if count <= jax.device_count())]
    mesh = jax.make_mesh((len(devices),), ("tp",), axis_types=(AxisType.Auto,), devices=devices)
    model, on_mesh, restored = (Decoder(num_blocks, nnx.Rngs(seed)) for seed in (0, 0, 1))
    split(on_mesh, mesh)
    split(restored, mesh)

    answers = first_half(model)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(restored, checkpointer.restore(Path(folder) / "state", nnx.state(restored)))  # onto the mesh
    expected = second_half(model, answers)

    same = np.array_equal(second_half(on_mesh, first_half(on_mesh)), expected)
    print(f"the same tokens on a mesh of {len(devices)}: {same}")
    assert same
    same = np.array_equal(second_half(restored, answers), expected)
    print(f"the same tokens after a checkpoint: {same}")
    assert same
    return expected


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print(main([rng.integers(VOCABULARY, size=length) for length in (5, 19, 11)], steps=32))

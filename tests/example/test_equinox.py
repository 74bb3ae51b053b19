"""examples/equinox_decoder.py: the tokens of a model without a cache, on one device, a mesh, and from a checkpoint."""

import dataclasses

import numpy as np
import pytest

from tests.cases.dense_llama import check_answers

eqx = pytest.importorskip("equinox")

import jax
import jax.numpy as jnp

import jaxkv
from examples import equinox_decoder as example

MATRICES = ("to_query", "to_key", "to_value", "from_heads", "gate", "up", "down")


def dense_weights(model):
    """What `next_tokens` takes."""
    layers = [
        {name: np.asarray(getattr(layer, name).weight) for name in (*MATRICES, "norm", "mlp_norm")}
        for layer in model.layers
    ]
    embed, norm, head = model.embed, model.norm.weight, model.head.weight
    return {"embed": np.asarray(embed), "norm": np.asarray(norm), "head": np.asarray(head), "layers": layers}


@pytest.mark.usefixtures("quick_compiler")
def test_the_tokens_of_a_model_without_a_cache(capsys):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(example.VOCABULARY, size=length) for length in (9, 1, 17)]  # one past a block; one token
    answers = example.main(prompts, steps=4)
    assert answers.shape == (9, 3)
    assert len(np.unique(answers)) > 9  # not one word again and again
    model = example.Decoder(jax.random.key(0))
    check_answers(dense_weights(model), prompts, answers, head_size=example.HEAD_SIZE, eps=model.norm.eps)
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0].partition(" of Paged")[0] for line in said] == [
        "2 buffers",
        "8 buffers",
        "the same tokens on a mesh of 4",
        "the same tokens after a checkpoint",
    ]
    assert all(line.endswith(": True") for line in said)


# ---- what docs/flax.md says


class Holder(eqx.Module):
    weight: jax.Array
    cache: jaxkv.PagedKVCache


def make_holder():
    cache = jaxkv.PagedKVCache.create(num_blocks=2, block_size=4, num_heads=2, head_size=8, dtype="float32")
    return Holder(jnp.ones(3), cache)


def addresses(holder):
    return [array.unsafe_buffer_pointer() for array in holder.cache.caches]


@pytest.mark.parametrize(("donate", "in_place"), [("none", False), ("all-except-first", False), ("all", True)])
def test_a_field_is_in_place_where_the_first_argument_is_donated(donate, in_place):
    @eqx.filter_jit(donate=donate)
    def step(holder, rows, slots):
        return eqx.tree_at(lambda holder: holder.cache, holder, holder.cache.write(rows, rows, slots))

    holder = make_holder()
    before = addresses(holder)
    after = step(holder, jnp.ones((1, 2, 8)), jnp.array([3]))
    assert (addresses(after) == before) is in_place
    assert holder.cache.caches[0].is_deleted() is holder.weight.is_deleted() is in_place
    assert float(after.cache.caches[0].sum()) == 16


def test_a_field_is_not_assigned_to():
    holder = make_holder()
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'cache'"):
        holder.cache = holder.cache


def test_a_donated_cache_is_gone():
    holder = make_holder()
    eqx.filter_jit(lambda cache, rows: cache.write(rows, rows, np.array([3])), donate="all")(
        holder.cache, jnp.ones((1, 2, 8))
    )
    with pytest.raises(RuntimeError, match="Array has been deleted with shape=float32"):
        _ = holder.cache.caches[0] + 1


def test_a_field_is_among_what_is_trained():
    """Why the example has the cache beside the model."""
    assert eqx.filter(make_holder(), eqx.is_inexact_array).cache.caches[0] is not None


def test_the_loop_has_no_copy_of_the_cache():
    model = example.Decoder(jax.random.key(0))
    cache = jaxkv.PagedKVCache.create(
        num_layers=2, num_blocks=1024, block_size=8, num_heads=4, head_size=16, dtype="float32"
    )
    numbers = np.arange(3, dtype=np.int32)
    lowered = example.decode.lower((model, numbers, numbers, numbers[:, None]), cache, 4)
    memory = lowered.compile().compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache.spec.nbytes
    assert memory.temp_size_in_bytes < cache.spec.nbytes / 10

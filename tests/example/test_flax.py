"""examples/flax_decoder.py: the tokens of a model without a cache, on one device, a mesh, and from a checkpoint."""

import numpy as np
import pytest

from tests.cases.dense_llama import check_answers

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")

from flax import nnx

import jaxkv
from examples import flax_decoder as example

MATRICES = ("to_query", "to_key", "to_value", "from_heads", "gate", "up", "down")


def dense_weights(model):
    """What `next_tokens` takes."""
    layers = [
        {name: np.asarray(getattr(layer, name).kernel) for name in MATRICES}
        | {name: np.asarray(getattr(layer, name).scale) for name in ("norm", "mlp_norm")}
        for layer in model.layers
    ]
    embed, norm, head = model.embed.embedding, model.norm.scale, model.head.kernel
    return {"embed": np.asarray(embed), "norm": np.asarray(norm), "head": np.asarray(head), "layers": layers}


@pytest.mark.usefixtures("quick_compiler")
def test_the_tokens_of_a_model_without_a_cache(capsys):
    rng = np.random.default_rng(7)
    prompts = [rng.integers(example.VOCABULARY, size=length) for length in (9, 1, 17)]  # one past a block; one token
    answers = example.main(prompts, steps=4)
    assert answers.shape == (9, 3)
    assert len(np.unique(answers)) > 9  # not one word again and again
    weights = dense_weights(example.Decoder(1, nnx.Rngs(0)))
    check_answers(weights, prompts, answers, head_size=example.HEAD_SIZE, eps=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0].partition(" of Paged")[0] for line in said] == [
        "2 buffers",
        "8 buffers",
        "the same tokens on a mesh of 4",
        "the same tokens after a checkpoint",
    ]
    assert all(line.endswith(": True") for line in said)


# ---- what docs/flax.md says


def make_cache():
    return jaxkv.PagedKVCache.create(num_blocks=2, block_size=4, num_heads=2, head_size=8, dtype="float32")


def test_a_bare_cache_is_an_error_of_flax_that_says_what_to_write():
    class Bare(nnx.Module):
        def __init__(self):
            self.cache = make_cache()

    with pytest.raises(ValueError, match=r"assigned to static attribute 'cache'[^$]*nnx\.data"):
        Bare()


class Holder(nnx.Module):
    def __init__(self, kind):
        self.cache = kind(make_cache())


def write(model, rows, slots):
    if isinstance(model.cache, nnx.Variable):
        model.cache.set_value(model.cache.get_value().write(rows, rows, slots))
    else:
        model.cache = model.cache.write(rows, rows, slots)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", [nnx.Cache, nnx.data])
def test_writes_come_out_of_jit_but_where_nnx_data_meets_tree_mode(kind, graph):
    model = Holder(kind)
    rows = np.ones((1, 2, 8), np.float32)
    nnx.jit(write, donate_argnums=0, graph=graph)(model, rows, np.array([3]))
    cache = model.cache.get_value() if kind is nnx.Cache else model.cache
    lost = kind is nnx.data and not graph
    assert float(cache.caches[0].sum()) == (0 if lost else 16)


@pytest.mark.parametrize(("graph", "kept"), [(True, jaxkv.PagedKVCache), (False, nnx.Cache)])
def test_an_assignment_replaces_the_variable_or_is_lost(graph, kept):
    def assign(model):
        model.cache = model.cache.write(np.ones((1, 2, 8), np.float32), np.ones((1, 2, 8), np.float32), np.array([3]))

    model = Holder(nnx.Cache)
    nnx.jit(assign, donate_argnums=0, graph=graph)(model)
    assert type(model.cache) is kept
    assert float(model.cache.caches[0].sum()) == 16 * graph


def test_what_a_variable_holds_has_no_index():
    with pytest.raises(TypeError, match="'PagedKVCache' object is not subscriptable"):
        _ = Holder(nnx.Cache).cache[...]


def test_a_split_of_weights_without_a_mesh_is_an_error_of_flax():
    with pytest.raises(ValueError, match="An auto mesh context or metadata is required"):
        nnx.Linear(4, 4, kernel_metadata={"out_sharding": (None, "tp")}, rngs=nnx.Rngs(0))


def test_the_loop_has_no_copy_of_the_cache():
    model = example.Decoder(1024, nnx.Rngs(0))
    numbers = np.arange(3, dtype=np.int32)
    lowered = example.decode.lower(model, numbers, numbers, numbers[:, None], steps=4)
    memory = lowered.compile().compiled.memory_analysis()
    size = model.cache.get_value().spec.nbytes
    assert memory.alias_size_in_bytes > size
    assert memory.temp_size_in_bytes < size / 10

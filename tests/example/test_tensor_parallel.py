"""The example's model on several devices, which share its heads: the same text in float32."""

import re

import numpy as np
import pytest

from examples.llama.gguf_model import InputError
from examples.llama.jax_session import JaxLlama
from examples.llama.paging import plan_batch
from tests.cases.devices import COLLECTIVES
from tests.cases.examples import generate, open_session, some_prompts


@pytest.fixture(scope="module")
def pair(small):
    return JaxLlama(small, tp=2)


def pointers(cache):
    return [s.data.unsafe_buffer_pointer() for array in cache.caches for s in array.addressable_shards]


@pytest.mark.parametrize("cache", [
    {}, {"layout": "PACKED_HND"}, {"kv_cache_dtype": "int8", "granularity": "token_head"},
    {"kv_cache_dtype": "fp8", "granularity": "head"},
], ids=str)  # fmt: skip
def test_the_same_text_on_two_devices(cache, pair, small_twins):
    prompts = some_prompts(5, 33)
    answers, session = generate(pair, prompts, 12, **cache)
    assert answers == generate(small_twins["jax"], prompts, 12, **cache)[0]
    for array in session.state.cache.caches:
        assert array.addressable_shards[0].data.size == array.size // 2


def test_heads_of_zeros_fill_what_devices_cannot_divide(small, small_twins):
    """Two KV heads on four devices."""
    prompts = some_prompts(5, 33)
    answers, session = generate(JaxLlama(small, tp=4), prompts, 12)
    assert session.spec.num_heads == 4
    assert answers == generate(small_twins["jax"], prompts, 12)[0]
    unused = np.asarray(session.state.cache.caches[0])[:, :, :, 2:]
    assert not unused.any()


def test_decode_is_in_place_on_two_devices(pair):
    """Only activations are communicated: sums of the products with attention_out and down, and what the head gives."""
    batch = plan_batch(some_prompts(4), 30, context_length=1024)
    session = open_session(pair, batch)
    text = session.decode_program.as_text()
    sizes = [
        np.prod([int(n) for n in shape.split(",") if n], dtype=int)
        for shape in re.findall(rf"[a-z0-9]+\[([\d,]*)\]\S* (?:{COLLECTIVES})\(", text)
    ]
    assert sizes
    assert max(sizes) <= 258 + 64  # the vocabulary, or hidden states
    session.prefill()
    before = pointers(session.state.cache)
    session.decode(30)
    assert pointers(session.state.cache) == before


def test_devices_that_there_are_not(small):
    with pytest.raises(InputError) as error:
        JaxLlama(small, tp=9)
    assert str(error.value) == "tp must be at most the number of devices, 8, got 9"
    with pytest.raises(InputError) as error:
        JaxLlama(small, tp=5)
    assert str(error.value) == "tp must divide the model's 96 columns of gate_up, got 5"


@pytest.mark.parametrize(("arguments", "text"), [
    (["--tp", "2", "--framework", "torch"], "argument --tp: must be 1, or more with --framework jax, got 2"),
    (["--tp", "0"], "argument --tp: must be 1, or more with --framework jax, got 0"),
    (["--tp", "2", "--kv-cache-dtype", "nvfp4"], "argument --tp: must be 1 for --kv-cache-dtype nvfp4, got 2"),
])  # fmt: skip
def test_bad_numbers_of_devices(arguments, text, cli, capsys):
    with pytest.raises(SystemExit):
        cli.main(["x", *arguments])
    assert text in capsys.readouterr().err


def test_the_command_runs_on_two_devices(cli, small_file, monkeypatch, capsys):
    monkeypatch.setenv("KV_MODEL", str(small_file))
    texts = []
    for tp in ("1", "2"):
        assert cli.main(["he is", "she", "--max-new-tokens", "9", "--tp", tp]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("jax on 2 × cpu" in err) == (tp == "2")
    assert texts[0] == texts[1]

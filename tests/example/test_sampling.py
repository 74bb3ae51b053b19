"""Sampling in the example: the documented draws, alike in both frameworks."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import accuracy
from examples.llama import jax_model, torch_model
from examples.llama.session import Sampling
from tests.cases.examples import EXAMPLES, TWINS, generate, some_prompts


def gumbel(seed, positions, vocabulary):
    """What `session.Sampling` says, in NumPy."""

    def mix(h):
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    sequences, ids = (np.arange(n, dtype=np.uint32) for n in (len(positions), vocabulary))
    rows = mix(mix(mix(np.full(len(positions), seed, np.uint32)) + sequences) + np.array(positions, np.uint32))
    bits = mix(rows[:, None] + ids)
    return -np.log(-np.log((bits // 512).astype(np.float32) + np.float32(0.5)) + np.float32(23 * np.log(2)))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_draws_are_those_that_are_documented(seed):
    positions = [0, 5, 8191]
    wanted = gumbel(seed, positions, 500)
    in_jax = jax_model.gumbel(jnp.uint32(seed), jnp.array(positions), 500)
    in_torch = torch_model.gumbel(seed, torch.tensor(positions), 500)
    assert np.isfinite(wanted).all()
    for found in (np.asarray(in_jax), in_torch.numpy()):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", TWINS)
def test_samples_follow_the_softmax(framework):
    # 20,000 draws of one token: each frequency is within five standard deviations of its probability.
    logits, count, temperature = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32), 20_000, 0.7
    if framework == "jax":
        draws = np.asarray(jax_model.gumbel(jnp.uint32(3), jnp.arange(count), 5))
    else:
        draws = torch_model.gumbel(3, torch.arange(count), 5).numpy()
    found = np.bincount((logits + temperature * draws).argmax(axis=1), minlength=5) / count
    wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert (np.abs(found - wanted) < 5 * np.sqrt(wanted / count)).all()


def test_sampled_twins_give_the_same_tokens_alike_in_chunks(small_twins):
    prompts, sampling = some_prompts(5, 33, 5), Sampling(1.3, 7)
    answers = [generate(llama, prompts, 12, sampling=sampling)[0] for llama in small_twins.values()]
    assert answers[0] == answers[1]
    for llama in small_twins.values():
        assert generate(llama, prompts, 12, sampling=sampling, chunk=5)[0] == answers[0]
        assert generate(llama, prompts, 12, sampling=Sampling(1.3, 8))[0] != answers[0]
        assert generate(llama, prompts, 12)[0] != answers[0]
        assert generate(llama, prompts, 12, sampling=Sampling(1e-6, 7))[0] == generate(llama, prompts, 12)[0]


def test_sequences_with_one_prompt_are_sampled_apart(small_twins):
    prompt = some_prompts(5)[0]
    for llama in small_twins.values():
        first, second = generate(llama, [prompt, prompt], 12, sampling=Sampling(1.0, 0))[0]
        assert first != second


def test_table_of_accuracy(small_file, tmp_path):
    path = tmp_path / "accuracy.json"
    options = ["--tokens", "300", "--sample", "40", "--new-tokens", "4", "--formats", "auto", "int8", "nvfp4"]
    accuracy.main([*options, "--model", str(small_file), "--json", str(path)])
    exact, bfloat16, *quantised = json.loads(path.read_text())["rows"]
    assert (exact["bits"], exact["agreement"], exact["prefix"], exact["Δ nll"]) == (32, 1, 4, 0)
    assert bfloat16["bits"] == 16
    assert [(row["kv_cache_dtype"], row["granularity"], row["bits"]) for row in quantised] == [
        *(("int8", "token_head", 8 + 32 / 16), ("int8", "tensor", 8), ("int8", "head", 8)),
        *(("nvfp4", "tensor", 4.5), ("nvfp4", "head", 4.5)),
    ]
    for row in (bfloat16, *quantised):
        assert row["± se"] > 0
        assert 0.3 < row["agreement"] <= 1  # of random weights, which are close to undecided
        assert row["perplexity"] == pytest.approx(exact["perplexity"], rel=0.2)


def test_documented_calibration():
    (block,) = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "accuracy.md").read_text(), re.DOTALL)
    exec(compile(block, "accuracy.md", "exec"), names := {})
    assert (names["cache"].k_scale.shape, names["cache"].v_scale.shape) == ((4, 8), (4, 8))
    key, value = (x.astype("float32") for x in names["cache"].gather(names["tables"], names["lengths"], 32, layer=3))
    assert abs(key[0] - names["key"][0].astype("float32")).max() < 0.03
    assert abs(value[0] - names["value"][0].astype("float32")).max() < 0.03

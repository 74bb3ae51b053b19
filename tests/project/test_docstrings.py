"""What public docstrings promise: examples that print what they say, and the same sentences in both twins."""

import doctest
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from kvcore.batch import RaggedBatch, ragged_batch
from kvcore.fitting import blocks_that_fit
from kvcore.layout import CacheLayout
from kvcore.pool import BlockPool, OutOfBlocks
from kvcore.sequence import Sequence
from kvcore.slots import check_tables, find_duplicate_slots

TWINS = {"jax": jaxkv, "torch": torchkv}
SHARED = {
    each.__name__: each
    for each in (
        BlockPool,
        CacheLayout,
        OutOfBlocks,
        RaggedBatch,
        Sequence,
        blocks_that_fit,
        check_tables,
        find_duplicate_slots,
        ragged_batch,
    )
}
JAX_ONLY = ["heads", "local_indices", "context_attention", "context_lens", "context_slots"]
OPS = sorted(set(jaxkv.__all__) - set(SHARED) - {"PagedKVCache", *JAX_ONLY})
METHODS = ["create", "write", "rope_and_cache", "attend", "gather"]
UNLIKE = [
    "from_dlpack",
    "precompile",
]  # they do things so different that only the first sentence is the same
NAMES = [*sorted(set(OPS) - set(UNLIKE)), "PagedKVCache", *(f"PagedKVCache.{method}" for method in METHODS)]


def public(twin, name):
    """A function, class or method by the name that users write after the package's."""
    found = TWINS[twin]
    for part in name.split("."):
        found = getattr(found, part)
    return found


# ---- examples


def run_examples(found, name, **names):
    """Runs the examples of a docstring; says how many lines they have."""
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    output = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert not results.failed, "".join(output)
    return results.attempted


@pytest.mark.parametrize("name", [*OPS, "PagedKVCache", *JAX_ONLY])
def test_examples_of_jax(name):
    assert run_examples(public("jax", name), name, jaxkv=jaxkv, jax=jax, jnp=jnp) > 2


@pytest.mark.parametrize("name", [*OPS, "PagedKVCache"])
def test_examples_of_torch(name):
    assert run_examples(public("torch", name), name, torchkv=torchkv, torch=torch) > 2


@pytest.mark.parametrize(
    "name",
    [
        "BlockPool",
        "CacheLayout.describe",
        "CacheLayout.draw",
        "CacheLayout.from_vllm",
        "CacheLayout.to_json",
        "CacheLayout.from_json",
        "Sequence",
        "blocks_that_fit",
        "check_tables",
        "find_duplicate_slots",
        "ragged_batch",
    ],
)
def test_examples_of_both(name):
    owner, _, method = name.partition(".")
    found = getattr(SHARED[owner], method) if method else SHARED[owner]
    assert run_examples(found, name, np=np, **SHARED) > 0


@pytest.mark.parametrize("name", SHARED)
def test_what_both_have_is_one_object(name):
    assert public("jax", name) is public("torch", name) is SHARED[name]


# ---- the same sentences

# What torchkv says, and jaxkv says instead.
WORDS = [
    (r", in place\.$", "."),
    (r"\btensors\b", "arrays"),
    (r'(?<!")\btensor\b', "array"),
    (r"`torchkv\.", "`jaxkv."),
    (r'"torch"', '"xla"'),
    (r"on CPU arrays, for tests", "through a host callback, for tests"),
    (r"a shape, layout, choice or device does", "a shape, layout or choice does"),
    (r"a shape, choice, address or device does", "a shape or choice does"),
    (r"a shape, number or device does", "a shape or number does"),
    (
        r"a shape, a choice or a device does not fit, or source and destination overlap",
        "a shape or a choice does not fit, or a cache is split over devices along another axis than heads",
    ),
    (r"a shape or a device does not fit, or out or lse overlaps.*", "a shape does not fit."),
    (r"[Aa] Tensor of one integer, on the (?:caches'|cache's) device,", "A traced integer"),
    (r"in a Tensor, nothing", "in a traced integer, nothing"),
    (r"or a Tensor of one integer", "maybe traced"),
    (r"on the (?:caches'|cache's) device; or a number, of which each call makes a array", "also traced; or a number"),
    (r"Or the scale cache of", "Or the scale cache (array or Ref) of"),
    (r", memory of the host is not pinned, or", ", or"),
    (r"or the caches overlap", "or both caches are one Ref"),
    (r"or caches? or scale caches overlap, or out overlaps itself or another argument", "or a Ref is passed twice"),
    (r"or caches? or scale caches overlap", "or a Ref is passed twice"),
    (r"grad mode is on, and an argument requires gradients", "on differentiation"),
    (r"^`check_tables` finds", "Outside jit, `check_tables` finds"),
    (r"A plain object, whose arrays `write` changes in place\.", ""),
]

# Where jaxkv's sentence says more than its twin, about what only JAX has; taken out of it.
JAX_WORDS = [
    (r",? and returns the new (caches?|arrays)\.$", "."),
    (r"; a Ref if key_cache is one", ""),
    (r"; static\.", "."),
    (r"; `jax\.lax\.stop_gradient` says that none is wanted", ""),
    (r"; by \"xla\" on CPUs only, where numbers below 2\^-126 may become zeros on the way", ""),
    (r"; then the new caches, unless they are Refs", ""),
    (r", an array is split over blocks, or", ", or"),
    (r"The rotated query, and the new cache: .*", "The rotated query."),
    (
        r", a Ref is passed twice, or a list or NumPy array of positions has one past the table",
        ", or a Ref is passed twice",
    ),
]

# Sentences that have no counterpart, as they begin.
ONLY = {
    "jax": [
        "A `jax.Ref` is updated in place.",
        "A Ref if the caches are.",
        "The update is in place where XLA may reuse the memory",
        "Otherwise XLA copies it first.",
        "`jax.Ref`s are updated in place.",
        "Carry a whole stacked cache through `lax.scan`",
        "The new ",  # what writers return
        "NotImplementedError: on differentiation.",  # of writers: in torch they are followed by no gradient, silently
        "(On a GPU XLA's division is approximate",
        "It runs inside jit, scan, while_loop, vmap and shard_map",
        "With operands that are split over devices, each device gets all of them",
        "With the cache split over heads, each device attends with its own.",
        "A pytree: donate it",
        "Arrays may be split over devices along any axis but `block`.",
        "A vmap is one call, in place,",
        "Where heads are split over devices, both caches must be",
        "Source is split as destination is.",
        "One of the two has memory kind",
        "Elsewhere blocks are sliced",
    ],
    "torch": [
        "Everything runs on the current stream",
        "What is launched depends on shapes only, never on lengths.",
        "Tensors may be strided.",
        "Tensors may be strided, and no byte",
        "DTensors, with",
        "One of the two is in pinned memory",
        "Pinned memory that nobody refers to",
        "Caches are changed in place.",
        "No gradient flows into the caches.",
        "Under torch.compile nothing is copied",
        "Pass the array and take the views inside.",
        "vLLM's names are understood, too",
        "Such a cache begins at a multiple of 4 bytes.",
        "NotImplementedError: out or lse is given",
        "NotImplementedError: on differentiation.",
    ],
}


def sentences(twin, name):
    """The sentences of a docstring, without the example and the arguments that only one twin has."""
    found = public(twin, name)
    text, _, example = inspect.getdoc(found).partition("\nExample:\n")
    text += "\n\n" + example.rpartition("\n\n")[2] * bool(re.search(r"\n\n\S", example))
    mine, others = (inspect.signature(public(t, name)).parameters for t in (twin, *(TWINS.keys() - {twin})))
    entries = re.split(r"\n\s*\n|\n(?= {4}\S)|\n(?=\w+:\n)", text)
    said = []
    for entry in entries:
        entry = " ".join(entry.split())
        if entry.partition(":")[0] in mine.keys() - others.keys():
            continue
        said += re.split(r"(?<=\.)\s+|(?<=\.\))\s+", entry)
    return [s for s in said if s and s not in ("Args:", "Returns:", "Raises:", "Attributes:")]


def in_common(twin, name):
    """What is left to compare."""
    left = []
    for sentence in sentences(twin, name):
        for pattern, words in WORDS if twin == "torch" else JAX_WORDS:
            sentence = re.sub(pattern, words, sentence)
        if sentence and not sentence.startswith(tuple(ONLY[twin])):
            left.append(sentence)
    return left


@pytest.mark.parametrize("name", NAMES)
def test_twins_say_the_same(name):
    assert in_common("torch", name) == in_common("jax", name)


@pytest.mark.parametrize("name", UNLIKE)
def test_twins_begin_alike(name):
    first, other = (sentences(twin, name)[0] for twin in TWINS)
    assert first == other


@pytest.mark.parametrize("twin", TWINS)
def test_what_only_one_twin_says_is_said(twin):
    said = [sentence for name in NAMES for sentence in sentences(twin, name)]
    for pattern, words in WORDS if twin == "torch" else JAX_WORDS:
        said = [re.sub(pattern, words, sentence) for sentence in said]
    assert [start for start in ONLY[twin] if not any(s.startswith(start) for s in said)] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("twin", TWINS)
def test_docstrings_stand_on_their_own(twin, name):
    assert not re.search(
        r"\b[Ll]ikewise\b|\bbut for$|\bsee above\b|: As in\b|^As `", inspect.getdoc(public(twin, name))
    )

"""When the MLA kernel for Hopper is chosen, what its descriptor says, and how positions are split for it."""

import heapq
from itertools import product

import numpy as np
import pytest

from kvcore.arrays import ArraySpec
from kvcore.plan.attention import plan_attention
from kvcore.plan.attention_tile import Tile, TileChoice, balance_splits
from kvcore.plan.hopper import plan_hopper
from kvcore.plan.kernel import INTERPRETER, Target
from tests.cases.hopper import H100, latent

BLOCKS, SLOTS, WORDS = 100, 16, 576


def name_of(call, target=H100, **options):
    return plan_attention(call, target, **{"descriptors": True, **options}).attend.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "tokens"), [(1, None), (16, None), (128, None), (16, 80), (128, 4096)])
def test_it_is_chosen_for_few_and_many_query_rows(dtype, heads, tokens):
    assert name_of(latent(heads, dtype=dtype, tokens=tokens)) == "hopper_mla_kernel"


@pytest.mark.parametrize(
    "options",
    [
        dict(options=(-0.5, False, None, None), tokens=70),
        dict(options=(None, True, 100, 30.0), sinks=True),
        dict(layers=3),
        *[dict(block_size=size) for size in (8, 16, 24, 48, 64, 128, 256)],
    ],
)
def test_it_is_chosen_for_all_that_it_can_do(options):
    assert name_of(latent(**options)) == "hopper_mla_kernel"


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_cache_dtype="fp8_ds_mla", cache_dtype="uint8"),
        dict(dtype="float32"),
        dict(cache_dtype="float16"),
        dict(dtype="float16", cache_dtype="bfloat16"),
        dict(head_sizes=(320, 256)),
        dict(head_sizes=(576, 256)),
        dict(head_sizes=(512, 512)),
        *[dict(block_size=size) for size in (1, 4, 12, 264, 512)],
    ],
)
def test_other_calls_keep_the_other_kernel(options):
    for tokens in (None, 128):
        assert name_of(latent(tokens=tokens, **options)) == "paged_attention_kernel"


@pytest.mark.parametrize("target", [INTERPRETER, Target("cuda", 80), Target("cuda", 100), Target("hip", "gfx942", 64)])
def test_it_is_for_hopper_only(target):
    assert name_of(latent(), target) == "paged_attention_kernel"


def test_without_descriptors_the_other_kernel_is_kept():
    """Triton has no Gluon, or the cache does not begin at a multiple of 16."""
    plan = plan_attention(latent(), H100)
    assert plan.attend.name == "paged_attention_kernel"
    assert plan.attend.descriptors == {}


@pytest.mark.parametrize(("version", "has"), [("3.6.0", False), ("3.7.1", False), ("3.8.0", True), ("3.10.0", True)])
def test_gluon_is_used_from_triton_3_8_on(monkeypatch, version, has):
    triton = pytest.importorskip("triton")
    from kvcore.run.compiler import has_gluon

    monkeypatch.setattr(triton, "__version__", version)
    assert has_gluon() == has


def cache(block, slot, dim=1):
    """A latent cache of bfloat16, with these strides."""
    return ArraySpec((BLOCKS, SLOTS, WORDS), "bfloat16", strides=(block, slot, dim))


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        (cache(SLOTS * WORDS, WORDS), True),
        (cache(SLOTS * 584, 584), True),
        (cache(SLOTS * WORDS * 2, WORDS), True),  # every other block of a larger cache
        (cache(WORDS, BLOCKS * WORDS), True),
        (cache(SLOTS * 580, 580), False),
        (cache(SLOTS * WORDS + 4, WORDS), False),
        (cache(SLOTS * WORDS * 2, WORDS * 2, 2), False),
        (cache(2**39, WORDS), False),  # 2^40 bytes
        (cache(2**39 - 8, WORDS), True),
    ],
)
def test_rows_must_lie_where_tma_can_copy_them(spec, chosen):
    call = latent(16, block_size=SLOTS, spec=spec)
    assert (plan_hopper(call, H100, False) is not None) == chosen
    if chosen:
        block, *rest = spec.strides
        assert plan_hopper(call, H100, False).descriptors["key_cache_ptr"].strides == (block, 8, *rest)


@pytest.mark.parametrize("offset", [4, 8, 12, SLOTS * WORDS + 8, 3 * WORDS + 16])
def test_what_comes_before_a_cache_is_in_coordinates(offset):
    call = latent(16, block_size=SLOTS, spec=cache(2 * SLOTS * WORDS, WORDS))
    extents, key, _ = call.cache.placement
    placement = call.cache.placement._replace(key=key._replace(offset=offset))
    plan = plan_hopper(call._replace(cache=call.cache._replace(placement=placement)), H100, False)
    if offset % 8:
        assert plan is None
        return
    origin, descriptor = plan.constants.origin, plan.descriptors["key_cache_ptr"]
    for at in ([0, 0, 0, 0], [extents.num_blocks - 1, 0, SLOTS - 1, WORDS - 64]):
        coordinates = np.array(at) + origin[1:]
        assert (coordinates < descriptor.shape).all()
        assert coordinates @ descriptor.strides == offset + key.of(0, at[0], at[2], 0, at[3])


@pytest.mark.parametrize("layers", [None, 3])
def test_coordinates_reach_what_addresses_do(layers):
    call = latent(layers=layers, sequences=5, context=256, block_size=16)
    plan = plan_hopper(call, H100, False)
    extents, key, _ = call.cache.placement
    descriptor = plan.descriptors["key_cache_ptr"]
    assert list(plan.descriptors) == ["key_cache_ptr"]  # V is a part of K
    assert descriptor.block == (*[1] * (len(descriptor.shape) - 2), 16, 64)
    sizes = (extents.num_layers or 1, extents.num_blocks, 1, extents.block_size, WORDS)
    assert descriptor.shape == sizes[5 - len(descriptor.shape) :]
    for at in ([0] * 5, [size - 1 for size in sizes], [0, 7, 0, 9, 512]):
        coordinates = (np.array(at) + plan.constants.origin)[5 - len(descriptor.shape) :]
        layer, block, head, slot, dim = at
        assert coordinates @ descriptor.strides == key.of(layer, block, slot, head, dim)


@pytest.mark.parametrize(("block_size", "box"), [(8, 8), (16, 16), (24, 8), (48, 16), (64, 64), (128, 64), (256, 64)])
def test_a_box_lies_in_one_block_of_the_cache_and_in_one_of_a_pair(block_size, box):
    assert plan_hopper(latent(block_size=block_size), H100, False).constants.box == box


SPLITS = {  # heads, sequences, positions: on 132 multiprocessors, each of which has one program at a time
    (128, 64, 8192): 1,  # 128 programs
    (128, 66, 8192): 1,  # 132
    (128, 67, 8192): 4,  # 134: two turns without splits, of which one is nearly empty; five of 16 tiles with four
    (128, 50, 8192): 1,
    (128, 50, 32768): 5,  # four turns of 52 tiles, instead of one of 256
    (128, 33, 8192): 2,
    (128, 8, 32768): 8,
    (128, 1, 131072): 64,
    (16, 64, 8192): 2,
    (16, 1, 131072): 128,
    (16, 1, 1024): 4,
    (16, 1, 512): 1,
    (16, 1, 64): 1,
}


@pytest.mark.parametrize("shape", SPLITS)
def test_splits(shape):
    heads, sequences, context = shape
    plan = plan_attention(latent(heads, sequences=sequences, context=context), H100, descriptors=True)
    assert plan.splits == SPLITS[shape]
    assert plan.grid == (sequences * -(-heads // 64), plan.splits, 1)
    assert plan.attend.constexprs["P"].split == (plan.splits > 1)
    assert plan.merge_grid == (sequences * heads, 4, 1)


@pytest.mark.parametrize(("heads", "sequences"), [(128, 64), (16, 64), (128, 8), (16, 1)])
def test_one_token_each_is_split_alike_with_and_without_query_start_loc(heads, sequences):
    splits = {
        plan_attention(latent(heads, sequences=sequences, tokens=tokens), H100, descriptors=True).splits
        for tokens in (None, sequences)
    }
    assert len(splits) == 1


def duration(programs, tiles, splits):
    """Of all programs in tiles, where each multiprocessor takes another as soon as one ends."""
    free = [0] * 132
    for _ in range(programs * splits):
        heapq.heappush(free, heapq.heappop(free) + -(-tiles // splits) + 2 + 3 * (splits > 1))
    return max(free)


@pytest.mark.parametrize(("sequences", "context"), [*product((1, 2, 3, 7, 31, 65, 131, 200), (128, 896, 4096, 33_000))])
def test_no_other_number_of_splits_would_be_done_earlier(sequences, context):
    call = latent(16, sequences=sequences, context=context)
    splits = balance_splits(call, TileChoice(Tile(64, 128, 2), 4, 1, 256), H100)
    tiles = -(-context // 128)
    most = -(-context // 256)
    assert 1 <= splits <= min(most, 132)
    assert (splits - 1) * -(-tiles // splits) < tiles  # the last one has something to do
    durations = {n: duration(sequences, tiles, n) for n in range(1, min(most, 132) + 1)}
    assert durations[splits] == min(durations.values())


@pytest.mark.parametrize("shape", [(0, 0), (1, 0), (0, 4)])
def test_where_there_is_nothing_nothing_is_split(shape):
    call = latent(sequences=1)._replace(block_tables=ArraySpec(shape, "int32"))
    assert plan_attention(call, H100, descriptors=True).splits == 1

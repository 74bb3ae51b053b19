"""When the attention kernel for Hopper is chosen, and where its descriptors say that K and V are."""

from itertools import product

import numpy as np
import pytest

from kvcore.arrays import ArraySpec
from kvcore.layout import CONSTANTS as LAYOUTS
from kvcore.plan.attention import plan_attention
from kvcore.plan.hopper import plan_hopper
from kvcore.plan.kernel import INTERPRETER, Target
from tests.cases.hopper import H100, HEADS, is_for_hopper, prefill
from tests.cases.layouts import VLLM


@pytest.mark.parametrize("head_sizes", HEADS)
def test_it_is_chosen_where_rows_are_many(head_sizes):
    call = prefill(*head_sizes)
    assert is_for_hopper(plan_attention(call, H100, descriptors=True))
    assert not is_for_hopper(plan_attention(call, H100))  # Triton has no Gluon, or caches begin anywhere


@pytest.mark.parametrize("target", [INTERPRETER, Target("cuda", 80), Target("cuda", 100), Target("hip", "gfx942", 64)])
def test_it_is_for_hopper_only(target):
    assert not is_for_hopper(plan_attention(prefill(), target, descriptors=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(head_size=80),
        dict(head_size=512),
        dict(dtype="float32"),
        dict(cache_dtype="float16"),
        dict(layout="HEAD_MAJOR"),
        dict(block_size=4),
        dict(block_size=12),
        dict(block_size=512),
        dict(tokens=16),
    ],
)
def test_other_calls_keep_the_other_kernel(options):
    assert not is_for_hopper(plan_attention(prefill(**options), H100, descriptors=True))


def test_a_decode_keeps_the_other_kernel():
    call = prefill(tokens=64, sequences=64, group=64)._replace(query_start_loc=None)
    assert not is_for_hopper(plan_attention(call, H100, descriptors=True))


@pytest.mark.parametrize(("max_blocks", "block_size", "long"), [(64, 16, False), (65, 16, True), (4, 256, False)])
def test_short_contexts_keep_the_other_kernel(max_blocks, block_size, long):
    plan = plan_attention(prefill(max_blocks=max_blocks, block_size=block_size), H100, descriptors=True)
    assert is_for_hopper(plan) == long


def test_heads_that_do_not_lie_in_16_bytes_keep_the_other_kernel():
    call = prefill()
    key = call.cache.placement.key
    for address in (key._replace(offset=4), key._replace(slot=1028), key._replace(dim=2)):
        placement = call.cache.placement._replace(key=address)
        assert plan_hopper(call._replace(cache=call.cache._replace(placement=placement)), H100, True) is None
    assert plan_hopper(call, H100, True) is not None


AFFINE = [name for name in LAYOUTS if name not in ("MLA", "HEAD_MAJOR")]


@pytest.mark.parametrize(("layout", "layers"), [*product(AFFINE, (None, 3)), *product(VLLM.values(), (1, 3))])
def test_coordinates_reach_what_addresses_do(layout, layers):
    call = prefill(layout=layout, layers=layers, blocks=5, num_heads=3, block_size=16)
    plan = plan_hopper(call, H100, True)
    extents, *addresses = call.cache.placement
    origins = (plan.constants.k_origin, plan.constants.v_origin)
    for address, origin, descriptor in zip(addresses, origins, plan.descriptors.values(), strict=True):
        sizes = (extents.num_layers or 1, extents.num_blocks, extents.num_heads, extents.block_size, 128)
        last = [size - 1 for size in sizes]
        axes = slice(5 - len(descriptor.shape), None)
        for at in ([0] * 5, last, [0, 2, 1, 7, 8]):
            coordinates = (np.array(at) + origin)[axes]
            layer, block, head, slot, dim = at
            assert (coordinates < descriptor.shape).all()
            assert coordinates @ descriptor.strides == address.of(layer, block, slot, head, dim)
        assert (np.array(descriptor.strides[:-1]) % 8 == 0).all()


@pytest.mark.parametrize(("block_size", "box"), [(8, 8), (16, 16), (24, 8), (48, 16), (64, 64), (128, 128), (256, 128)])
def test_a_box_lies_in_one_block(block_size, box):
    assert plan_hopper(prefill(block_size=block_size), H100, True).constants.box == box


def test_a_strided_cache_is_described_as_it_lies():
    spec = ArraySpec((1024, 16, 8, 128), "bfloat16", strides=(16 * 16 * 128, 16 * 128, 128, 1))
    from kvcore.contract.cache import CacheArguments
    from kvcore.contract.read import AttentionOptions, check_attention

    integers = ArraySpec((2, 512), "int32"), ArraySpec((2,), "int32"), ArraySpec((3,), "int32")
    call = check_attention(
        ArraySpec((4096, 32, 128), "bfloat16"), *integers, None, AttentionOptions(None, True, None, None),
        CacheArguments([spec, spec]), None,
    )  # fmt: skip
    assert plan_hopper(call, H100, True).descriptors["key_cache_ptr"].strides == (16 * 16 * 128, 128, 16 * 128, 1)

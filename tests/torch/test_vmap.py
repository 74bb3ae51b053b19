"""torchkv under vmap."""

import pytest
import torch

import torchkv
from tests.cases.arrays import from_torch, random_bits, run_oracle, to_torch, with_case
from tests.cases.torch_compile import assert_bits
from tests.cases.torch_writes import BACKENDS, flash, small, tensors


def batch_of(rng, size=3, slots=None, **options):
    """Cases with slots of their own: no two cases write to one slot, so that they may share caches."""
    case = small(rng, **options)
    blocks, block_size = case.layout.place([c.shape for c in case.caches], head_size=16).extents[1:3]
    slots = rng.permutation(blocks * block_size)[: size * 5].reshape(size, 5)
    slots[:, 2] = -1
    return [
        with_case(
            case,
            key=random_bits(rng, case.key.shape, case.key.dtype.name),
            value=random_bits(rng, case.value.shape, case.value.dtype.name),
            caches=[random_bits(rng, c.shape, c.dtype.name) for c in case.caches],
            slot_mapping=slots[i],
        )
        for i in range(size)
    ]


def stacked(cases, dim=0):
    """key, value and slots of cases with a batch axis."""
    key = torch.stack([to_torch(c.key) for c in cases], dim)
    value = torch.stack([to_torch(c.value) for c in cases])
    return key, value, torch.stack([to_torch(c.slot_mapping) for c in cases])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["NHD", "HEAD_MAJOR", "PACKED_NHD"])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_vmap_with_shared_caches(dim, layout, backend, rng):
    cases = batch_of(rng, layout=layout)
    caches = [to_torch(c.copy()) for c in cases[0].caches]

    def write(key, value, slots):
        assert cases[0].op(torchkv)(key, value, *caches, slots, backend=backend) is None
        return slots

    torch.vmap(write, in_dims=(dim, 0, 0))(*stacked(cases, dim))
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want))
    assert_bits(caches, want)


def test_vmap_with_shared_caches_and_key_longer_than_slots(rng):
    cases = batch_of(rng)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = stacked(cases)
    torch.vmap(lambda k, v, s: (flash(k, v, *caches, s), s)[1])(key, value, slots[:, :4])
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want, slot_mapping=case.slot_mapping[:4]))
    assert_bits(caches, want)


def test_vmap_with_shared_caches_and_shared_rows(rng):
    cases = batch_of(rng)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = stacked(cases)
    torch.vmap(lambda v, s: (flash(key[0], v, *caches, s), s)[1])(value, slots)
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want, key=cases[0].key))
    assert_bits(caches, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layout", "dim"), [("NHD", 0), ("NHD", 2), ("HND", 4), ("KV_NHD", 1), ("PACKED_HND", 3)])
def test_vmap_with_caches_of_their_own(layout, dim, backend, rng):
    cases = batch_of(rng, layout=layout)
    caches = [
        torch.stack([to_torch(c) for c in arrays], dim) for arrays in zip(*[c.caches for c in cases], strict=True)
    ]

    def write(key, value, slots, *caches):
        assert cases[0].op(torchkv)(key, value, *caches, slots, layout=layout, backend=backend) is None
        return slots

    torch.vmap(write, in_dims=(0, 0, 0, *[dim] * len(caches)))(*stacked(cases), *caches)
    for i, case in enumerate(cases):
        assert_bits([c.select(dim, i) for c in caches], run_oracle(case))


def test_vmap_with_scales_and_layers_of_their_own(rng):
    cases = batch_of(rng, num_layers=3, layer=1, kv_cache_dtype="fp8")
    scales = [0.5, 0.37, 3.0]
    cases = [with_case(c, layer=i, k_scale=s) for i, (c, s) in enumerate(zip(cases, scales, strict=True))]
    caches = [torch.stack([to_torch(c) for c in arrays]) for arrays in zip(*[c.caches for c in cases], strict=True)]

    def write(key, value, slots, key_cache, value_cache, k_scale, layer):
        flash(key, value, key_cache, value_cache, slots, "fp8", k_scale, cases[0].v_scale, layer=layer)
        return slots

    torch.vmap(write)(*stacked(cases), *caches, torch.tensor(scales), torch.arange(3))
    for i, case in enumerate(cases):
        assert_bits([c[i] for c in caches], run_oracle(case))


def test_vmap_in_vmap(rng):
    cases = batch_of(rng, size=4)
    caches = [to_torch(c.copy()) for c in cases[0].caches]
    key, value, slots = (x.unflatten(0, (2, 2)) for x in stacked(cases))
    torch.vmap(torch.vmap(lambda k, v, s: (flash(k, v, *caches, s), s)[1]))(key, value, slots)
    want = cases[0].caches
    for case in cases:
        want = run_oracle(with_case(case, caches=want))
    assert_bits(caches, want)


@pytest.mark.parametrize(
    ("mapped", "message"),
    [
        (["key"], "vmap must map slot_mapping where it does not map the caches"),
        (["key", "value"], "vmap must map slot_mapping where it does not map the caches"),
        (["slot_mapping", "key_cache"], "vmap must map all caches or none"),
        (["slot_mapping", "value_cache"], "vmap must map all caches or none"),
        (["slot_mapping", "k_scale"], "vmap must map the caches where it maps scales or layer"),
        (["slot_mapping", "v_scale"], "vmap must map the caches where it maps scales or layer"),
        (["slot_mapping", "layer"], "vmap must map the caches where it maps scales or layer"),
        (
            ["key", "key_cache", "value_cache"],
            "key must have shape (num_tokens, num_heads, head_size), got (5, 48)",
        ),
    ],
    ids=str,
)
def test_vmap_that_cannot_be(mapped, message, rng):
    case = small(rng, num_layers=2, layer=1, kv_cache_dtype="fp8")
    key, value, caches, slots = tensors(case)
    arguments = {
        "key": key,
        "value": value,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slot_mapping": slots,
    }
    arguments |= {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(2.0), "layer": torch.tensor(1)}
    if message.startswith("key"):
        arguments["key"] = key.flatten(1)
    batched = {name: torch.stack([arguments[name]] * 2) for name in mapped}
    before = {name: from_torch(x).copy() for name, x in (arguments | batched).items() if "cache" in name}

    def write(batched):
        flash(**arguments | batched, kv_cache_dtype="fp8", layout=case.layout)
        return next(iter(batched.values()))

    with pytest.raises(ValueError) as error:  # noqa: PT011
        torch.vmap(write)(batched)
    assert str(error.value) == message
    for name, cache in before.items():
        assert_bits([(arguments | batched)[name]], [cache])

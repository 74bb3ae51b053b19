"""What each rank checks of slots that are read, and of caches that move: see `torch_processes`."""

import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torchkv
import torchkv.distributed
from tests.cases.dtensors import DEVICE, SIZE, SLOTS, integers, raises, same, split, whole_caches


def of_scales(layout, placements):
    """Placements of scale caches `block slot head`, or of another order, given those of key and value."""
    axis = layout.split().index("head")
    return [Shard(axis) if isinstance(p, Shard) else p for p in placements]


def slots_and_moves(mesh, heads_axis, placements):
    """Slots that are read, and caches that move into others: split alike, or the source whole on every rank."""
    heads, slots, pairs = 4, integers(SLOTS), integers([[3, 0], [9, 14], [-1, 2], [17, 5], [0, 99], [4, 23]])
    rng = torch.Generator().manual_seed(0)
    sides = [("NHD", "block slot head"), ("HND", "head block slot"), ("PALLAS", "block slot head")]
    for options in ({}, dict(kv_cache_dtype="fp8"), dict(kv_cache_dtype="int8", per_token_head=True)):
        of_tokens = options.get("per_token_head", False)
        wholes, parts = [], []
        for layout, scale_layout in sides:
            if of_tokens:
                options["scale_layout"] = scale_layout
            whole = whole_caches(layout, heads, **options)
            memory = [*whole.caches, *((whole.k_scale, whole.v_scale) if of_tokens else ())]
            for tensor in memory:
                values = torch.rand(tensor.shape, generator=rng) * (1 if tensor.is_floating_point() else 100)
                tensor.copy_(values)  # the same on all ranks
            of_memory = [*torchkv.distributed.placements(layout, mesh, heads=heads_axis)]
            of_memory += [of_scales(scale_layout, placements)] * 2 * of_tokens
            wholes.append(whole)
            parts.append([torchkv.PagedKVCache(tuple(ts[:2]), whole.spec, *ts[2:]) for ts in (
                split(mesh, memory, of_memory), split(mesh, memory, [[Replicate()] * mesh.ndim] * len(memory)),
            )])  # fmt: skip
        for whole, (part, _) in zip(wholes, parts, strict=True):
            for g, w in zip(part.read(slots, dtype=torch.float32), whole.read(slots, dtype=torch.float32), strict=True):
                same(g, w)
                assert tuple(g.placements) == tuple(placements)
        out = split(mesh, [torch.empty(7, heads, SIZE, device=DEVICE) for _ in range(2)], [placements] * 2)
        if not options:
            torchkv.gather_slots(parts[0][0].caches, slots, out=out)
            for g, w in zip(out, torchkv.gather_slots(wholes[0].caches, slots), strict=True):
                same(g, w)
        source, splits = wholes[0], parts[0]
        for target, (new, _) in zip(wholes[1:], parts[1:], strict=True):
            for old, some in ((splits[0], pairs), (splits[1], pairs.flip(1)), (splits[0], None)):
                before = [t.to_local().data_ptr() for t in new.caches]
                assert old.relayout(new, some) is None
                source.relayout(target, some)
                for g, w in zip(new.caches, target.caches, strict=True):
                    same(g, w)
                if of_tokens:
                    same(new.k_scale, target.k_scale)
                    same(new.v_scale, target.v_scale)
                assert [t.to_local().data_ptr() for t in new.caches] == before
        quantised, of_heads = whole_caches("HND", heads, kv_cache_dtype="int4"), splits[0]
        target = split(mesh, quantised.caches, torchkv.distributed.placements("HND", mesh, heads=heads_axis))
        of_heads.relayout(torchkv.PagedKVCache(tuple(target), quantised.spec), pairs)  # numbers move, not bits
        source.relayout(quantised, pairs)
        for g, w in zip(target, quantised.caches, strict=True):
            same(g, w)
    requantised(mesh, heads_axis, wholes[0], parts[0], pairs)


def requantised(mesh, heads_axis, whole, parts, pairs):
    """A cache of int8 with scales of tokens, split or whole, into others that have static scales, or nvfp4."""
    heads, scales = 4, [torch.rand(4, device=DEVICE) + 0.5, torch.rand(1, device=DEVICE) + 0.5]
    for scale in scales:  # the same on all ranks
        scale.copy_(torch.arange(scale.numel()) + 0.5)
    for options in (dict(kv_cache_dtype="fp8"), {}):
        target = whole_caches("HND", heads, **options)
        like = split(mesh, target.caches, torchkv.distributed.placements("HND", mesh, heads=heads_axis))
        want, got = (
            torchkv.PagedKVCache(tuple(caches), target.spec, *(scales if options else ()))
            for caches in (target.caches, like)
        )
        whole.relayout(want, pairs)
        for old in parts:
            old.relayout(got, pairs)
            for g, w in zip(got.caches, want.caches, strict=True):
                same(g, w)
        if options:  # and back, with static scales of what is read
            ours, theirs = (whole_caches("NHD", heads) for _ in range(2))
            new = split(mesh, theirs.caches, torchkv.distributed.placements("NHD", mesh, heads=heads_axis))
            want.relayout(ours, pairs)
            got.relayout(torchkv.PagedKVCache(tuple(new), theirs.spec), pairs)
            for g, w in zip(new, ours.caches, strict=True):
                same(g, w)


def moves_that_are_refused(mesh, heads_axis, placements):
    """Where a write, or heads, would be lost."""
    replicated, half, blocks = ([*[Replicate()] * (mesh.ndim - 1), p] for p in (Replicate(), Shard(2), Shard(0)))
    over, pairs, whole = (mesh.mesh_dim_names or ("?",))[-1], integers([[3, 0]]), whole_caches("NHD", 4)

    def move(old, new, whole=whole, target=None):
        both = zip((whole, target or whole), (old, new), strict=True)
        caches = [
            torchkv.PagedKVCache(
                tuple(c if p is None else distribute_tensor(c, mesh, p) for c in cache.caches), cache.spec
            )
            for cache, p in both
        ]
        caches[0].relayout(caches[1], pairs)

    raises(
        ValueError, f"^source must be split over heads as destination, over None, got {over}$", move, half, replicated
    )
    raises(ValueError, f"^a cache may be split over heads only, got axis block split over {over}", move, blocks, half)
    raises(ValueError, f"^a cache may be split over heads only, got axis block split over {over}", move, half, blocks)
    raises(TypeError, r"^source\[0\] must be a DTensor, as other arguments are, got a plain tensor$", move, None, half)
    raises(TypeError, "^key_cache must be a DTensor, as other arguments are, got a plain tensor$", move, half, None)
    nvfp4 = [whole_caches(layout, 4, kv_cache_dtype="nvfp4") for layout in ("NHD", "head block slot dim")]
    raises(
        ValueError, "^a cache of nvfp4 may be split over heads only where", move,
        replicated, [*replicated[1:], Shard(0)], *nvfp4,
    )  # fmt: skip
    three = whole_caches("NHD", 3)
    raises(ValueError, "^num_heads must be a multiple of the", move, half, half, three, three)

"""One rank of several that share DTensors: run by torchrun, or `python -m tests.cases.torch_processes RANK COUNT PORT`.

Each checks its part of what ops did against what one process does with everything: gloo on CPUs, NCCL on GPUs.
`torchrun --nproc-per-node 2 -m tests.cases.torch_processes` runs it on two GPUs.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import torchkv
import torchkv.distributed
from kvcore.layout import CacheLayout
from tests.cases.dtensor_moves import moves_that_are_refused, slots_and_moves
from tests.cases.dtensors import (
    BLOCK_SIZE,
    BLOCKS,
    DEVICE,
    LENS,
    SIZE,
    SLOTS,
    STARTS,
    TABLES,
    integers,
    normal,
    raises,
    same,
    split,
    whole_caches,
)


def writes_and_attention(mesh, heads_axis, placements):
    """Split over heads or replicated, of whatever layout."""
    heads = 4
    for layout in ("NHD", "HND", "HEAD_MAJOR", "PACKED_NHD", "INTERLEAVED"):
        layout = CacheLayout.of(layout)
        whole = whole_caches(layout, heads)
        caches = split(mesh, whole.caches, torchkv.distributed.placements(layout, mesh, heads=heads_axis))
        before = [cache.to_local().data_ptr() for cache in caches]
        key, value, query = normal(7, heads, SIZE), normal(7, heads, SIZE, seed=1), normal(7, 2 * heads, SIZE)
        parts = split(mesh, (key, value, query), [placements] * 3)
        slots, lens, starts, tables = map(integers, (SLOTS, LENS, STARTS, TABLES))
        op = torchkv.reshape_and_cache_flash_diffkv if layout.single_array else torchkv.reshape_and_cache_flash
        op(key, value, *whole.caches, slots, layout=layout)
        assert op(*parts[:2], *caches, slots, layout=layout) is None
        for got, want in zip(caches, whole.caches, strict=True):
            same(got, want)
        assert [cache.to_local().data_ptr() for cache in caches] == before
        options = dict(query_start_loc=starts, layout=layout, sinks=normal(2 * heads), return_lse=True)
        want = torchkv.paged_attention(query, whole.caches, tables, lens, **options)
        got = torchkv.paged_attention(parts[2], caches, tables, lens, **options)
        for g, w in zip(got, want, strict=True):
            same(g, w, exact=False)
            assert tuple(g.placements) == tuple(placements)
        for g, w in zip(
            torchkv.gather_kv(caches, tables, lens, 7, layout=layout, head_size=SIZE),
            torchkv.gather_kv(whole.caches, tables, lens, 7, layout=layout, head_size=SIZE), strict=True,
        ):  # fmt: skip
            same(g, w)


def other_ops(mesh, heads_axis, placements):
    """Rotation, blocks, slots, scales, results that are given, the latent rows of MLA."""
    heads, rank_heads = 4, placements
    slots, lens, starts, tables = map(integers, (SLOTS, LENS, STARTS, TABLES))
    key, value, query = normal(7, heads, SIZE), normal(7, heads, SIZE, seed=1), normal(7, 2 * heads, SIZE)
    cos_sin = torchkv.rope_table({"head_dim": SIZE, "rope_theta": 1e4}, 16, device=DEVICE)
    positions = integers([2, 3, 4, 5, 6, 1, 2])
    whole = whole_caches("NHD", heads)
    of_caches = torchkv.distributed.placements("NHD", mesh, heads=heads_axis)
    caches = split(mesh, whole.caches, of_caches)
    k, v, q = split(mesh, (key, value, query), [rank_heads] * 3)
    want = torchkv.rope_and_cache(query, key, value, whole.caches, positions, cos_sin, slots)
    same(torchkv.rope_and_cache(q, k, v, caches, positions, cos_sin, slots), want, exact=False)
    (rotated,) = split(mesh, [query], [rank_heads])
    torchkv.rope_and_cache(rotated, k, v, caches, positions, cos_sin, slots, out=rotated)
    same(rotated, want, exact=False)
    pairs = integers([[0, 3], [3, 1]])
    torchkv.copy_blocks(whole.caches, pairs)
    torchkv.copy_blocks(caches, pairs)
    torchkv.zero_blocks(whole.caches, integers([2]))
    torchkv.zero_blocks(caches, integers([2]))
    others = [torch.full_like(cache, 3) for cache in whole.caches]
    split_others = split(mesh, [cache.clone() for cache in others], of_caches)
    torchkv.swap_blocks(whole.caches, others, integers([[0, 1], [3, 0]]))
    torchkv.swap_blocks(caches, split_others, integers([[0, 1], [3, 0]]))
    for got, w in zip(split_others, others, strict=True):
        same(got, w, exact=False)
    for got, w in zip(caches, whole.caches, strict=True):
        same(got, w, exact=False)
    replicated = [Replicate()] * mesh.ndim
    found = torchkv.slot_mapping(distribute_tensor(tables, mesh, replicated), starts, lens, BLOCK_SIZE, 7)
    same(found, torchkv.slot_mapping(tables, starts, lens, BLOCK_SIZE, 7))

    out = split(mesh, (torch.empty_like(query), torch.empty(7, 2 * heads, device=DEVICE)), [rank_heads] * 2)
    torchkv.paged_attention(q, caches, tables, lens, query_start_loc=starts, out=out[0], lse=out[1], return_lse=True)
    wanted = torchkv.paged_attention(query, whole.caches, tables, lens, query_start_loc=starts, return_lse=True)
    for g, w in zip(out, wanted, strict=True):
        same(g, w, exact=False)

    for scale in (torch.tensor([0.5], device=DEVICE), torch.tensor([0.5, 1, 2, 3], device=DEVICE)):
        whole = whole_caches("HND", heads, kv_cache_dtype="fp8")
        caches = split(mesh, whole.caches, torchkv.distributed.placements("HND", mesh, heads=heads_axis))
        options = dict(kv_cache_dtype="fp8", k_scale=scale, v_scale=scale, layout="HND")
        torchkv.reshape_and_cache_flash(key, value, *whole.caches, slots, **options)
        torchkv.reshape_and_cache_flash(k, v, *caches, slots, **options)
        for got, w in zip(caches, whole.caches, strict=True):
            same(got, w)
        same(
            torchkv.paged_attention(q, caches, tables, lens, query_start_loc=starts, **options),
            torchkv.paged_attention(query, whole.caches, tables, lens, query_start_loc=starts, **options), exact=False,
        )  # fmt: skip

    whole = whole_caches("HND", heads, kv_cache_dtype="fp8", num_layers=2)
    layout = whole.spec.layout
    caches = split(mesh, whole.caches, torchkv.distributed.placements(layout, mesh, heads=heads_axis))
    for of_layers in (torch.rand(2, heads, device=DEVICE) + 0.5, torch.rand(2, 1, device=DEVICE) + 0.5):
        dist.broadcast(of_layers, 0)
        options = dict(kv_cache_dtype="fp8", k_scale=of_layers, v_scale=of_layers, layout=layout, layer=1)
        torchkv.reshape_and_cache_flash(key, value, *whole.caches, slots, **options)
        torchkv.reshape_and_cache_flash(k, v, *caches, slots, **options)
        for got, w in zip(caches, whole.caches, strict=True):
            same(got, w)

    whole = whole_caches("NHD", heads, kv_cache_dtype="int8", per_token_head=True)
    scales = [Shard(2) if isinstance(p, Shard) else p for p in rank_heads]
    memory = (*whole.caches, whole.k_scale, whole.v_scale)
    parts = split(mesh, memory, [*of_caches, scales, scales])
    torchkv.reshape_and_cache_flash_per_token_head_quant(key, value, *memory, slots, kv_cache_dtype="int8")
    torchkv.reshape_and_cache_flash_per_token_head_quant(k, v, *parts, slots, kv_cache_dtype="int8")
    for got, w in zip(parts, memory, strict=True):
        same(got, w)
    options = dict(query_start_loc=starts, kv_cache_dtype="int8")
    same(
        torchkv.paged_attention(q, parts[:2], tables, lens, k_scale=parts[2], v_scale=parts[3], **options),
        torchkv.paged_attention(query, memory[:2], tables, lens, k_scale=memory[2], v_scale=memory[3], **options),
        exact=False,
    )

    rows, rope, latents = normal(7, 24), normal(7, 8), normal(BLOCKS, BLOCK_SIZE, 32)
    (latents_,) = split(mesh, [latents], [replicated])
    torchkv.concat_and_cache_mla(rows, rope, latents, slots)
    torchkv.concat_and_cache_mla(rows, distribute_tensor(rope, mesh, replicated), latents_, slots)
    same(latents_, latents)
    of_latents = dict(query_start_loc=starts, head_size_v=24)
    out = torchkv.paged_attention(q, latents_, tables, lens, **of_latents)
    same(out, torchkv.paged_attention(query, latents, tables, lens, **of_latents), exact=False)
    assert tuple(out.placements) == tuple(rank_heads)  # query heads are split, the one KV head is not


def what_does_not_fit_is_made_to_or_refused(mesh, heads_axis, placements):
    heads = 4
    replicated, last = [Replicate()] * mesh.ndim, [*[Replicate()] * (mesh.ndim - 1), Shard(1)]
    key, value, slots = normal(7, heads, SIZE), normal(7, heads, SIZE, seed=1), integers(SLOTS)
    whole = whole_caches("NHD", heads)
    torchkv.reshape_and_cache_flash(key, value, *whole.caches, slots)
    of_caches = torchkv.distributed.placements("NHD", mesh, heads=heads_axis)
    for of_key in (replicated, last, [*replicated[1:], Shard(0)], None):
        caches = split(mesh, whole_caches("NHD", heads).caches, of_caches)
        given = [key, value] if of_key is None else split(mesh, (key, value), [of_key] * 2)
        torchkv.reshape_and_cache_flash(*given, *caches, slots)
        for got, want in zip(caches, whole.caches, strict=True):
            same(got, want)
    summed = DTensor.from_local(key / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    caches = split(mesh, whole_caches("NHD", heads).caches, of_caches)
    torchkv.reshape_and_cache_flash(summed, value, *caches, slots)
    same(caches[0], whole.caches[0], exact=False)

    def write(*placements, key=key, caches=whole.caches):
        caches = [distribute_tensor(c, mesh, p) for c, p in zip(caches, placements, strict=True)]
        torchkv.reshape_and_cache_flash(key, value, *caches, slots)

    half = [*replicated[1:], Shard(2)]
    raises(ValueError, "^key_cache and value_cache must be split alike over heads, got ", write, half, replicated)
    blocks = [*replicated[1:], Shard(0)]
    raises(ValueError, "^a cache may be split over heads only, got axis block split over", write, blocks, blocks)
    partial = DTensor.from_local(whole.caches[0], mesh, [*replicated[1:], Partial()], run_check=False)
    raises(
        ValueError, "^key_cache must be split over heads or replicated, got P",
        torchkv.reshape_and_cache_flash, key, value, partial, partial, slots,
    )  # fmt: skip
    whole_key = distribute_tensor(key, mesh, replicated)
    raises(
        TypeError, "^key_cache must be a DTensor, as other arguments are, got a plain tensor",
        torchkv.reshape_and_cache_flash, whole_key, value, *whole.caches, slots,
    )  # fmt: skip
    odd = whole_caches("NHD", 3).caches
    three = [distribute_tensor(c, mesh, half) for c in odd]
    raises(
        ValueError, rf"^num_heads must be a multiple of the {mesh.size(mesh.ndim - 1)} devices over which heads are",
        torchkv.reshape_and_cache_flash, key[:, :3], value[:, :3], *three, slots,
    )  # fmt: skip
    caches = split(mesh, whole.caches, of_caches)
    query = split(mesh, [normal(2, 8, SIZE)], [placements])[0]
    out = distribute_tensor(torch.empty(2, 8, SIZE, device=DEVICE), mesh, [*replicated[1:], Shard(2)])
    raises(
        ValueError, r"^out must have placements .*, or what is written would be lost, got ",
        torchkv.paged_attention, query, caches, integers(TABLES), integers(LENS), out=out,
    )  # fmt: skip
    nvfp4 = whole_caches("NHD", heads, kv_cache_dtype="nvfp4").caches
    raises(
        ValueError, "^a cache of nvfp4 may be split over heads only where",
        lambda: torchkv.reshape_and_cache_flash(key, value, *split(mesh, nvfp4, [half] * 2), slots, "nvfp4"),
    )  # fmt: skip


def kv_heads_of_replicated_groups(mesh):
    """Two KV heads on four ranks: pairs have the same, and query heads of their own."""
    of_caches = torchkv.distributed.placements("NHD", mesh, heads="kv")
    key, value, query = normal(7, 2, SIZE), normal(7, 2, SIZE, seed=1), normal(7, 8, SIZE)
    slots, lens, starts, tables = map(integers, (SLOTS, LENS, STARTS, TABLES))
    whole = whole_caches("NHD", 2)
    caches = split(mesh, whole.caches, of_caches)
    for these in (whole.caches, caches):
        torchkv.reshape_and_cache_flash(key, value, *these, slots)
    for got, want in zip(caches, whole.caches, strict=True):
        same(got, want)
    want = torchkv.paged_attention(query, whole.caches, tables, lens, query_start_loc=starts)
    for of_query in ([Shard(1), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(1)]):
        (q,) = split(mesh, [query], [of_query])
        got = torchkv.paged_attention(q, caches, tables, lens, query_start_loc=starts)
        same(got, want, exact=False)
        assert list(got.placements) == (of_query if isinstance(of_query[0], Shard) else [Shard(1), Replicate()])


def generated(mesh, heads_axis, placements):
    """Greedy tokens of a decoder of two layers with random weights; without a mesh, of one process."""
    heads, group, hidden, vocabulary = 4, 2, 64, 97

    def put(tensor, placements):
        return tensor if mesh is None else distribute_tensor(tensor, mesh, placements)

    def each(axis):
        """The placements of a tensor whose axis has the heads."""
        return placements and [Shard(axis) if isinstance(p, Shard) else p for p in placements]

    replicated = mesh and [Replicate()] * mesh.ndim
    embedding = put(normal(vocabulary, hidden), replicated)
    projections = [put(normal(hidden, heads * (group + 2) * SIZE, seed=n) * 0.2, each(1)) for n in range(2)]
    outs = [put(normal(heads * group * SIZE, hidden, seed=n) * 0.2, each(0)) for n in range(2)]
    caches = [whole_caches("NHD", heads).caches for _ in range(2)]
    if mesh is not None:
        of_caches = torchkv.distributed.placements("NHD", mesh, heads=heads_axis)
        caches = [split(mesh, pair, of_caches) for pair in caches]
    cos_sin = torchkv.rope_table({"head_dim": SIZE, "rope_theta": 1e4}, 16, device=DEVICE)
    tables, tokens, found = integers([[0, 2, 5], [4, 1, 3]]), torch.tensor([3, 11], device=DEVICE), []
    for step in range(10):
        positions, lens = integers([step] * 2), integers([step + 1] * 2)
        slots = torchkv.slot_mapping(tables, None, lens, BLOCK_SIZE)
        x = embedding[put(tokens, replicated)]
        for projection, out, pair in zip(projections, outs, caches, strict=True):
            qkv = (x @ projection).view(2, heads, group + 2, SIZE)
            query, key, value = qkv[:, :, :group].flatten(1, 2), qkv[:, :, group], qkv[:, :, group + 1]
            query = torchkv.rope_and_cache(query, key, value, pair, positions, cos_sin, slots)
            x = x + torchkv.paged_attention(query, pair, tables, lens).flatten(1) @ out
            x = x / x.square().mean(1, keepdim=True).sqrt()
            x = x if mesh is None else x.redistribute(mesh, replicated)
        logits = x @ embedding.T
        tokens = (logits if mesh is None else logits.to_local()).argmax(1)
        found.append(tokens.tolist())
    return found


def the_same_text(mesh, heads_axis, placements):
    text = generated(mesh, heads_axis, placements)
    assert text == generated(None, None, None)
    assert len({tuple(tokens) for tokens in text}) > 3


CHECKS = (
    writes_and_attention,
    other_ops,
    slots_and_moves,
    moves_that_are_refused,
    what_does_not_fit_is_made_to_or_refused,
    the_same_text,
)


def main(rank, count):
    meshes = [(init_device_mesh(DEVICE, (count,), mesh_dim_names=("tp",)), "tp", [Shard(1)])]
    meshes.append((meshes[0][0], None, [Replicate()]))
    if count == 4:
        square = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))
        meshes.append((square, "tp", [Replicate(), Shard(1)]))
        kv_heads_of_replicated_groups(init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("kv", "rank")))
    for check in CHECKS:
        for mesh in meshes:
            check(*mesh)
        print(f"rank {rank}: {check.__name__} on {count} ranks", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ |= {"RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2], "MASTER_PORT": sys.argv[3]}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": sys.argv[1]}
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    try:
        main(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

"""What ranks that share DTensors give an op, and how they compare their parts with the whole."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

import torchkv
import torchkv.distributed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, BLOCK_SIZE, SIZE, POISON = 6, 4, 32, 300.0


def normal(*shape, seed=0):
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(DEVICE)


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


SLOTS, LENS, STARTS = [3, 9, -1, 17, 0, 1, 4], [7, 3], [0, 5, 7]
TABLES = [[0, 2], [4, -1]]


def whole_caches(layout, heads, **options):
    caches = torchkv.PagedKVCache.create(
        num_blocks=BLOCKS, block_size=BLOCK_SIZE, num_heads=heads, head_size=SIZE, dtype=torch.float32,
        layout=layout, device=DEVICE, **options,
    )  # fmt: skip
    for cache in (*caches.caches, *(s for s in (caches.k_scale, caches.v_scale) if s is not None and s.dim() > 1)):
        cache.fill_(POISON if cache.dtype == torch.float32 else 0x7B)
    return caches


def split(mesh, tensors, placements):
    return [distribute_tensor(t.clone(), mesh, p) for t, p in zip(tensors, placements, strict=True)]


def same(got, want, exact=True):
    """A DTensor's part on this rank against that of the whole."""
    assert isinstance(got, DTensor), type(got)
    part = distribute_tensor(want, got.device_mesh, got.placements).to_local()
    mine = got.to_local()
    assert mine.shape == part.shape
    if exact:
        assert torch.equal(mine, part)
    else:
        near = 1e-5 if DEVICE == "cpu" else 1e-3  # a GPU's products are rounded otherwise
        torch.testing.assert_close(mine, part, rtol=near, atol=near)


def raises(error, text, function, *args, **options):
    with pytest.raises(error, match=text):
        function(*args, **options)

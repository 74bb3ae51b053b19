"""How positions are split and how partial results are merged, on GPUs that are not there."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpreterBuilder

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import AttentionOptions, check_attention
from kvcore.plan import attention as plan_attention
from kvcore.plan.attention_tile import Tile
from kvcore.plan.kernel import Target
from kvcore.run.interpreter import Pointer, run

H100 = Target("cuda", 90)


def describe(batch, context, *, dtype="bfloat16", tokens=None, kv_cache_dtype="auto", head_size=128, heads=(32, 8)):
    q_heads, kv_heads = heads
    stored = dtype if kv_cache_dtype == "auto" else "uint8"
    units = head_size // 2 if kv_cache_dtype == "int4" else head_size
    cache = ArraySpec((batch * context // 16, 16, kv_heads, units), stored)
    scale = ArraySpec(cache.shape[:3], "float32") if kv_cache_dtype == "int4" else None
    starts = None if tokens is None else ArraySpec((batch + 1,), "int32")
    return check_attention(
        ArraySpec((batch * (tokens or 1), q_heads, head_size), dtype), ArraySpec((batch, context // 16), "int32"),
        ArraySpec((batch,), "int32"), starts, None, AttentionOptions(None, True, None, None),
        CacheArguments((cache, cache), kv_cache_dtype, scale, scale), None,
    )  # fmt: skip


def planned(*args, **options):
    plan = plan_attention.plan_attention(describe(*args, **options), H100)
    return plan.attend.constexprs["P"].tile, plan.splits


# On an H100, 132 multiprocessors; what each was chosen for is in docs/benchmarks.md.
PLANS = {
    "each split has a multiprocessor": ((1, 2048), {}, (Tile(16, 128, 3), 16)),
    "a split has one tile at least": ((1, 512), {}, (Tile(16, 128, 3), 4)),
    "no split where programs fill the GPU": ((16, 2048), {}, (Tile(16, 128, 3), 1)),
    "all at once": ((24, 2048), {}, (Tile(16, 128, 2), 1)),
    "too short for a pipeline": ((64, 256), {}, (Tile(16, 128, 2), 1)),
    "many and long": ((64, 8192), {}, (Tile(16, 128, 3), 1)),
    "bytes": ((8, 2048), {"kv_cache_dtype": "fp8"}, (Tile(16, 128, 3), 4)),
    "bytes, many and long": ((64, 8192), {"kv_cache_dtype": "fp8"}, (Tile(16, 128, 4), 1)),
    "small heads": ((64, 8192), {"head_size": 64}, (Tile(16, 128, 4), 1)),
    "four bits": ((12, 2048), {"kv_cache_dtype": "int4"}, (Tile(16, 128, 2), 4)),
    "four tokens: merging costs more": ((1, 2048), {"tokens": 4}, (Tile(16, 128, 3), 8)),
}


@pytest.mark.parametrize("name", PLANS)
def test_tile_and_splits(name):
    args, options, expected = PLANS[name]
    assert planned(*args, **options) == expected


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_one_token_each_is_split_alike_with_and_without_query_start_loc(batch):
    assert planned(batch, 4096, tokens=1) == planned(batch, 4096)


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("context", [256, 8192])
@pytest.mark.parametrize("batch", [1, 24, 64])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int4"])
def test_a_program_has_no_more_threads_than_positions(arch, context, batch, kv_cache_dtype):
    """Else Triton does not load block tables ahead, and so neither K nor V."""
    call = describe(batch, context, kv_cache_dtype=kv_cache_dtype)
    attend = plan_attention.plan_attention(call, Target("cuda", arch)).attend
    assert attend.num_warps * 32 <= attend.constexprs["P"].tile.positions


def merge(monkeypatch, part, part_lse):
    """The merged results of partial results `[rows, splits, head_size]`."""
    rows, splits, head_size = part.shape
    monkeypatch.setattr(plan_attention, "choose_splits", lambda *_: splits)
    call = describe(1, 32768, dtype="float32", head_size=head_size, heads=(rows, 1))
    plan = plan_attention.plan_attention.__wrapped__(call, H100)
    out, lse = np.full((rows, head_size), np.nan, np.float32), np.full(rows, np.nan, np.float32)
    arrays = [Pointer(a.ctypes.data, "float32") for a in (part, part_lse)]
    results = [Pointer(a.ctypes.data, "float32") for a in (out, lse)]
    run(plan.merge, plan.merge_grid, [*plan_attention.merge_arguments(*arrays, None, splits), *results])
    return out, lse


@pytest.mark.parametrize("head_size", [40, 128, 160, 512])
@pytest.mark.parametrize("splits", [2, 7, 16, 17, 66, 132])
def test_merge(monkeypatch, splits, head_size):
    """Partial results of which some saw nothing, and hold NaN; the second row has none that saw anything."""
    rng = np.random.default_rng(splits)
    part = rng.standard_normal((3, splits, head_size)).astype(np.float32)
    part_lse = (20 * rng.standard_normal((3, splits))).astype(np.float32)
    saw = rng.random((3, splits)) < 0.7
    saw[1], saw[2, -1] = False, True
    part[~saw], part_lse[~saw] = np.nan, -np.inf
    out, lse = merge(monkeypatch, part, part_lse)

    weight = np.where(saw, np.exp2(part_lse.astype(np.float64)), 0)
    total = weight.sum(1)
    want = np.einsum("rs,rsd->rd", weight, np.where(saw[..., None], part, 0)) / np.where(total == 0, 1, total)[:, None]
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total), rtol=1e-6)


@pytest.mark.parametrize("head_size", [40, 160, 512])
def test_merging_writes_each_result_once(monkeypatch, head_size):
    """Columns of a row are merged by several programs, its lse by one of them."""
    written = Counter()
    store = InterpreterBuilder.create_masked_store

    def create_masked_store(self, pointers, value, mask, *rest):
        written.update(pointers.data[mask.data].ravel().tolist())
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
    rng = np.random.default_rng(0)
    part = rng.standard_normal((3, 5, head_size)).astype(np.float32)
    out, lse = merge(monkeypatch, part, part[..., 0].copy())
    everywhere = {a.ctypes.data + 4 * i for a in (out, lse) for i in range(a.size)}
    assert written == Counter(everywhere)


KEY = """
from kvcore.plan.attention import MERGE_SCALARS, plan_attention
from kvcore.run import compiler
from tests.attention.test_splits import H100, describe
compiler.triton.compile = lambda source, target, options: print(source.hash())
pointers = dict.fromkeys(("part_ptr", "part_lse_ptr", "out_ptr", "lse_ptr"), "float32") | {"sinks_ptr": None}
compiler.compile_kernel(plan_attention(describe(1, 2048), H100).merge, H100, pointers, frozenset(pointers))
"""


def test_processes_find_what_others_compiled():
    """Triton names what it keeps on disk after the source. The order of a set of strings differs between processes."""
    names = {
        subprocess.run(
            [sys.executable, "-c", KEY], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(names) == 1
    assert names != {""}

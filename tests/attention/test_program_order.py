"""In which order programs take heads and tiles of rows: results do not depend on it, only what the L2 cache holds."""

import numpy as np
import pytest

pytest.importorskip("triton")

from kvcore.plan import attention as plan
from kvcore.plan.attention_tile import choose_heads
from kvcore.plan.kernel import INTERPRETER
from kvcore.run.interpreter import Pointer, run
from tests.cases.hopper import call_of, prefill
from tests.cases.reads import BOUNDS, make_read, oracle


def interpret(monkeypatch, case, heads):
    """What the kernel makes of a case whose programs go over `heads` heads at once."""
    monkeypatch.setattr(plan, "choose_heads", lambda _: heads)
    monkeypatch.setattr(plan, "choose_splits", lambda *_: 1)
    call = call_of(case)
    planned = plan.plan_attention.__wrapped__(call, INTERPRETER)
    assert planned.attend.constexprs["P"].heads_at_once == heads
    out = np.full((*case.query.shape[:2], call.cache.head_size_v), np.nan, case.query.dtype)
    lse = np.full(case.query.shape[:2], np.nan, np.float32)
    arrays = [case.query, *case.caches, case.block_tables, case.seq_lens, case.query_start_loc]
    query, key, value, *integers = (Pointer(a.ctypes.data, a.dtype.name) for a in arrays)
    arguments = plan.arguments(call, query, (key, value), *integers, None, None, None, None)
    results = [Pointer(a.ctypes.data, a.dtype.name) for a in (out, lse)]
    run(planned.attend, planned.grid, [*arguments, *results])
    return out, lse


@pytest.mark.parametrize("options", [dict(query_lens=(20, 1, 30), padding=2), dict()], ids=["ragged", "one token each"])
def test_every_order_gives_the_same_bits(monkeypatch, options):
    case = make_read(
        np.random.default_rng(0), seq_lens=(70, 9, 33), num_heads=6, group=2, head_size=16, block_size=8,
        dtype="float32", **options,
    )  # fmt: skip
    if case.query_start_loc is None:
        case.query_start_loc = np.arange(4, dtype=np.int32)
    want, _ = oracle(case)
    out, lse = interpret(monkeypatch, case, 6)
    assert np.abs(out - want).max() <= BOUNDS["float32"] * np.abs(want).max()
    for heads in (1, 2, 3):
        again = interpret(monkeypatch, case, heads)
        assert [a.tobytes() for a in again] == [out.tobytes(), lse.tobytes()]


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        (dict(max_blocks=512), 4),  # 8,192 positions of 512 bytes: four heads are 16 MiB
        (dict(max_blocks=1024), 2),
        (dict(max_blocks=32), 8),
        (dict(max_blocks=2**20), 1),
        (dict(max_blocks=512, head_size=192, head_size_v=128, num_heads=128, group=1), 4),
        (dict(max_blocks=512, num_heads=6), 6),
        (dict(max_blocks=1024, num_heads=6), 3),
        (dict(max_blocks=1024, tokens=8), 8),  # few rows: K and V are read once
    ],
)
def test_as_many_heads_as_stay_in_the_cache(options, heads):
    assert choose_heads(prefill(**options)) == heads

"""Tiles of a GPU's size, interpreted: programs whose rows are of one token, and programs whose rows are of several."""

import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.rope import check_rope, check_rope_options
from kvcore.plan import rope as plan_rope
from kvcore.plan.kernel import Target
from tests.cases.rope import run_oracle
from tests.cases.torch_ropes import BY_NAME, assert_same, run_torch


@pytest.fixture
def rows(request, monkeypatch):
    """Programs take so many rows."""
    monkeypatch.setattr(plan_rope, "_tile", lambda call, target, width: (request.param * width, 1, {}))
    plan_rope.plan_rope.cache_clear()
    yield request.param
    plan_rope.plan_rope.cache_clear()


# Cases have 8 query heads and 2 heads, unless they say so: of 4 rows, those of K and V are two tokens'.
@pytest.mark.parametrize(("name", "rows"), [
    ("norms", 2), ("norms", 4), ("mrope", 2), ("mrope, gptj, 8 of 40", 1), ("gptj, head_size 80, 24 of it", 2),
    ("1 query head, 3 heads", 1), ("1 query head, 3 heads", 2), ("fewer slots than tokens", 2), ("no slots", 1),
    ("positions outside", 4), ("nvfp4, PACKED_HND, float32", 2), ("int8 by token and head", 1),
    ("fp8_e4m3, scales of heads", 2), ("MLA, fp8_e4m3", 1),
], indirect=["rows"])  # fmt: skip
def test_rows(name, rows):
    call = BY_NAME[name].make()
    assert_same(run_torch(call, backend="interpret"), run_oracle(call))


@pytest.mark.parametrize(("tokens", "tile"), [(1, (2, 1)), (16, (2, 1)), (17, (4, 2)), (1023, (4, 2)), (1024, (8, 2))])
def test_rows_and_warps_by_number_of_tokens(tokens, tile):
    query, key = ArraySpec((tokens, 32, 128), "bfloat16"), ArraySpec((tokens, 8, 128), "bfloat16")
    cache, positions = ArraySpec((4, 16, 8, 128), "bfloat16"), ArraySpec((tokens,), "int32")
    options = check_rope_options("neox", None, None, 1e-6)
    caches = CacheArguments((cache, cache))
    call = check_rope(
        query, key, key, positions, ArraySpec((64, 128), "float32"), positions, None, None, options, caches
    )
    plan = plan_rope.plan_rope(call, Target("cuda", 90))
    assert (plan.q_rows, plan.kernel.num_warps) == (plan.rows, tile[1]) == tile

"""Values that are infinite or NaN in positions that some rows do not see, and what a row is then held to."""

import numpy as np

from kvcore.formats import KV_CACHE_DTYPES
from kvcore.oracle import write as reference
from tests.cases.reads import BOUNDS, oracle


def of_value(number):
    def poison(case, at):
        case.caches[-1][at][..., 0, 1] = number

    return poison


def of_key(number):
    def poison(case, at):
        case.caches[0][at][..., 0, 1] = number

    return poison


def of_latent(number):
    def poison(case, at):
        case.caches[0][at][..., 1] = number

    return poison


def of_scale(number):
    def poison(case, at):
        case.options["v_scale"][at][..., 0] = number

    return poison


def of_block_scale(code):
    def poison(case, at):
        size = case.query.shape[2]
        _, (_, blocks) = reference.views(case.caches, case.layout, size, size, KV_CACHE_DTYPES["nvfp4"])
        blocks[0][at][..., 0, 0] = code

    return poison


def of_mla_scale(number):
    def poison(case, at):
        scales = case.caches[0][..., 512:528].view(np.float32)
        scales[at][..., 1] = number

    return poison


MLA = dict(layout="MLA", head_size=576, head_size_v=512, kv_cache_dtype="fp8_ds_mla")
LATENT = dict(layout="MLA", head_size=576, head_size_v=512)
PER_TOKEN = dict(granularity="token_head", kv_cache_dtype="int8")
POISONS = {
    "NaN": (of_value(np.nan), {}),
    "infinity": (of_value(np.inf), {}),
    "minus infinity": (of_value(-np.inf), {}),
    "NaN in K": (of_key(np.nan), {}),
    "infinity in K": (of_key(np.inf), {}),
    "NaN of e4m3": (of_value(0x7F), dict(kv_cache_dtype="fp8")),
    "infinity of e5m2": (of_value(0x7C), dict(kv_cache_dtype="fp8_e5m2")),
    "scale NaN": (of_scale(np.nan), PER_TOKEN),
    "scale infinite": (of_scale(np.inf), PER_TOKEN),
    "scale huge": (of_scale(1e30), PER_TOKEN),
    "scale of int4 NaN": (of_scale(np.nan), PER_TOKEN | dict(kv_cache_dtype="int4")),
    "block scale NaN": (of_block_scale(0x7F), dict(kv_cache_dtype="nvfp4")),
    "NaN in a latent": (of_latent(np.nan), LATENT),
    "infinity in a latent": (of_latent(np.inf), LATENT),
    "minus infinity in a latent": (of_latent(-np.inf), LATENT),
    "MLA scale NaN": (of_mla_scale(np.nan), MLA),
    "MLA scale infinite": (of_mla_scale(np.inf), MLA),
}


def assert_as_oracle(case, implementations):
    want, want_lse = oracle(case)
    hidden = np.isfinite(want).all((1, 2))
    assert hidden.any(), "every row sees the poison"
    size = np.abs(want[np.isfinite(want)]).max()
    for name, run in implementations.items():
        got, lse = (x.astype(np.float64) for x in run(case))
        for x, y in ((got, want), (lse, want_lse)):
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=name)
            infinite = np.isinf(y)
            np.testing.assert_array_equal(x[infinite], y[infinite], err_msg=name)
        finite = np.isfinite(want)
        error = np.abs(np.subtract(got, want, where=finite, out=np.zeros_like(want)))
        # Rows that see a number far larger than the others may be off by as much more.
        rows = error.reshape(len(want), -1).max(1)
        sizes = np.abs(np.where(finite, want, 0)).reshape(len(want), -1).max(1)
        bound = BOUNDS[case.query.dtype.name] * np.maximum(sizes, min(size, 1.0))
        assert (rows <= bound).all(), f"{name}: {rows} where {bound} is allowed"

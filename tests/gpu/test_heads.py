"""On a GPU, views of heads: the kernels read them out of larger arrays, at any offset, with the bits of slices."""

from itertools import product

import numpy as np
import pytest

from tests.cases import gpu
from tests.cases.arrays import bits, make_case, random_bits, random_normal, run_oracle
from tests.cases.gpu import HAS_GPU, params, shorter
from tests.cases.reads import attend_jax, make_read

pytestmark = pytest.mark.gpu

WRITES = {
    "copy": dict(head_size=128, num_heads=8),
    "odd size": dict(head_size=40),
    "float32": dict(dtype="float32", cache_dtype="bfloat16"),
    "fp8": dict(kv_cache_dtype="fp8", bits=False),
    "fp8 by head": dict(kv_cache_dtype="fp8", scales="head", bits=False),
    "fp8 inputs": dict(dtype="float8_e4m3fn", cache_dtype="float8_e4m3fn"),
    "nvfp4": dict(kv_cache_dtype="nvfp4", bits=False),
    "token and head": dict(kv_cache_dtype="int8", per_token_head=True, bits=False),
    "diffkv": dict(layout="PACKED_NHD", head_size=192, head_size_v=128),
    "diffkv, token and head": dict(layout="PACKED_HND", head_size_v=32, kv_cache_dtype="int4", per_token_head=True),
    "head-major": dict(layout="HEAD_MAJOR", head_size=128),
}
READS = {
    "decode": dict(seq_lens=(1, 700, 129), head_size=128),
    "ragged": dict(seq_lens=(300, 1, 70), query_lens=(150, 0, 70), head_size=64),
    "split": dict(seq_lens=(4000, 1), num_heads=1, group=4, head_size=128),
    "fp8": dict(seq_lens=(1, 300), kv_cache_dtype="fp8", head_size=128),
    "mla": dict(layout="MLA", group=16, head_size=576, head_size_v=512, seq_lens=(70, 9)),
}


def assert_same(call, want):
    """What a call gives, and that all but its kernels can be lowered for a GPU."""
    if not HAS_GPU:
        gpu.lowered(call, [np.asarray(w) for w in want])
    for got, w in zip(call(), want, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(got)), bits(np.asarray(w)))


IN_KINDS = [*product(WRITES, ["two of a group"]), *product(["copy", "odd size", "token and head"], ["heads", "flat"])]
IN_KINDS += [("copy", "one of a group"), ("copy", "one group"), ("copy", "whole groups")]


@pytest.mark.parametrize(
    ("options", "kind"),
    params(IN_KINDS, smoke=(("copy", "flat"), ("odd size", "two of a group"), ("token and head", "heads"))),
)
def test_writes(options, kind):
    from tests.cases.heads import write_views

    more = dict(num_heads=4, head_size=64, num_blocks=20, num_tokens=70) | WRITES[options]
    case = make_case(np.random.default_rng(0), **more)
    assert_same(lambda: write_views(case, kind), run_oracle(case))


@pytest.mark.parametrize(("left", "kv_cache_dtype"), params(
    product((0, 3, 8), ("auto", "fp8", "fp8_ds_mla")), smoke=((3, "auto"), (8, "fp8_ds_mla"))
))  # fmt: skip
def test_rows_of_mla(left, kv_cache_dtype):
    """Columns at any offset: what is aligned to 16 bytes, and what is not."""
    import jax.numpy as jnp

    import jaxkv
    from tests.cases.heads import columns_of

    rng = np.random.default_rng(1)
    kv_c, k_pe = (random_normal(rng, (70, columns), "bfloat16") for columns in (512, 64))
    units = 656 if kv_cache_dtype == "fp8_ds_mla" else 576
    cache = random_bits(rng, (10, 16, units), "bfloat16" if kv_cache_dtype == "auto" else "uint8")
    slots = rng.permutation(200)[:70].astype(np.int32)

    def write(kv_c, k_pe):
        return [jaxkv.concat_and_cache_mla(kv_c, k_pe, jnp.asarray(cache), slots, kv_cache_dtype)]

    assert_same(lambda: write(columns_of(kv_c, left=left), columns_of(k_pe, 1, left)), write(kv_c, k_pe))


@pytest.mark.parametrize(
    ("options", "kind"),
    params(
        [*product(READS, ["two of a group", "flat"]), ("decode", "heads"), ("decode", "one of a group")],
        smoke=(("decode", "two of a group"), ("ragged", "flat"), ("mla", "two of a group")),
    ),
)
def test_attention(options, kind):
    from tests.cases.heads import attend_view

    more = {"dtype": "bfloat16", "num_heads": 4, "block_size": 16} | READS[options]
    more["seq_lens"], more["query_lens"] = shorter(more["seq_lens"]), shorter(more.get("query_lens"))
    case = make_read(np.random.default_rng(2), **more)
    assert_same(lambda: attend_view(case, kind), attend_jax(case))


def test_a_projection_of_a_decode_step():
    """One donated step: queries, keys and values out of one array, with the bits of slices, in the same buffers."""
    import jax
    import jax.numpy as jnp

    import jaxkv

    projection = jnp.asarray(random_normal(np.random.default_rng(3), (5, 8, 6, 128), "bfloat16"))
    slots, tables = jnp.array([0, 17, 33, 64, -1]), jnp.arange(10).reshape(5, 2)
    lens = jnp.array([1, 2, 17, 1, 3])

    def step(part, projection, caches):
        query, key, value = (part(projection, *at) for at in ((0, 4), (4, 5), (5, 6)))
        caches = jaxkv.reshape_and_cache_flash(key, value, *caches, slots)
        return caches, jaxkv.paged_attention(query, caches, tables, lens)

    def sliced(array, start, stop):
        return array[:, :, start:stop].reshape(5, -1, 128)

    def caches():
        return tuple(jnp.asarray(random_normal(np.random.default_rng(n), (10, 16, 8, 128), "bfloat16")) for n in (4, 5))

    want = jax.jit(step, static_argnums=0)(sliced, projection, caches())
    given = caches()
    before = [c.unsafe_buffer_pointer() for c in given]
    new, out = jax.jit(step, static_argnums=0, donate_argnums=2)(jaxkv.heads, projection, given)
    assert [c.unsafe_buffer_pointer() for c in new] == before
    for got, w in zip((*new, out), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(bits(np.asarray(got)), bits(np.asarray(w)))

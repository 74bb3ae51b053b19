"""Cases of reading for tests: caches with poison where nothing was written, and one way to call each implementation."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.oracle import read as reference_attention
from kvcore.oracle import write as reference
from tests.cases.arrays import from_torch, random_bits, random_normal, shape_of_scales, to_torch


@dataclass
class ReadCase:
    """Arguments of `paged_attention`, as NumPy arrays."""

    query: np.ndarray
    caches: list[np.ndarray]
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray | None
    head_size_v: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> CacheLayout:
        return self.options["layout"]

    def call(self, module, convert, **more):
        """`paged_attention` of a module, with its arrays made by `convert`."""
        options = {**self.options, **more}
        options["head_size_v"] = self.head_size_v if self.layout.latent else None
        for name, option in options.items():
            if isinstance(option, np.ndarray):
                options[name] = convert(option)
        caches = [convert(c) for c in self.caches]
        starts = None if self.query_start_loc is None else convert(self.query_start_loc)
        return module.paged_attention(
            convert(self.query), caches[0] if len(caches) == 1 else tuple(caches), convert(self.block_tables),
            convert(self.seq_lens), query_start_loc=starts, **options,
        )  # fmt: skip


def make_read(
    rng,
    *,
    layout="NHD",
    dtype="float32",
    cache_dtype=None,
    kv_cache_dtype="auto",
    storage=None,
    num_heads=2,
    group=2,
    head_size=32,
    head_size_v=None,
    block_size=4,
    seq_lens=(0, 1, 5, 19),
    query_lens=None,
    padding=0,
    num_layers=None,
    layer=None,
    scales=(0.5, 0.25),
    granularity="tensor",
    scale_layout=None,
    spare=3,
    **options,
) -> ReadCase:
    """A case whose tables are random, with garbage past each length, and whose unused slots hold NaN and noise.

    Args:
        rng: Source of randomness.
        cache_dtype: Of the caches' elements where kv_cache_dtype is "auto"; None for dtype.
        storage: Dtype of the arrays of a quantised cache; None for uint8. A cache of "auto" has none.
        granularity: Of the scales of a quantised cache: "tensor", "token_head", which the oracle computes, or one that
            `shape_of_scales` knows.
        query_lens: Query tokens of each sequence; None for one each, without query_start_loc.
        padding: Query rows after the last sequence's.
        spare: Blocks of the cache that no sequence has.
        options: More arguments of `paged_attention`.
    """
    layout = CacheLayout.of(layout)
    if num_layers is not None:
        layout = layout.with_layer()
    if layout.latent:
        num_heads = 1
        head_size_v = head_size_v or head_size - 16
    head_size_v = head_size_v or head_size
    stored = KV_CACHE_DTYPES[kv_cache_dtype]
    needed = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(needed) + spare
    units_v = head_size_v if kv_cache_dtype == "fp8_ds_mla" else stored_size(stored, head_size_v)
    shapes = layout.shapes(
        num_blocks=num_blocks, block_size=block_size, num_heads=num_heads, head_size=stored_size(stored, head_size),
        head_size_v=units_v, num_layers=num_layers,
        x=8 if "dim/x" in layout.pattern else None,
    )  # fmt: skip
    name = (cache_dtype or dtype) if stored is None else (storage or "uint8")
    caches = [random_bits(rng, shape, name) for shape in shapes]
    scale_caches = []
    if granularity == "token_head":
        sizes = {"layer": num_layers, "block": num_blocks, "slot": block_size, "head": num_heads}
        patterns = (scale_layout or ("layer " if num_layers else "") + "block slot head").split(",")
        for pattern in (patterns[0], patterns[-1]):
            scale_caches.append(random_bits(rng, tuple(sizes[a] for a in pattern.split()), "float32"))
        scales = scale_caches
        options["scale_layout"] = scale_layout
    elif granularity != "tensor":
        shape = shape_of_scales(granularity, num_layers, num_heads)
        scales = [rng.uniform(0.01, 0.5, shape).astype(np.float32) for _ in range(1 if layout.latent else 2)] * 2
    elif layout.latent:
        scales = (scales[0], scales[0])
    blocks = iter(rng.permutation(num_blocks).tolist())
    tables = rng.integers(-5, num_blocks + 5, (len(seq_lens), max(max(needed, default=0), 1) + 1)).astype(np.int32)
    slots = []
    for seq, (count, length) in enumerate(zip(needed, seq_lens, strict=True)):
        for i in range(count):
            tables[seq, i] = next(blocks)
        slots += [int(tables[seq, n // block_size]) * block_size + n % block_size for n in range(length)]
    if stored is not None and kv_cache_dtype != "fp8_ds_mla":
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    _fill(
        rng,
        caches,
        scale_caches,
        layout,
        slots,
        num_heads,
        head_size,
        head_size_v,
        dtype,
        kv_cache_dtype,
        layer,
        options,
    )
    tokens = len(seq_lens) if query_lens is None else sum(query_lens) + padding
    starts = None if query_lens is None else np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return ReadCase(
        query=random_normal(rng, (tokens, num_heads * group, head_size), dtype),
        caches=caches,
        block_tables=tables,
        seq_lens=np.array(seq_lens, np.int32),
        query_start_loc=starts,
        head_size_v=head_size_v,
        options={"kv_cache_dtype": kv_cache_dtype, "layout": layout, "layer": layer, **options},
    )


def _fill(
    rng, caches, scale_caches, layout, slots, num_heads, head_size, head_size_v, dtype, kv_cache_dtype, layer, options
):
    """Normal draws in the slots that are read, by the oracle's writer."""
    if not slots:
        return
    if dtype not in ("float32", "float16", "bfloat16"):
        dtype = "float32"
    if layout.latent:
        head_size, head_size_v = head_size_v, head_size - head_size_v
    dtype = caches[0].dtype.name if kv_cache_dtype == "auto" else dtype
    key, value = (random_normal(rng, (len(slots), num_heads, size), dtype) for size in (head_size, head_size_v))
    at = np.array(slots)
    if layout.latent:
        reference.concat_and_cache_mla(
            key[:, 0], value[:, 0], caches[0], at, kv_cache_dtype, options.get("k_scale"), layer=layer
        )
        return
    name = "reshape_and_cache_flash" + ("_diffkv" if layout.single_array else "")
    if scale_caches:
        op = getattr(reference, name + "_per_token_head_quant")
        more = {"scale_layout": options["scale_layout"]}
        op(key, value, *caches, *scale_caches, at, kv_cache_dtype, layout=layout, layer=layer, **more)
    else:
        scales = (options.get("k_scale"), options.get("v_scale"))
        getattr(reference, name)(key, value, *caches, at, kv_cache_dtype, *scales, layout=layout, layer=layer)


def oracle(case: ReadCase) -> tuple[np.ndarray, np.ndarray]:
    return reference_attention.paged_attention(
        case.query, case.caches, case.block_tables, case.seq_lens, query_start_loc=case.query_start_loc,
        head_size_v=case.head_size_v, **case.options,
    )  # fmt: skip


def attend_torch(case: ReadCase, backend=None, device="cpu"):
    import torchkv

    out, lse = case.call(torchkv, lambda a: to_torch(a.copy(), device), return_lse=True, backend=backend)
    return from_torch(out), from_torch(lse)


def attend_jax(case: ReadCase, backend=None):
    import jax.numpy as jnp

    import jaxkv

    out, lse = case.call(jaxkv, jnp.asarray, return_lse=True, backend=backend)
    return np.asarray(out), np.asarray(lse)


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda case: attend_jax(case, "xla"),
    "jax interpret": lambda case: attend_jax(case, "interpret"),
    "torch": lambda case: attend_torch(case, "torch"),
    "torch interpret": lambda case: attend_torch(case, "interpret"),
}

# Of the largest output: results are rounded once, weights may be rounded to the dtype as well.
BOUNDS = {"float32": 3e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_near_oracle(case: ReadCase, implementations=CPU_IMPLEMENTATIONS) -> None:
    want, want_lse = oracle(case)
    size = max(1e-3, float(np.abs(want).max(initial=0)))
    for name, run in implementations.items():
        got, lse = run(case)
        assert got.dtype == case.query.dtype, name
        assert got.shape == want.shape, name
        error = np.abs(got.astype(np.float64) - want).max(initial=0) / size
        assert error <= BOUNDS[case.query.dtype.name], f"{name}: error {error:.2e}"
        seen = np.isfinite(want_lse)
        np.testing.assert_array_equal(np.isneginf(lse), ~seen, err_msg=name)
        np.testing.assert_allclose(
            lse[seen], want_lse[seen], rtol=0, atol=2e-3 if got.itemsize == 2 else 2e-5, err_msg=name
        )


CASTS = [  # dtype, cache_dtype, kv_cache_dtype, storage
    ("bfloat16", "bfloat16", "auto", None),
    ("float16", "float16", "auto", None),
    ("float32", "bfloat16", "auto", None),
    ("bfloat16", "float16", "auto", None),
    ("bfloat16", None, "fp8", "uint8"),
    ("bfloat16", None, "fp8_e4m3", "float8_e4m3fn"),
    ("float16", None, "fp8_e5m2", "uint8"),
    ("float32", None, "fp8_e5m2", "float8_e5m2"),
]


LENGTHS = {
    "short": dict(seq_lens=(0, 1, 3, 4, 5)),
    "blocks": dict(seq_lens=(15, 16, 17, 33), block_size=16),
    "odd blocks": dict(seq_lens=(6, 7, 8, 22), block_size=7),
    "long": dict(seq_lens=(1, 700, 513), block_size=16, num_heads=1),
    "speculative": dict(seq_lens=(4, 9, 30), query_lens=(4, 4, 4)),
    "mixed": dict(seq_lens=(19, 1, 0, 12, 7), query_lens=(19, 1, 0, 5, 1), padding=3),
    "prefill": dict(seq_lens=(40, 23), query_lens=(33, 23), padding=1),
    "more queries than positions": dict(seq_lens=(2, 0, 5), query_lens=(5, 2, 5)),
    "nothing": dict(seq_lens=(0, 0)),
    "only padding": dict(seq_lens=(0,), query_lens=(0,), padding=4),
}


MEANINGS = {
    "plain": {},
    "not causal": dict(causal=False),
    "window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1),
    "cap": dict(soft_cap=1.5),
    "scale": dict(scale=0.7),
    "negative scale": dict(scale=-0.7),
    "scale of zero": dict(scale=0.0),
    "all": dict(sliding_window=7, soft_cap=3.0, scale=1.1),
}

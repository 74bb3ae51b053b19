"""Calls of `rope_and_cache` that the tests of all implementations share, and what the oracle makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.oracle.rope import rope_and_cache
from tests.cases.arrays import DTYPES, make_case, random_bits, random_normal, shape_of_scales

MAX_POSITION = 11

FAR = (3, -1, 40, 2**40, 0, 39, 2**32 + 1)
"""Slots of a cache of 40, some of them outside of it."""

OUTSIDE = (0, -1, MAX_POSITION, MAX_POSITION - 1, 2**32 + 3, -(2**31), 1)
"""Positions, some of them outside the table."""


@dataclass(frozen=True)
class RopeCase:
    """A call of `rope_and_cache`, without its arrays.

    Attributes:
        name: In test ids.
        layout: Of the caches; None leaves the op to choose NHD for two, the head-major one for two of 5 axes, and for
            one array PACKED_NHD or MLA.
        default: The layout that None stands for.
        head_size: Of query and key; of MLA, qk_rope_head_dim.
        head_size_v: Of value; None: as head_size.
        rank: Of MLA, kv_lora_rank.
        q_weights: The dtype of q_norm; None: no norm.
        k_weights: The dtype of k_norm; None: no norm.
        table_dtype: Of cos_sin.
        cache_dtype: None: dtype, or uint8 where quantised.
        scales: Static ones: numbers, or for arrays a name that `shape_of_scales` knows.
        slots: None: drawn without replacement, one for each token.
        positions: None: drawn. With sections, the three rows are this one, rolled.
        inputs: What query, and what is normed or rotated of key and value, is drawn from: "normal"; "special", the same
            with NaN, infinities, signed zeros and numbers whose squares overflow; "subnormal", with numbers that are
            subnormal or whose products are, which XLA's CPU code takes for zeros. What is only written is random bits.
        integers: The dtype of positions and slot_mapping.
    """

    name: str
    layout: str | None = "NHD"
    default: str = "NHD"
    num_tokens: int = 7
    num_q_heads: int = 8
    num_heads: int = 2
    head_size: int = 16
    head_size_v: int | None = None
    rank: int | None = None
    rope: str = "neox"
    rotary_dim: int | None = None
    sections: tuple[int, int, int] | None = None
    q_weights: str | None = None
    k_weights: str | None = None
    eps: float = 1e-6
    dtype: str = "bfloat16"
    table_dtype: str = "float32"
    cache_dtype: str | None = None
    kv_cache_dtype: str = "auto"
    scales: Any = (0.37, 1e-3)
    per_token_head: bool = False
    scale_layout: str | None = None
    num_layers: int | None = None
    layer: int | None = None
    slots: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    inputs: str = "normal"
    integers: str = "int64"

    def __str__(self) -> str:
        return self.name

    @property
    def latent(self) -> bool:
        """Whether key and value are kv_c and k_pe of MLA."""
        return self.rank is not None

    def make(self, seed: int = 0) -> "RopeCall":
        """The call, with poisoned caches; another seed gives other numbers."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        key, value, caches, slots, k_scale, v_scale = self._written(rng)
        if not self.latent or self.k_weights is not None:
            key = self._drawn(rng, key.shape)
        if self.latent:
            value = self._drawn(rng, value.shape)
        layout = CacheLayout.of(self.layout) if self.layout else None
        if layout is not None and self.num_layers is not None:
            layout = layout.with_layer()
        return RopeCall(
            query=self._drawn(rng, (self.num_tokens, self.num_q_heads, self.head_size)),
            key=key,
            value=value,
            caches=caches,
            positions=self._positions(rng),
            cos_sin=table(self.rotary_dim or self.head_size).astype(DTYPES[self.table_dtype]),
            slot_mapping=slots.astype(self.integers),
            options={
                "rope": self.rope,
                "rotary_dim": self.rotary_dim,
                "mrope_section": self.sections,
                "q_norm": weights(rng, self.head_size, self.q_weights),
                "k_norm": weights(rng, key.shape[-1], self.k_weights),
                "eps": self.eps,
                "kv_cache_dtype": self.kv_cache_dtype,
                "k_scale": k_scale,
                "v_scale": v_scale,
                "layout": layout,
                "scale_layout": self.scale_layout,
                "layer": self.layer,
            },
        )

    def _written(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """key, value, all arrays that are written to, slot_mapping and static scales, in random bits."""
        return self._kv_c_and_k_pe(rng) if self.latent else self._key_and_value(rng)

    def _key_and_value(self, rng: np.random.Generator) -> tuple[Any, ...]:
        case = make_case(
            rng, layout=self.layout or self.default, num_tokens=self.num_tokens, num_heads=self.num_heads,
            head_size=self.head_size, head_size_v=self.head_size_v, dtype=self.dtype, cache_dtype=self.cache_dtype,
            kv_cache_dtype=self.kv_cache_dtype, num_layers=self.num_layers, layer=self.layer, slots=self.slots,
            scales=self.scales, per_token_head=self.per_token_head, scale_layout=self.scale_layout,
        )  # fmt: skip
        return case.key, case.value, case.memory, case.slot_mapping, case.k_scale, case.v_scale

    def _kv_c_and_k_pe(self, rng: np.random.Generator) -> tuple[Any, ...]:
        assert self.rank is not None
        row = stored_size(KV_CACHE_DTYPES[self.kv_cache_dtype], self.rank + self.head_size)
        layout = CacheLayout.of(self.layout or self.default)
        if self.num_layers is not None:
            layout = layout.with_layer()
        extents = {"num_blocks": 5, "block_size": 8, "num_layers": self.num_layers}
        (shape,) = layout.shapes(num_heads=1, head_size=row, **extents)
        quantised = self.kv_cache_dtype != "auto"
        caches = [random_bits(rng, shape, self.cache_dtype or ("uint8" if quantised else self.dtype))]
        key, value = (random_bits(rng, (self.num_tokens, size), self.dtype) for size in (self.rank, self.head_size))
        slots = rng.permutation(40)[: self.num_tokens] if self.slots is None else np.asarray(self.slots, np.int64)
        scales = self.scales
        if isinstance(scales, str):
            scales = [rng.uniform(1e-3, 2, shape_of_scales(scales, self.num_layers, 1)).astype(np.float32)]
        scale = scales[0] if quantised and self.kv_cache_dtype != "fp8_ds_mla" else None
        return key, value, caches, slots, scale, None

    def _drawn(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = random_normal(rng, shape, self.dtype)
        if self.inputs == "normal":
            return x
        special = {
            "special": [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e20],
            "subnormal": [1e-40, -1e-40, 1.2e-38, -1.2e-38, 1e-30, 0.0, -0.0],
        }[self.inputs]
        with np.errstate(over="ignore"):
            chosen = rng.choice(np.array(special, np.float32), shape).astype(x.dtype)
        return np.where(rng.random(shape) < (0.03 if self.inputs == "special" else 0.5), chosen, x)

    def _positions(self, rng: np.random.Generator) -> np.ndarray:
        row = rng.integers(0, MAX_POSITION, self.num_tokens) if self.positions is None else np.array(self.positions)
        row = row.astype(self.integers)
        return row if self.sections is None else np.stack([row, np.roll(row, 1), np.roll(row, 2)])


@dataclass
class RopeCall:
    """Arguments of `rope_and_cache`, as NumPy arrays.

    Attributes:
        caches: All arrays that are written to, in the order of the op's argument.
        options: The keywords, as users give them; q_norm, k_norm and scales may be arrays.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    caches: list[np.ndarray]
    positions: np.ndarray
    cos_sin: np.ndarray
    slot_mapping: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, function: Callable[..., Any], convert: Callable[[np.ndarray], Any], caches: Sequence[Any], **more: Any
    ) -> Any:
        """What a framework's function returns for arrays made by `convert`, and caches that are made already."""
        options = {name: convert(x) if isinstance(x, np.ndarray) else x for name, x in self.options.items()}
        arrays = map(convert, (self.query, self.key, self.value, self.positions, self.cos_sin, self.slot_mapping))
        query, key, value, *rest = arrays
        return function(query, key, value, tuple(caches), *rest, **(options | more))


def run_oracle(call: RopeCall) -> list[np.ndarray]:
    """The new query, and all caches as they are then; those of the call keep their poison."""
    caches = [cache.copy() for cache in call.caches]
    return [call(rope_and_cache, lambda array: array, caches), *caches]


def table(rotary_dim: int) -> np.ndarray:
    """Cosines and sines of MAX_POSITION positions, in float32. Row 0 is exactly ones and zeros."""
    angles = np.arange(MAX_POSITION)[:, None] * 1e4 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def weights(rng: np.random.Generator, size: int, dtype: str | None) -> np.ndarray | None:
    """Weights of a norm, about 1, or None."""
    return None if dtype is None else (1 + random_normal(rng, (size,), "float32") / 4).astype(DTYPES[dtype])


NORMS = {"q_weights": "float32", "k_weights": "float32"}
MLA = {"layout": "MLA", "num_q_heads": 5, "head_size": 16, "rank": 48, "rope": "gptj"}
DS_MLA = MLA | {"kv_cache_dtype": "fp8_ds_mla", "head_size": 64, "rank": 512, "num_q_heads": 3}
PACKED = {"head_size": 48, "head_size_v": 32}

CASES = [
    # heads and pairs
    RopeCase("neox, head_size 128", head_size=128, num_tokens=3),
    RopeCase("gptj, head_size 128", head_size=128, num_tokens=3, rope="gptj"),
    RopeCase("neox, head_size 64, half of it", head_size=64, rotary_dim=32),
    RopeCase("gptj, head_size 64, half of it", head_size=64, rotary_dim=32, rope="gptj"),
    RopeCase("neox, head_size 96", head_size=96, num_tokens=3),
    RopeCase("gptj, head_size 80, 24 of it", head_size=80, rotary_dim=24, rope="gptj"),
    RopeCase("neox, head_size 40", head_size=40),
    RopeCase("gptj, head_size 40, a pair", head_size=40, rotary_dim=2, rope="gptj"),
    RopeCase("neox, head_size 6", head_size=6),
    RopeCase("neox, head_size 7, 6 of it", head_size=7, rotary_dim=6, num_heads=3, num_q_heads=3),
    RopeCase("1 query head a head", num_heads=3, num_q_heads=3),
    RopeCase("6 query heads a head", num_q_heads=12),
    RopeCase("1 query head, 3 heads", num_heads=3, num_q_heads=1),
    # norms
    RopeCase("norms", **NORMS),
    RopeCase("norms, head_size 80, 40 rotated", head_size=80, rotary_dim=40, **NORMS),
    RopeCase("norms in bfloat16, gptj, head_size 6", head_size=6, rope="gptj", q_weights="bfloat16",
             k_weights="bfloat16", eps=1e-5),
    RopeCase("norm of query alone, no eps", q_weights="float32", eps=0),
    RopeCase("norm of key alone, large eps", k_weights="float32", eps=0.5, head_size=40),
    # tokens
    RopeCase("1 token without a layout", num_tokens=1, layout=None),
    RopeCase("no token", num_tokens=0, **NORMS),
    RopeCase("slots outside", slots=FAR),
    RopeCase("5 tokens, slots -1 and beyond, int32", num_tokens=5, slots=(-1, 7, 40, 0, 2**31 - 1), integers="int32"),
    RopeCase("fewer slots than tokens", slots=(5, 6, 33)),
    RopeCase("no slots", slots=()),
    RopeCase("positions outside", positions=OUTSIDE, inputs="special", **NORMS),
    RopeCase("positions outside, int32", positions=(2**31 - 1, -1, 11, 10, 0, -(2**31), 5), integers="int32"),
    RopeCase("mrope", sections=(2, 3, 3), positions=(0, 1, 10, 4, 11, 6, 7), inputs="special"),
    RopeCase("mrope, gptj, 8 of 40", head_size=40, rotary_dim=8, sections=(1, 0, 3), rope="gptj", integers="int32"),
    # dtypes
    RopeCase("float16", dtype="float16", table_dtype="float16", q_weights="float16", k_weights="float16"),
    RopeCase("float32", dtype="float32", inputs="special"),
    RopeCase("float32 into bfloat16", dtype="float32", cache_dtype="bfloat16", inputs="special", **NORMS),
    RopeCase("bfloat16 into float32", cache_dtype="float32", inputs="special", **NORMS),
    RopeCase("float16 into bfloat16", dtype="float16", cache_dtype="bfloat16", inputs="special"),
    RopeCase("bfloat16, special", inputs="special"),
    RopeCase("bfloat16, subnormal", inputs="subnormal", **NORMS),
    RopeCase("float32, subnormal", dtype="float32", inputs="subnormal"),
    RopeCase("table in bfloat16", table_dtype="bfloat16", **NORMS),
    # layouts
    RopeCase("HND", layout="HND", **NORMS),
    RopeCase("HEAD_MAJOR", layout="HEAD_MAJOR", head_size=48),
    RopeCase("HEAD_MAJOR by its axes", layout=None, default="HEAD_MAJOR", head_size=24, rotary_dim=16, rope="gptj"),
    RopeCase("KV_NHD", layout="KV_NHD", rope="gptj"),
    RopeCase("BLOCK_KV_HND", layout="BLOCK_KV_HND", num_layers=3, layer=0),
    RopeCase("PACKED_NHD", layout="PACKED_NHD", **PACKED),
    RopeCase("one array without a layout", layout=None, default="PACKED_NHD", head_size=32, head_size_v=40, **NORMS),
    RopeCase("PACKED_HND of all layers", layout="PACKED_HND", num_layers=3, layer=2, slots=FAR, **PACKED),
    RopeCase("INTERLEAVED", layout="INTERLEAVED", **NORMS),
    RopeCase("NHD of all layers", num_layers=3, layer=1, slots=FAR),
    # formats
    RopeCase("fp8_e4m3", kv_cache_dtype="fp8_e4m3", inputs="special"),
    RopeCase("fp8_e4m3, scales of heads", kv_cache_dtype="fp8_e4m3", scales="head", cache_dtype="float8_e4m3fn",
             layout="HND", num_heads=3, **NORMS),
    RopeCase("fp8_e5m2", kv_cache_dtype="fp8_e5m2", dtype="float16", rope="gptj", head_size=40, rotary_dim=20),
    RopeCase("fp8_e4m3, scales of layers and heads", kv_cache_dtype="fp8_e4m3", scales="layer and head", num_layers=3,
             layer=2, **NORMS),
    RopeCase("int8, scales of layers", kv_cache_dtype="int8", scales="layer", layout="HND", num_layers=3, layer=1),
    RopeCase("int8", kv_cache_dtype="int8", cache_dtype="int8", scales=(0.02, 1e-2), **NORMS),
    RopeCase("int4", kv_cache_dtype="int4", scales="head", layout="KV_NHD", head_size=40, inputs="special"),
    RopeCase("nvfp4", kv_cache_dtype="nvfp4", head_size=48, inputs="special", **NORMS),
    RopeCase("nvfp4, PACKED_HND, float32", kv_cache_dtype="nvfp4", layout="PACKED_HND", dtype="float32", scales="head",
             rope="gptj", rotary_dim=32, **PACKED),
    # scales of tokens and heads
    RopeCase("fp8_e4m3 by token and head", kv_cache_dtype="fp8_e4m3", per_token_head=True, inputs="special"),
    RopeCase("int8 by token and head", kv_cache_dtype="int8", per_token_head=True, layout="HND",
             scale_layout="head slot block", positions=OUTSIDE, **NORMS),
    RopeCase("int4 by token and head, PACKED_NHD", kv_cache_dtype="int4", per_token_head=True, layout="PACKED_NHD",
             slots=FAR, **PACKED),
    RopeCase("int8 by token and head of all layers", kv_cache_dtype="int8", per_token_head=True, num_layers=3, layer=2,
             dtype="float16", head_size=40, rotary_dim=20, rope="gptj"),
    # MLA
    RopeCase("MLA", **MLA),
    RopeCase("MLA without a layout, neox, normed", **MLA | {"layout": None, "default": "MLA", "rope": "neox"},
             k_weights="float32", q_weights="float32", positions=OUTSIDE, inputs="special"),
    RopeCase("MLA of all layers, float16", **MLA, num_layers=3, layer=1, slots=FAR, dtype="float16"),
    RopeCase("MLA, blocks within slots", **MLA | {"layout": "slot block latent"}, dtype="float32", inputs="special"),
    RopeCase("MLA, fp8_e4m3", **MLA, kv_cache_dtype="fp8_e4m3", k_weights="bfloat16", inputs="special"),
    RopeCase("MLA, fp8_e4m3, scales of layers", **MLA, kv_cache_dtype="fp8_e4m3", scales="layer", num_layers=3,
             layer=2),
    RopeCase("MLA, nvfp4, part of k_pe", **MLA, kv_cache_dtype="nvfp4", rotary_dim=8),
    RopeCase("MLA, fp8_ds_mla", **DS_MLA, num_tokens=3, inputs="special"),
    RopeCase("MLA, fp8_ds_mla of all layers, normed", **DS_MLA, num_tokens=3, num_layers=3, layer=2,
             k_weights="bfloat16", positions=(11, 3, 0)),
]  # fmt: skip
"""Everything that a call may be, in as few tokens as show it. With the seed, a case's name decides its numbers."""

"""What arguments that choose something may be, as types: for editors and type checkers, no value depends on them.

The tables that decide at run time are named beside each; a test holds them to one another.
"""

from typing import Literal

from kvcore.layout import CacheLayout

KVCacheDtype = Literal[
    "auto",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3fnuz",
    "fp8_e5m2fnuz",
    "int8",
    "int4",
    "nvfp4",
    "fp8_ds_mla",
]
"""Names of what a cache may hold; "auto" is the dtype of its array."""

ScaledDtype = Literal[
    "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4", "nvfp4"
]  # fmt: skip
"""Of these, the formats with static scales, which `kv_scales` computes."""

PerTokenHeadDtype = Literal["fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4"]
"""Of these, the formats with a scale for each token and head: `kvcore.formats.PER_TOKEN_HEAD`."""

FloatDtype = Literal["float16", "bfloat16", "float32"]
"""What is not quantised: `kvcore.formats.FLOATS`."""

Granularity = Literal["tensor", "head"]
"""How many static scales there are: one, or one a head."""

RopeName = Literal["neox", "gptj"]
"""How the elements of a head are paired for a rotation: `kvcore.contract.rope.ROPES`."""

JaxBackend = Literal["triton", "xla", "interpret"]
"""`jaxkv._arguments.BACKENDS`."""

TorchBackend = Literal["triton", "torch", "interpret"]
"""`torchkv._arguments.BACKENDS`."""

LayoutName = Literal[
    "NHD",
    "HND",
    "HEAD_MAJOR",
    "PALLAS",
    "KV_NHD",
    "BLOCK_KV_NHD",
    "BLOCK_KV_HND",
    "PACKED_NHD",
    "PACKED_HND",
    "INTERLEAVED",
    "MLA",
]
"""Names of layouts: `CacheLayout`'s constants."""

Layout = LayoutName | str | CacheLayout
"""A name, a pattern or a layout. Any string may be a pattern; the names are there for editors to complete."""

"""Reads of quantised caches that the CPU and the GPU tests share."""

import numpy as np

from tests.cases.arrays import LAYOUTS
from tests.cases.reads import make_read

FORMATS = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "int8", "int4", "nvfp4", "fp8_ds_mla")


def kinds(layouts=(*LAYOUTS, "MLA")):
    """Formats, granularities and layouts that go together."""
    for name in FORMATS:
        for granularity in ("tensor", "head", "token_head"):
            for layout in layouts:
                if (name == "fp8_ds_mla") != (layout == "MLA") and name == "fp8_ds_mla":
                    continue
                if granularity != "tensor" and (layout == "MLA" or (name, granularity) == ("nvfp4", "token_head")):
                    continue
                if name == "nvfp4" and layout == "HEAD_MAJOR":
                    continue
                yield name, granularity, layout


TELLING = (("int8", "token_head"), ("int4", "head"), ("nvfp4", "tensor"), ("fp8_ds_mla", "tensor"))
"""Every kind of addressing: what the other formats do in a layout, one of these does."""


TELLING_OF_LAYERS = (
    ("fp8_e4m3", "layer", "NHD"),
    ("int4", "layer and head", "PACKED_HND"),
    ("nvfp4", "layer and head", "NHD"),
    ("int8", "layer", "MLA"),
)
"""The same for static scales of layers, with a layout each."""


def telling(layouts):
    return [kind for kind in kinds() if kind[2] == "NHD" or (kind[2] in layouts and kind[:2] in TELLING)]


def read_case(seed, name, granularity, layout, **more):
    mla = {"head_size": 576, "head_size_v": 512} if name == "fp8_ds_mla" else {"head_size": 64}
    # With scales that fit what the writer was given, nothing saturates.
    scales = {"int8": (0.03, 0.04), "int4": (0.5, 0.6), "nvfp4": (0.001, 0.002)}.get(name, (0.02, 0.01))
    options = {"scales": scales, **mla, **more}
    return make_read(
        np.random.default_rng(seed), layout=layout, kv_cache_dtype=name, granularity=granularity, **options
    )

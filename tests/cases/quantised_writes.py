"""Quantised writes that the CPU and the GPU tests share."""

import numpy as np

from kvcore.formats import KV_CACHE_DTYPES
from tests.cases.arrays import LAYOUTS, make_case

FORMATS = [name for name in KV_CACHE_DTYPES if name not in ("auto", "fp8", "fp8_ds_mla")]


GRANULARITIES = {
    "tensor": {},
    "head": {"scales": "head"},
    "token and head": {"per_token_head": True},
    "token and head, heads first": {"per_token_head": True, "scale_layout": "head slot block"},
    "token and head, two patterns": {"per_token_head": True, "scale_layout": "block slot head, block head slot"},
}


OF_LAYERS = {"layer": {"scales": "layer"}, "layer and head": {"scales": "layer and head"}}


def kinds(layouts=LAYOUTS):
    """Formats, granularities and layouts that go together."""
    for name in FORMATS:
        for granularity in GRANULARITIES:
            for layout in layouts:
                if name == "nvfp4" and (layout == "HEAD_MAJOR" or "token" in granularity):
                    continue  # its scales are its own, and follow elements along dim
                yield name, granularity, layout


TELLING = (("int8", "token and head"), ("int4", "head"), ("int4", "token and head"), ("nvfp4", "tensor"))
"""Every kind of addressing: what the other formats do in a layout, one of these does."""


TELLING_OF_LAYERS = (("fp8_e4m3", "layer"), ("int4", "layer and head"), ("nvfp4", "layer"), ("nvfp4", "layer and head"))
"""The same for static scales of layers: the kernel of one scale for all heads, that of heads, and that of groups."""


def quantised_case(name, granularity, layout, layer=None, dtype="bfloat16", **more):
    options = dict((GRANULARITIES | OF_LAYERS)[granularity])
    if layer is not None and "scale_layout" in options:
        options["scale_layout"] = ", ".join(f"layer {p}" for p in options["scale_layout"].split(","))
    return make_case(
        np.random.default_rng([len(name), len(granularity), len(layout)]), layout=layout, dtype=dtype,
        kv_cache_dtype=name, head_size=48, head_size_v=16 if "PACKED" in layout else None,
        num_layers=None if layer is None else 3, layer=layer, slots=[3, -1, 39, 40, 0, 17, 16], **options, **more,
    )  # fmt: skip


def run_mla(module, convert, back, arrays, *options, **more):
    kv_c, k_pe, cache, slots = (convert(a) for a in arrays)
    new = module.concat_and_cache_mla(kv_c, k_pe, cache, slots, *options, **more)
    return back(cache if new is None else new)

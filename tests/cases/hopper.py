"""Calls that the attention kernel for Hopper takes, and what it becomes."""

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.read import Attention, AttentionOptions, check_attention
from kvcore.layout import CacheLayout
from kvcore.plan.attention import AttentionPlan, plan_attention
from kvcore.plan.kernel import Target
from tests.cases.reads import ReadCase

H100 = Target("cuda", 90)
HEADS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Head sizes of K and of V."""


def prefill(
    head_size=128, head_size_v=None, *, dtype="bfloat16", cache_dtype=None, layout="NHD", block_size=16, tokens=4096,
    sequences=2, num_heads=8, group=4, blocks=1024, max_blocks=512, layers=None, sinks=False,
    options=(None, True, None, None),
) -> Attention:  # fmt: skip
    """A call with many query rows a sequence."""
    layout = CacheLayout.of(layout)
    if layers is not None:
        layout = layout.with_layer()
    shapes = layout.shapes(
        num_blocks=blocks, block_size=block_size, num_heads=num_heads, head_size=head_size, num_layers=layers,
        head_size_v=head_size_v or head_size, x=8 if "dim/x" in layout.pattern else None,
    )  # fmt: skip
    caches = [ArraySpec(shape, cache_dtype or dtype) for shape in shapes]
    layer = None if layers is None else ArraySpec((), "int32")
    return check_attention(
        ArraySpec((tokens, num_heads * group, head_size), dtype),
        ArraySpec((sequences, max_blocks), "int32"), ArraySpec((sequences,), "int32"),
        ArraySpec((sequences + 1,), "int32"), ArraySpec((num_heads * group,), "float32") if sinks else None,
        AttentionOptions(*options), CacheArguments(caches, "auto", layout=layout, layer=layer), None,
    )  # fmt: skip


def is_for_hopper(plan: AttentionPlan) -> bool:
    """Whether a plan launches the kernel for Hopper."""
    return plan.attend.name == "hopper_attention_kernel"


def call_of(case: ReadCase) -> Attention:
    """What a case asks for."""
    arrays = {name: ArraySpec(a.shape, a.dtype.name) for name, a in vars(case).items() if hasattr(a, "dtype")}
    sinks = case.options.get("sinks")
    names = ("scale", "causal", "sliding_window", "soft_cap")
    defaults = dict(zip(names, (None, True, None, None), strict=True))
    return check_attention(
        arrays["query"], arrays["block_tables"], arrays["seq_lens"], arrays.get("query_start_loc"),
        None if sinks is None else ArraySpec(sinks.shape, sinks.dtype.name),
        AttentionOptions(*(case.options.get(name, default) for name, default in defaults.items())).normal(),
        CacheArguments(
            [ArraySpec(c.shape, c.dtype.name) for c in case.caches], case.options["kv_cache_dtype"],
            layout=case.layout, layer=case.options["layer"],
        ),
        None,
    )  # fmt: skip


def plan_of(case: ReadCase) -> AttentionPlan:
    """The plan of a case on an H100."""
    return plan_attention(call_of(case), H100, descriptors=True)

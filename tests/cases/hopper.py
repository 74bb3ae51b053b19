"""Calls that the attention kernels for Hopper take, and what they become."""

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


def latent(
    heads=128, *, dtype="bfloat16", cache_dtype=None, kv_cache_dtype="auto", head_sizes=(576, 512), block_size=64,
    tokens=None, sequences=64, context=8192, layers=None, sinks=False, options=(None, True, None, None), spec=None,
) -> Attention:  # fmt: skip
    """A call over a latent cache (MLA). Without tokens, those of all sequences, each has one, and no query_start_loc.

    spec describes a cache of that dtype that lies otherwise in memory.
    """
    layout = CacheLayout.MLA if layers is None else CacheLayout.MLA.with_layer()
    blocks = -(-context // block_size)
    shapes = layout.shapes(
        num_blocks=blocks * sequences, block_size=block_size, num_heads=1, head_size=head_sizes[0],
        head_size_v=head_sizes[1], num_layers=layers, x=None,
    )  # fmt: skip
    if kv_cache_dtype == "fp8_ds_mla":
        shapes = [(*shape[:-1], 656) for shape in shapes]
    caches = [ArraySpec(shape, cache_dtype or dtype) for shape in shapes] if spec is None else [spec]
    return check_attention(
        ArraySpec((tokens or sequences, heads, head_sizes[0]), dtype), ArraySpec((sequences, blocks), "int32"),
        ArraySpec((sequences,), "int32"), None if tokens is None else ArraySpec((sequences + 1,), "int32"),
        ArraySpec((heads,), "float32") if sinks else None, AttentionOptions(*options),
        CacheArguments(
            caches, kv_cache_dtype, layout=layout, layer=None if layers is None else ArraySpec((), "int32"),
        ),
        head_sizes[1],
    )  # fmt: skip


def is_for_hopper(plan: AttentionPlan) -> bool:
    """Whether a plan launches a kernel for Hopper."""
    return plan.attend.name in ("hopper_attention_kernel", "hopper_mla_kernel")


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
        case.head_size_v if case.layout.latent else None,
    )  # fmt: skip


def plan_of(case: ReadCase) -> AttentionPlan:
    """The plan of a case on an H100."""
    return plan_attention(call_of(case), H100, descriptors=True)

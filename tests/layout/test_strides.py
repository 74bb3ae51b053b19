"""Every stride of every operand of every kernel is read: operands × axes × (transposed, stepped, expanded, offset).

Operands are those of the torch ops' schemas, so that a new argument cannot be forgotten; JAX's arrays have no strides.
"""

import itertools

import numpy as np
import pytest
import torch

import torchkv  # noqa: F401  (defines the ops)
from tests.cases.arrays import bits, from_torch, random_bits, random_normal, to_torch
from tests.cases.gpu import DEVICE, HAS_GPU

OPS = {
    name: getattr(torch.ops.torchkv, name).default
    for name in (
        "paged_attention", "gather_kv", "reshape_and_cache_flash", "reshape_and_cache_flash_diffkv",
        "reshape_and_cache_flash_per_token_head_quant", "reshape_and_cache_flash_diffkv_per_token_head_quant",
        "concat_and_cache_mla", "rope_and_cache", "slot_mapping", "copy_blocks", "zero_blocks", "swap_blocks",
        "relayout",
    )
}  # fmt: skip
BLOCKS, BLOCK_SIZE, HEADS, SIZE, LAYERS = 5, 4, 2, 16, 2
rng = np.random.default_rng(0)


def tensor(array):
    return to_torch(np.array(array))


def normal(*shape, dtype="float32"):
    return tensor(random_normal(rng, shape, dtype))


def scales(*shape):
    return tensor(rng.uniform(0.1, 2, shape).astype(np.float32))


def poison(*shape, dtype="uint8"):
    return tensor(random_bits(rng, shape, dtype))


CACHES = [normal(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE) for _ in range(2)]
BYTES = [tensor(rng.integers(0, 120, (BLOCKS, BLOCK_SIZE, HEADS, SIZE), np.uint8)) for _ in range(2)]
TABLES, LENS = tensor(np.array([[3, 1, 0], [2, 4, 1]], np.int32)), tensor(np.array([9, 7], np.int32))
SLOTS = tensor(np.array([7, -1, 19, 0, 5], np.int64))
ROWS = dict(key=normal(5, HEADS, SIZE), value=normal(5, HEADS, SIZE), slot_mapping=SLOTS)
READING = dict(block_tables=TABLES, seq_lens=LENS)
LAYER = dict(layer_index=tensor(np.array([1], np.int32)), layout="layer block slot head dim")
LAYER_BYTES = [tensor(rng.integers(0, 120, (LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE), np.uint8)) for _ in range(2)]
FP8_SCALES = dict(k_scale=scales(HEADS), v_scale=scales(HEADS))
LAYER_SCALES = dict(k_scale=scales(LAYERS, HEADS), v_scale=scales(LAYERS, HEADS))
ROTATED = dict(query=normal(5, 4, SIZE), cos_sin=normal(10, SIZE), q_norm=normal(SIZE), k_norm=normal(SIZE), eps=1e-6)
SCALE_CACHES = [scales(BLOCKS, BLOCK_SIZE, HEADS) for _ in range(2)]
PAIRS = dict(pairs=tensor(np.array([[1, 2], [2, 3], [3, 1], [-1, 4], [0, 4]], np.int32)))
MOVES = tensor(np.array([[1, 2], [20, 3], [3, 17], [-1, 4], [0, 9]], np.int32))
CALLS = {
    "attention": ("paged_attention", dict(
        query=normal(4, 4, SIZE), caches=CACHES, query_start_loc=tensor(np.array([0, 3, 4], np.int32)),
        sinks=normal(4), **READING, **LAYER,
    )),
    "attention over fp8": ("paged_attention", dict(
        query=normal(2, 4, SIZE), caches=BYTES, kv_cache_dtype="fp8", **READING, **FP8_SCALES,
    )),
    "attention over a layer of fp8": ("paged_attention", dict(
        query=normal(2, 4, SIZE), caches=LAYER_BYTES, kv_cache_dtype="fp8", **READING, **LAYER_SCALES, **LAYER,
    )),
    "attention over int8": ("paged_attention", dict(
        query=normal(2, 4, SIZE), caches=BYTES, kv_cache_dtype="int8", k_scale=SCALE_CACHES[0],
        v_scale=SCALE_CACHES[1], **READING,
    )),
    "gather": ("gather_kv", dict(caches=CACHES, **READING, **LAYER)),
    "gather of fp8": ("gather_kv", dict(caches=BYTES, kv_cache_dtype="fp8", **READING, **FP8_SCALES)),
    "gather of a layer of fp8": ("gather_kv", dict(
        caches=LAYER_BYTES, kv_cache_dtype="fp8", **READING, **LAYER_SCALES, **LAYER,
    )),
    "write": ("reshape_and_cache_flash", dict(
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="float32"),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="float32"), **ROWS, **LAYER,
    )),
    "write of fp8": ("reshape_and_cache_flash", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, SIZE), value_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        kv_cache_dtype="fp8", **ROWS, **FP8_SCALES,
    )),
    "write of fp8 to a layer": ("reshape_and_cache_flash", dict(
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE), kv_cache_dtype="fp8", k_scale=scales(LAYERS, 1),
        v_scale=scales(LAYERS, 1), **ROWS, **LAYER,
    )),
    "write of both": ("reshape_and_cache_flash_diffkv", dict(
        kv_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), kv_cache_dtype="int8", **ROWS, **LAYER_SCALES,
        **LAYER | dict(layout="layer block slot head k+v"),
    )),
    "write with scales": ("reshape_and_cache_flash_per_token_head_quant", dict(
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        k_scale_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, dtype="float32"),
        v_scale_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, dtype="float32"),
        kv_cache_dtype="int8", **ROWS, **LAYER,
    )),
    "write of both with scales": ("reshape_and_cache_flash_diffkv_per_token_head_quant", dict(
        kv_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE),
        k_scale_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, dtype="float32"),
        v_scale_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, dtype="float32"),
        kv_cache_dtype="int8", **ROWS, **LAYER | dict(layout="layer block slot head k+v"),
    )),
    "write of MLA": ("concat_and_cache_mla", dict(
        kv_c=normal(5, SIZE), k_pe=normal(5, 8), kv_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, SIZE + 8),
        kv_cache_dtype="int8", scale=scales(LAYERS, 1), slot_mapping=SLOTS, layer_index=LAYER["layer_index"],
    )),
    "rotated write of fp8": ("rope_and_cache", dict(
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE), kv_cache_dtype="fp8", rope="neox",
        positions=tensor(np.array([3, 0, 9, -1, 2], np.int64)), **ROTATED, **ROWS, **LAYER_SCALES, **LAYER,
    )),
    "rotated write with scales": ("rope_and_cache", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS), kv_cache_dtype="int8", rope="gptj", mrope_section=(1, 3, 4),
        positions=tensor(np.arange(15, dtype=np.int32).reshape(3, 5) % 10), **ROTATED, **ROWS,
    )),
    "slots": ("slot_mapping", dict(
        query_start_loc=tensor(np.array([0, 3, 5], np.int32)), num_tokens=6, **READING,
    )),
    "copied blocks": ("copy_blocks", dict(
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"), **PAIRS,
        layout="layer block slot head dim",
    )),
    "copied blocks with scales": ("copy_blocks", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS), **PAIRS,
    )),
    "swapped blocks": ("swap_blocks", dict(
        source_key_cache=poison(LAYERS, 7, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"),
        source_value_cache=poison(LAYERS, 7, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"),
        key_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"),
        value_cache=poison(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype="bfloat16"), **PAIRS,
        layout="layer block slot head dim",
    )),
    "swapped blocks with scales": ("swap_blocks", dict(
        source_key_cache=poison(7, BLOCK_SIZE, HEADS, 2 * SIZE), source_k_scale_cache=scales(7, BLOCK_SIZE, HEADS),
        source_v_scale_cache=scales(7, BLOCK_SIZE, HEADS), key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE),
        k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS), v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS), **PAIRS,
    )),
    "moved slots": ("relayout", dict(
        key_cache=poison(LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SIZE, dtype="float16"),
        value_cache=poison(LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SIZE, dtype="float16"),
        source=[poison(LAYERS, 7, 3, HEADS, SIZE, dtype="float16") for _ in range(2)], pairs=MOVES,
        layout="layer block head slot dim", source_layout="layer block slot head dim",
    )),
    "moved slots with scales": ("relayout", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        source=[poison(7, 3, HEADS, SIZE), poison(7, 3, HEADS, SIZE), scales(7, 3, HEADS), scales(7, 3, HEADS)],
        pairs=MOVES, kv_cache_dtype="int8", layout="block slot head k+v", scale_layout="block slot head",
        source_layout="block slot head dim", source_scale_layout="block slot head", head_size_v=SIZE,
    )),
    "requantised slots": ("relayout", dict(
        key_cache=poison(LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SIZE),
        value_cache=poison(LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SIZE),
        source=[tensor(rng.integers(0, 120, (LAYERS, 7, 3, HEADS, SIZE), np.uint8)) for _ in range(2)], pairs=MOVES,
        kv_cache_dtype="fp8", layout="layer block head slot dim", source_kv_cache_dtype="int8",
        source_layout="layer block slot head dim", source_k_scale=scales(LAYERS, HEADS), source_v_scale=scales(HEADS),
        k_scale=scales(HEADS), v_scale=scales(LAYERS, HEADS),
    )),
    "requantised slots with scales": ("relayout", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        source=[*(poison(7, 3, HEADS, SIZE // 2) for _ in range(2)), *(scales(7, 3, HEADS) for _ in range(2))],
        pairs=MOVES, kv_cache_dtype="int8", layout="block slot head k+v", scale_layout="block slot head",
        source_kv_cache_dtype="int4", source_layout="block slot head dim", source_scale_layout="block slot head",
    )),
    "zeroed blocks": ("zero_blocks", dict(
        key_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, SIZE), value_cache=poison(BLOCKS, BLOCK_SIZE, HEADS, SIZE),
        k_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS), v_scale_cache=scales(BLOCKS, BLOCK_SIZE, HEADS),
        blocks=tensor(np.array([3, -1, 0], np.int64)),
    )),
}  # fmt: skip
DEFAULTS = dict(
    kv_cache_dtype="auto",
    causal=True,
    max_len=10,
    head_size=SIZE,
    block_size=BLOCK_SIZE,
    layer=None,
    scale=None,
    sliding_window=None,
)


def tensors_of(op, given):
    """Names of the arguments that are tensors, with the place in a list or None, and the tensors."""
    for argument in op._schema.arguments:
        value = given.get(argument.name)
        if "Tensor[]" in str(argument.type) or "List[Tensor]" in str(argument.type):
            yield from (((argument.name, i), t) for i, t in enumerate(value))
        elif "Tensor" in str(argument.type) and value is not None:
            yield (argument.name, None), value


# ---- the same numbers, elsewhere in memory


def stepped(t, axis):
    room = [n * (3 if i == axis else 1) for i, n in enumerate(t.shape)]
    wide = poisoned(room, t)
    view = wide[(slice(None),) * axis + (slice(1, None, 3),)]
    return view.copy_(t)


def transposed(t, axis):
    order = [axis, *(i for i in range(t.dim()) if i != axis)]
    back = [order.index(i) for i in range(t.dim())]
    inner = t.permute(order[::-1]).contiguous()
    return inner.permute([t.dim() - 1 - i for i in back])


def expanded(t, axis):
    return t.narrow(axis, 0, 1).expand(t.shape)


def offset(t, axis):
    del axis
    flat = poisoned([t.numel() + 4], t)[4 if t.dtype == torch.uint8 else 1 :][: t.numel()]
    return flat.view(t.shape).copy_(t)


def poisoned(shape, like):
    room = torch.empty(shape, dtype=like.dtype, device=like.device)
    if like.dtype.is_floating_point:
        return room.fill_(torch.nan)
    return room.fill_(0x7F if like.dtype == torch.uint8 else 2**30)


VARIANTS = {v.__name__: v for v in (transposed, stepped, expanded, offset)}


def variants(op, given):
    for (name, i), t in tensors_of(op, given):
        for variant, axis in itertools.product(VARIANTS, range(t.dim())):
            if variant == "offset" and axis:
                continue
            if variant == "expanded" and (name in ("slot_mapping", "pairs") or t.shape[axis] == 1):
                continue  # several tokens for one slot, several blocks for one
            yield name, i, variant, axis


def run(op, given, backend):
    """Results, or what was written: copies, as bits."""
    given = DEFAULTS | given | {"backend": backend}
    names = [argument.name for argument in op._schema.arguments]
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    given = {k: strided_copy(v) if k in written else v for k, v in given.items()}
    results = op(*(given.get(name) for name in names))
    results = [results] if isinstance(results, torch.Tensor) else [*(results or ())]
    return [bits(from_torch(t)) for t in (*results, *(given[n] for n in names if n in written and n in given))]


def strided_copy(t):
    """A copy with the same strides."""
    if 0 in t.stride():
        return t
    room = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return room.copy_(t)


def op_and_call(name):
    op_name, given = CALLS[name]
    return OPS[op_name], given


def check(name, backend, device="cpu", only=None, ways=tuple(VARIANTS)):
    op, given = op_and_call(name)
    to = lambda v: v.to(device) if isinstance(v, torch.Tensor) else [x.to(device) for x in v]  # noqa: E731
    given = {k: to(v) if isinstance(v, (torch.Tensor, list)) else v for k, v in given.items()}
    usual = run(op, given, backend)
    for argument, i, variant, axis in variants(op, given):
        if only not in (None, argument) or variant not in ways:
            continue
        t = given[argument] if i is None else given[argument][i]
        moved = VARIANTS[variant](t, axis)
        want = usual
        scale_cache = "scale" in argument and t.dim() > 2
        if variant == "expanded" and t.dim() > 1 and ("cache" in argument or argument == "source" or scale_cache):
            with pytest.raises(ValueError, match=f"with stride 0 puts its {t.shape[axis]} elements in one place"):
                run(op, put(given, argument, i, moved), backend)
            continue
        if variant == "expanded":
            want = run(op, put(given, argument, i, moved.contiguous()), backend)
        got = run(op, put(given, argument, i, moved), backend)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{argument}{i or ''}, axis {axis}, {variant}")


def put(given, argument, i, value):
    if i is not None:
        value = [value if n == i else t for n, t in enumerate(given[argument])]
    return given | {argument: value}


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("name", CALLS)
def test_every_stride_is_read(name, backend):
    check(name, backend)


ON_A_GPU = (
    "attention", "attention over int8", "gather of fp8", "write of fp8", "write with scales", "rotated write of fp8",
    "slots",
)  # fmt: skip
OPERANDS = [(name, argument) for name in ON_A_GPU for argument in dict(t[0] for t in tensors_of(*op_and_call(name)))]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "argument"), OPERANDS)
def test_every_stride_is_read_on_a_gpu(name, argument):
    """One way to stride each axis: each is a kernel to compile."""
    check(name, None if HAS_GPU else "torch", DEVICE, argument, ["stepped"])


@pytest.mark.gpu
@pytest.mark.gpu_smoke
@pytest.mark.parametrize("name", ["attention over fp8", "gather of fp8"])
def test_strides_of_block_tables_are_read_on_a_gpu(name):
    check(name, None if HAS_GPU else "torch", DEVICE, "block_tables", ["transposed", "stepped"])


def test_every_tensor_of_every_op_is_among_the_calls():
    for op_name, op in OPS.items():
        wanted = {a.name for a in op._schema.arguments if "Tensor" in str(a.type)}
        given = set().union(*(set(call) for name, call in CALLS.values() if name == op_name))
        assert wanted <= given, op_name


def test_the_ops_are_all_there_are():
    defined = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("torchkv::")
    }
    results = {"paged_attention": ["out", "lse"], "gather_kv": ["key", "value"], "rope_and_cache": ["out"]}
    results["slot_mapping"] = ["out"]
    for name, given in results.items():  # twins with results of the caller's, and the same operands
        twin = getattr(torch.ops.torchkv, f"{name}_out").default
        assert [x.name for x in twin._schema.arguments] == given + [x.name for x in OPS[name]._schema.arguments]
    assert defined == set(OPS) | {f"{name}_out" for name in results}


def test_the_variants_are_what_they_are_called():
    t = normal(3, 4, 5)
    for name, variant in VARIANTS.items():
        for axis in range(3):
            v = variant(t, axis)
            assert v.shape == t.shape
            if name == "expanded":
                assert v.stride(axis) == 0
            else:
                assert torch.equal(v, t)
            if name == "transposed":
                assert v.stride(axis) == 1
            if name == "stepped":
                assert v.stride(axis) == 3 * t.stride(axis)
            if name == "offset":
                assert v.storage_offset()

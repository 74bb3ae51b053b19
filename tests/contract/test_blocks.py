"""Bad calls of copy_blocks and zero_blocks: one text from both frameworks, and nothing launched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jaxkv
import torchkv
from kvcore.run import interpreter
from tests.cases.arrays import to_torch
from tests.cases.bad_blocks import CHOICES, SPELLED, array, convert, pairs

CACHE = (6, 4, 2, 16)
COUNT = (
    "caches must be (key_cache, value_cache) or (kv_cache,), followed by (k_scale_cache, v_scale_cache) where each "
    "token's head has a scale, got {} arrays"
)


BOTH = (array(*CACHE), array(*CACHE))
SCALES = (array(6, 4, 2, dtype="float32"),) * 2
COPY = {"caches": BOTH, "pairs": pairs(3, 2)}
ZERO = {"caches": BOTH, "blocks": pairs(3)}

# name: op, what differs from a valid call, type, message
BAD = {
    "pairs of rank 1": ("copy", {"pairs": pairs(4)}, ValueError, "pairs must have shape (n, 2), got (4,)"),
    "triples": ("copy", {"pairs": pairs(4, 3)}, ValueError, "pairs must have shape (n, 2), got (4, 3)"),
    "dtype of pairs": (
        "copy", {"pairs": pairs(4, 2, dtype="float32")}, TypeError,
        "pairs must have dtype int32 or int64, got float32",
    ),
    "truths as pairs": (
        "copy", {"pairs": pairs(4, 2, dtype="bool")}, TypeError, "pairs must have dtype int32 or int64, got bool",
    ),
    "a scalar as pairs": ("copy", {"pairs": pairs()}, ValueError, "pairs must have shape (n, 2), got ()"),
    "blocks of rank 2": ("zero", {"blocks": pairs(4, 1)}, ValueError, "blocks must have shape (n,), got (4, 1)"),
    "a scalar as blocks": ("zero", {"blocks": pairs()}, ValueError, "blocks must have shape (n,), got ()"),
    "dtype of blocks": (
        "zero", {"blocks": pairs(4, dtype="float32")}, TypeError, "blocks must have dtype int32 or int64, got float32",
    ),
    "rank of a cache": (
        "copy", {"caches": (array(6, 4, 32),) * 2}, ValueError,
        "key_cache must have 4 axes (block slot head dim), got shape (6, 4, 32)",
    ),
    "five axes each": (
        "copy", {"caches": (array(2, *CACHE),) * 2}, ValueError,
        "layout must be given where key_cache and value_cache have 5 axes each, got None",
    ),
    "numbers of blocks": (
        "copy", {"caches": (array(*CACHE), array(5, 4, 2, 16))}, ValueError,
        "value_cache axis block must have size 6, as in key_cache, got 5",
    ),
    "numbers of layers": (
        "zero", {"caches": (array(3, *CACHE), array(2, *CACHE)), "layout": "layer block slot head dim"}, ValueError,
        "value_cache axis layer must have size 3, as in key_cache, got 2",
    ),
    "blocks of scales": (
        "copy", {"caches": (*BOTH, SCALES[0], array(7, 4, 2, dtype="float32"))}, ValueError,
        "v_scale_cache axis block must have size 6, as in key_cache, got 7",
    ),
    "rank of scales": (
        "copy", {"caches": (*BOTH, SCALES[0], array(6, 4, dtype="float32"))}, ValueError,
        "v_scale_cache must have 3 axes (block slot head), got shape (6, 4)",
    ),
    "layout of scales": (
        "copy", {"caches": (*BOTH, *SCALES), "scale_layout": "block head"}, ValueError,
        "scale_layout must name axes block, head, slot once each, got 'block head'",
    ),
    "dtypes that differ": (
        "copy", {"caches": (array(*CACHE), array(*CACHE, dtype="float16"))}, TypeError,
        "value_cache must have dtype bfloat16, as key_cache, got float16",
    ),
    "dtype of a cache": (
        "zero", {"caches": (np.zeros(CACHE, np.int16),) * 2}, TypeError,
        f"key_cache must have dtype {SPELLED}, got int16",
    ),
    "dtype of scales": (
        "copy", {"caches": (*BOTH, SCALES[0], array(6, 4, 2, dtype="float16"))}, TypeError,
        "v_scale_cache must have dtype float32, got float16",
    ),
    "no caches": ("copy", {"caches": ()}, ValueError, COUNT.format(0)),
    "five caches": ("zero", {"caches": BOTH * 2 + BOTH[:1]}, ValueError, COUNT.format(5)),
    "one cache for two": (
        "copy", {"caches": BOTH[:1], "layout": "NHD"}, ValueError,
        "caches must be (key_cache, value_cache) for layout 'block slot head dim', got 1 arrays",
    ),
    "two caches for one": (
        "copy", {"layout": "KV_NHD"}, ValueError,
        "caches must be one array for layout 'kv block slot head dim', got 2 arrays",
    ),
    "kv of three": (
        "copy", {"caches": (array(3, *CACHE),), "layout": "KV_NHD"}, ValueError,
        "kv_cache axis kv must have size 2, got 3",
    ),
    "odd blocks with kv": (
        "copy", {"caches": (array(5, 4, 2, 16),), "layout": "(block kv) slot head dim"}, ValueError,
        "kv_cache axis (block kv) must have an even size, got 5",
    ),
    "layout": ("copy", {"layout": 5}, TypeError, "layout must be a pattern string or a CacheLayout, got 5"),
    "backend": ("copy", {"backend": "cuda"}, ValueError, None),
}  # fmt: skip


def jax_call(op, arguments, **more):
    return getattr(jaxkv, f"{op}_blocks")(**(convert(arguments, jnp.asarray) | more))


def torch_call(op, arguments, **more):
    return getattr(torchkv, f"{op}_blocks")(**(convert(arguments, to_torch) | more))


def torch_fake(op, arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = convert(arguments, lambda a: mode.from_tensor(to_torch(a)))
        return getattr(torchkv, f"{op}_blocks")(**fake)


def jax_jit(op, arguments):
    arrays = {n: x for n, x in arguments.items() if isinstance(x, (np.ndarray, tuple))}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    return jax.jit(lambda x: getattr(jaxkv, f"{op}_blocks")(**x, **static)).lower(shapes)


def jax_refs(op, arguments):
    arguments = convert(arguments, jnp.asarray)
    return getattr(jaxkv, f"{op}_blocks")(**arguments | {"caches": list(map(jax.new_ref, arguments["caches"]))})


WAYS = {
    "jaxkv": jax_call,
    "jaxkv interpret": lambda op, x: jax_call(op, x, **({} if "backend" in x else {"backend": "interpret"})),
    "jaxkv jit": jax_jit,
    "jaxkv Refs": jax_refs,
    "torchkv": torch_call,
    "torchkv interpret": lambda op, x: torch_call(op, x, **({} if "backend" in x else {"backend": "interpret"})),
    "torchkv fake": torch_fake,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_calls(monkeypatch, bad, way):
    def launched(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(interpreter, "run", launched)
    monkeypatch.setattr(jaxkv.blocks, "update", launched)
    monkeypatch.setattr(torchkv._torch.blocks, "blocks_of", launched)
    op, differs, kind, message = BAD[bad]
    with pytest.raises(kind) as error:
        WAYS[way](op, (COPY if op == "copy" else ZERO) | differs)
    if message is None:
        message = f"backend must be None, {CHOICES[way.split()[0]]}, got 'cuda'"
    assert str(error.value) == message


@pytest.mark.parametrize("op", ["copy", "zero"])
def test_triton_needs_a_gpu(op):
    for call in (jax_call, torch_call):
        with pytest.raises(ValueError, match="backend 'triton' needs a CUDA or ROCm device, got cpu"):
            call(op, COPY if op == "copy" else ZERO, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_caches_that_overlap(backend):
    buffer = torch.ones(8, 4, 2, 16)
    for caches, text in (
        ((buffer[:6], buffer[2:]), "key_cache and value_cache must not overlap in memory"),
        ((buffer[:6], buffer[:6]), "key_cache and value_cache must not overlap in memory"),
        (
            (buffer[:6].clone(), buffer[:1].expand(6, -1, -1, -1)),
            "value_cache axis block with stride 0 puts its 6 elements in one place",
        ),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            torchkv.zero_blocks(caches, torch.tensor([1]), backend=backend)
        assert str(error.value) == text
    assert (buffer == 1).all()


def test_refs():
    ref, cache = jax.new_ref(jnp.ones(CACHE)), jnp.ones(CACHE)
    with pytest.raises(ValueError, match=r"^key_cache and value_cache must not overlap in memory$"):
        jaxkv.copy_blocks((ref, ref), [[0, 1]])
    with pytest.raises(
        TypeError, match=r"^key_cache and value_cache must be two jax.Refs or two arrays, got one of each"
    ):
        jaxkv.zero_blocks((ref, cache), [1])


def test_other_devices_and_types():
    caches = tuple(map(to_torch, BOTH))
    with pytest.raises(ValueError, match=r"^pairs must be on device cpu, as key_cache, got meta$"):
        torchkv.copy_blocks(caches, torch.zeros((3, 2), dtype=torch.int32, device="meta"))
    for wrong in ([[0, 1]], np.zeros((1, 2), np.int32)):
        with pytest.raises(TypeError, match=f"^pairs must be a torch.Tensor, got {type(wrong).__name__}$"):
            torchkv.copy_blocks(caches, wrong)
    with pytest.raises(TypeError, match=r"^blocks must be a torch.Tensor, got None(Type)?$"):
        torchkv.zero_blocks(caches, None)
    with pytest.raises(TypeError, match=r"^caches\[1\] must be a torch.Tensor, got ndarray$"):
        torchkv.zero_blocks((caches[0], BOTH[1]), torch.tensor([1]))

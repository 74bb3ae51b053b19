"""Bad calls of swap_blocks: one text in both frameworks, eager, traced and interpreted, and nothing is launched."""

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
from torchkv._swap import check_pinned

HINT = "; relayout copies between layouts, block sizes and formats"
COUNT = (
    "must be (key_cache, value_cache) or (kv_cache,), followed by (k_scale_cache, v_scale_cache) where each token's "
    "head has a scale, got {} arrays"
)
SOURCE = (array(6, 4, 2, 16),) * 2
DESTINATION = (array(9, 4, 2, 16),) * 2
SCALES, MORE_SCALES = (array(6, 4, 2, dtype="float32"),) * 2, (array(9, 4, 2, dtype="float32"),) * 2
GOOD = {"source": SOURCE, "destination": DESTINATION, "pairs": pairs(3, 2)}

# name: what differs from a valid call, type, message
BAD = {
    "pairs of rank 1": ({"pairs": pairs(4)}, ValueError, "pairs must have shape (n, 2), got (4,)"),
    "three columns": ({"pairs": pairs(4, 3)}, ValueError, "pairs must have shape (n, 2), got (4, 3)"),
    "dtype of pairs": (
        {"pairs": pairs(4, 2, dtype="float32")}, TypeError, "pairs must have dtype int32 or int64, got float32",
    ),
    "a scalar as pairs": ({"pairs": pairs()}, ValueError, "pairs must have shape (n, 2), got ()"),
    "rank of source": (
        {"source": (array(6, 4, 32),) * 2}, ValueError,
        "source's key_cache must have 4 axes (block slot head dim), got shape (6, 4, 32)",
    ),
    "rank of destination": (
        {"destination": (array(9, 4, 32),) * 2}, ValueError,
        "destination's key_cache must have 4 axes (block slot head dim), got shape (9, 4, 32)",
    ),
    "block size": (
        {"destination": (array(9, 8, 2, 16),) * 2}, ValueError,
        f"destination's key_cache axis slot must have size 4, as in source's key_cache, got 8{HINT}",
    ),
    "heads of values": (
        {"destination": (array(9, 4, 2, 16), array(9, 4, 3, 16))}, ValueError,
        f"destination's value_cache axis head must have size 2, as in source's value_cache, got 3{HINT}",
    ),
    "layers": (
        {"source": (array(3, 6, 4, 2, 16),) * 2, "destination": (array(2, 9, 4, 2, 16),) * 2,
         "layout": "layer block slot head dim"},
        ValueError, f"destination's key_cache axis layer must have size 3, as in source's key_cache, got 2{HINT}",
    ),
    "blocks within a cache": (
        {"destination": (array(9, 4, 2, 16), array(8, 4, 2, 16))}, ValueError,
        "destination's value_cache axis block must have size 9, as in destination's key_cache, got 8",
    ),
    "formats": (
        {"destination": (array(9, 4, 2, 16, dtype="uint8"),) * 2}, TypeError,
        f"destination's key_cache must have dtype bfloat16, as source's key_cache, got uint8{HINT}",
    ),
    "dtypes within a cache": (
        {"source": (SOURCE[0], array(6, 4, 2, 16, dtype="float16"))}, TypeError,
        "source's value_cache must have dtype bfloat16, as source's key_cache, got float16",
    ),
    "dtype of a cache": (
        {"source": (np.zeros((6, 4, 2, 16), np.int16),) * 2}, TypeError,
        f"source's key_cache must have dtype {SPELLED}, got int16",
    ),
    "scales of one": (
        {"source": (*SOURCE, *SCALES)}, ValueError,
        f"destination must have as many arrays as source, 4, got 2{HINT}",
    ),
    "one array and two": (
        {"destination": DESTINATION[:1]}, ValueError, f"destination must have as many arrays as source, 2, got 1{HINT}",
    ),
    "slots of scales": (
        {"source": (*SOURCE, *SCALES), "destination": (*DESTINATION, MORE_SCALES[0], array(9, 5, 2, dtype="float32"))},
        ValueError,
        f"destination's v_scale_cache axis slot must have size 4, as in source's v_scale_cache, got 5{HINT}",
    ),
    "dtype of scales": (
        {"source": (*SOURCE, *SCALES), "destination": (*DESTINATION, *(array(9, 4, 2, dtype="float16"),) * 2)},
        TypeError, "destination's k_scale_cache must have dtype float32, got float16",
    ),
    "no source": ({"source": ()}, ValueError, f"source {COUNT.format(0)}"),
    "five arrays": ({"destination": DESTINATION * 2 + DESTINATION[:1]}, ValueError, f"destination {COUNT.format(5)}"),
    "two arrays for one": (
        {"layout": "KV_NHD"}, ValueError,
        "caches must be one array for layout 'kv block slot head dim', got 2 arrays",
    ),
    "layout": ({"layout": 5}, TypeError, "layout must be a pattern string or a CacheLayout, got 5"),
    "backend": ({"backend": "cuda"}, ValueError, None),
}  # fmt: skip


def jax_call(arguments, **more):
    return jaxkv.swap_blocks(**(convert(arguments, jnp.asarray) | more))


def torch_call(arguments, **more):
    given = {n: tuple(map(to_torch, map(np.copy, x))) if isinstance(x, tuple) else x for n, x in arguments.items()}
    return torchkv.swap_blocks(**(given | {"pairs": to_torch(arguments["pairs"])} | more))


def torch_fake(arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return torchkv.swap_blocks(**convert(arguments, lambda a: mode.from_tensor(to_torch(a))))


def jax_jit(arguments):
    arrays = {n: x for n, x in arguments.items() if isinstance(x, (np.ndarray, tuple))}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    return jax.jit(lambda x: jaxkv.swap_blocks(**x, **static)).lower(shapes)


def jax_refs(arguments):
    arguments = convert(arguments, jnp.asarray)
    return jaxkv.swap_blocks(**arguments | {"destination": list(map(jax.new_ref, arguments["destination"]))})


def interpreted(call):
    return lambda x: call(x, **({} if "backend" in x else {"backend": "interpret"}))


WAYS = {
    "jaxkv": jax_call, "jaxkv interpret": interpreted(jax_call), "jaxkv jit": jax_jit, "jaxkv Refs": jax_refs,
    "torchkv": torch_call, "torchkv interpret": interpreted(torch_call), "torchkv fake": torch_fake,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_calls(monkeypatch, bad, way):
    def launched(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(interpreter, "run", launched)
    monkeypatch.setattr(jaxkv.blocks, "update", launched)
    monkeypatch.setattr(torchkv._torch.swap, "blocks_of", launched)
    differs, kind, message = BAD[bad]
    with pytest.raises(kind) as error:
        WAYS[way](GOOD | differs)
    if message is None:
        message = f"backend must be None, {CHOICES[way.split()[0]]}, got 'cuda'"
    assert str(error.value) == message


def test_triton_needs_a_gpu():
    for call in (jax_call, torch_call):
        with pytest.raises(ValueError, match="backend 'triton' needs a CUDA or ROCm device, got cpu"):
            call(GOOD, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_caches_that_overlap(backend):
    buffer = torch.ones(12, 4, 2, 16)
    apart = buffer[:3].clone(), buffer[:3].clone()
    for source, destination, text in (
        (apart, (buffer[:6], buffer[5:11]), "destination's key_cache and destination's value_cache"),
        (
            (buffer[:6], apart[0].repeat(2, 1, 1, 1)),
            (buffer[5:8], apart[1]),
            "destination's key_cache and source's key_cache",
        ),
        ((apart[0], buffer[:3]), (apart[1], buffer[2:5]), "destination's value_cache and source's value_cache"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            torchkv.swap_blocks(source, destination, torch.tensor([[1, 1]]), backend=backend)
        assert str(error.value) == f"{text} must not overlap in memory"
    assert (buffer == 1).all()
    twice = buffer[:3]
    torchkv.swap_blocks((twice, twice), apart, torch.tensor([[1, 1]]), backend=backend)  # what is only read may


def test_devices():
    """Of the two caches one may be in the host's memory; pairs are where the other one is."""
    with FakeTensorMode():

        def call(source, destination, where):
            caches = [[torch.empty(6, 4, 2, 16, device=d) for d in (side * 2)[:2]] for side in (source, destination)]
            return torchkv.swap_blocks(*caches, torch.empty(3, 2, dtype=torch.int32, device=where))

        for source, destination, where in (("cuda", "cpu", "cuda"), ("cpu", "cuda", "cuda"), ("cuda", "cuda", "cuda")):
            assert call([source], [destination], where) is None
        for arguments, text in (
            ((["cuda:0"], ["cpu"], "cpu"), "pairs must be on device cuda:0, as source's key_cache, got cpu"),
            ((["cpu"], ["cuda:0"], "cpu"), "pairs must be on device cuda:0, as destination's key_cache, got cpu"),
            (
                (["cuda:0"], ["cuda:1"], "cuda:0"),
                "source and destination must be on one device, or one of them in the host's memory, got cuda:0 and "
                "cuda:1",
            ),
            (
                (["cuda:0", "cpu"], ["cpu"], "cuda:0"),
                "source's value_cache must be on device cuda:0, as source's key_cache, got cpu",
            ),
        ):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                call(*arguments)
            assert str(error.value) == text


@pytest.mark.parametrize("host", ["source", "destination"])
def test_memory_that_a_gpu_cannot_reach(monkeypatch, host):
    """Looked at before a kernel is compiled, and before each start."""
    device, here = torch.device("cuda", 0), "pageable"
    names = {"key_cache": SOURCE[0], "value_cache": SOURCE[1], "k_scale_cache": SCALES[0], "v_scale_cache": SCALES[1]}
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: here == "pinned")
    for count in (1, 2, 3, 4):
        given = list(map(to_torch, map(np.copy, list(names.values())[:count])))
        on_gpu = [tensor.to("meta") for tensor in given]
        read, written = (given, on_gpu) if host == "source" else (on_gpu, given)
        first = "kv_cache" if count % 2 else "key_cache"
        text = (
            f"{host}'s {first} must be in pinned memory, which cuda:0 can reach: Tensor.pin_memory() and "
            "PagedKVCache.create_host() make such, got pageable memory"
        )
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_pinned(None, (*read, *written), device)
        assert str(error.value) == text
        check_pinned(None, (*read, *written), torch.device("cpu"))
    here = "pinned"
    check_pinned(None, (*read, *written), device)


def test_other_types():
    source, destination = (tuple(map(to_torch, side)) for side in (SOURCE, DESTINATION))
    for wrong in ([[0, 1]], np.zeros((1, 2), np.int32)):
        with pytest.raises(TypeError, match=f"^pairs must be a torch.Tensor, got {type(wrong).__name__}$"):
            torchkv.swap_blocks(source, destination, wrong)
    with pytest.raises(TypeError, match=r"^destination\[1\] must be a torch.Tensor, got ndarray$"):
        torchkv.swap_blocks(source, (destination[0], DESTINATION[1]), torch.tensor([[0, 1]]))
    ref = jax.new_ref(jnp.ones((9, 4, 2, 16)))
    for wrong, kind, text in (
        ((ref, ref), ValueError, "key_cache and value_cache must not overlap in memory"),
        ((ref, ref[...]), TypeError, "key_cache and value_cache must be two jax.Refs or two arrays, got one of each"),
    ):
        with pytest.raises(kind) as error:
            jaxkv.swap_blocks(SOURCE, wrong, [[0, 1]])
        assert str(error.value) == text


@pytest.mark.parametrize("module", [jaxkv, torchkv], ids=["jax", "torch"])
def test_caches_that_differ(module):
    """Of methods, which know more than shapes: formats of the same bytes, for one."""
    extents = {"num_blocks": 4, "block_size": 4, "num_heads": 2, "head_size": 16, "kv_cache_dtype": "fp8"}
    cache = module.PagedKVCache.create(**extents)
    indices = torch.tensor([[0, 1]]) if module is torchkv else [[0, 1]]
    for differs, text in (
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype 'fp8', as source, got 'int8'"),
        ({"block_size": 8}, "block_size 4, as source, got 8"),
        ({"layout": "HND"}, "layout 'block slot head dim', as source, got 'block head slot dim'"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            cache.swap_blocks(module.PagedKVCache.create(**extents | differs), indices)
        assert str(error.value) == f"destination must have {text}{HINT}"
    with pytest.raises(TypeError, match="cache must be a PagedKVCache of jaxkv or torchkv, got tuple"):
        cache.swap_blocks(cache.caches, indices)
    with pytest.raises(TypeError, match="num_blocks or memory must be given, and not both, got neither"):
        cache.create_host()

"""gather_slots, and `PagedKVCache.read`: both frameworks, portable and interpreted kernel, bit for bit the oracle's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
import torchkv
from kvcore.layout import CONSTANTS as LAYOUTS
from kvcore.oracle import read as oracle
from tests.cases.arrays import bits, from_torch, to_torch
from tests.cases.gathers import SLOTS, read_slots, wanted_slots
from tests.cases.reads import make_read
from tests.cases.torch_ops import gather_arguments

MODULES = {
    "jax xla": (jaxkv, jnp.asarray, np.asarray, "xla"),
    "jax interpret": (jaxkv, jnp.asarray, np.asarray, "interpret"),
    "torch": (torchkv, lambda a: to_torch(a.copy()), from_torch, "torch"),
    "torch interpret": (torchkv, lambda a: to_torch(a.copy()), from_torch, "interpret"),
}


def assert_reads(case, dtype="bfloat16", slots=SLOTS, index_dtype=np.int32):
    slots = np.array(slots, index_dtype)
    want = wanted_slots(case, slots, dtype)
    for name, way in MODULES.items():
        for got, array in zip(read_slots(case, slots, dtype, *way), want, strict=True):
            assert got.shape == array.shape
            np.testing.assert_array_equal(bits(got), bits(array), err_msg=name)
    return want


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, layer):
    layers = None if layer is None else 3
    case = make_read(np.random.default_rng(0), layout=layout, dtype="bfloat16", num_layers=layers, layer=layer)
    assert_reads(case, index_dtype=np.int64 if layer else np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(kv_cache_dtype="fp8_e4m3", granularity="head"),
        dict(kv_cache_dtype="int8", granularity="token_head"),
        dict(kv_cache_dtype="nvfp4"),
        dict(kv_cache_dtype="fp8_ds_mla", layout="block slot latent", head_size=576, head_size_v=512),
    ],
    ids=lambda o: o["kv_cache_dtype"],
)
def test_formats(options, dtype):
    assert_reads(make_read(np.random.default_rng(1), **options), dtype)


def test_it_is_what_gather_kv_reads():
    """The oracle itself: the slots of a sequence are its positions."""
    case = make_read(np.random.default_rng(2), seq_lens=(19,))
    slots = [int(case.block_tables[0, n // 4]) * 4 + n % 4 for n in range(19)]
    for got, want in zip(
        assert_reads(case, "float32", slots),
        oracle.gather_kv(case.caches, case.block_tables, case.seq_lens, 19, dtype=np.dtype("float32"), head_size=32),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(got), bits(want[0]))


@pytest.mark.parametrize("slots", [(), (-1, 10**6)])
def test_nothing_to_read(slots):
    assert_reads(make_read(np.random.default_rng(3)), "float32", slots)


def test_a_layer_that_is_not_there_gives_zeros():
    case = make_read(np.random.default_rng(4), num_layers=2, layer=0)
    slots = jnp.array([1, 2])
    (jax_key, _) = jax.jit(
        lambda i: jaxkv.gather_slots(
            [*map(jnp.asarray, case.caches)], slots, layout="layer block slot head dim", layer=i
        )
    )(7)
    caches = [to_torch(c) for c in case.caches]
    torch_key, _ = torchkv.gather_slots(
        caches, torch.tensor([1, 2]), layout="layer block slot head dim", layer=torch.tensor([7]), backend="interpret"
    )
    assert not np.asarray(jax_key).any()
    assert not torch_key.any()


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_transforms(backend):
    case = make_read(np.random.default_rng(5))
    caches, slots = [*map(jnp.asarray, case.caches)], jnp.array([[3, -1], [11, 5], [2, 10**6]])

    def gather(slots):
        return jaxkv.gather_slots(caches, slots, backend=backend)

    for got in (jax.vmap(gather)(slots), jax.jit(jax.vmap(gather))(slots), jax.lax.map(gather, slots)):
        for i, row in enumerate(np.asarray(slots)):
            for side, want in zip(got, wanted_slots(case, row, "float32"), strict=True):
                np.testing.assert_array_equal(bits(np.asarray(side[i])), bits(want))


def test_export_of_any_number_of_slots():
    case = make_read(np.random.default_rng(6))
    n = jax.export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in case.caches]
    call = jax.export.export(jax.jit(lambda k, v, slots: jaxkv.gather_slots((k, v), slots)))
    exported = call(*shapes, jax.ShapeDtypeStruct(n, np.int32))
    for slots in (np.array([5], np.int32), np.array(SLOTS, np.int32)):
        for got, want in zip(exported.call(*case.caches, slots), wanted_slots(case, slots, "float32"), strict=True):
            np.testing.assert_array_equal(bits(np.asarray(got)), bits(want))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_heads_on_eight_devices(axis_type):
    case = make_read(np.random.default_rng(7), num_heads=8)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(axis_type,))
    caches = [jax.device_put(c, NamedSharding(mesh, P(None, None, "tp", None))) for c in case.caches]
    slots = jax.device_put(np.array(SLOTS, np.int32), NamedSharding(mesh, P(None)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda k, v, slots: jaxkv.gather_slots((k, v), slots)).lower(*caches, slots).compile()
        got = compiled(*caches, slots)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    for side, want in zip(got, wanted_slots(case, np.array(SLOTS), "float32"), strict=True):
        assert side.sharding.spec[1] == "tp"
        np.testing.assert_array_equal(bits(np.asarray(side)), bits(want))


def test_torch_knows_the_op():
    case = make_read(np.random.default_rng(8), kv_cache_dtype="int8")
    caches, slots = [to_torch(c) for c in case.caches], torch.tensor(SLOTS)
    arguments = gather_arguments(caches, slots, None, 0, kv_cache_dtype="int8")
    assert set(torch.library.opcheck(torch.ops.torchkv.gather_kv.default, arguments).values()) == {"SUCCESS"}
    want = torchkv.gather_slots(caches, slots, kv_cache_dtype="int8")
    compiled = torch.compile(torchkv.gather_slots, fullgraph=True, backend="aot_eager", dynamic=True)
    mapped = torch.func.vmap(lambda s: torchkv.gather_slots(caches, s, kv_cache_dtype="int8"))(slots.view(3, 3))
    out = tuple(torch.full_like(t, torch.nan) for t in want)
    assert torchkv.gather_slots(caches, slots, kv_cache_dtype="int8", out=out)[0] is out[0]
    for got, side in zip(
        zip(compiled(caches, slots, kv_cache_dtype="int8"), mapped, out, strict=True), want, strict=True
    ):
        for one in got:
            torch.testing.assert_close(one.reshape(side.shape), side, rtol=0, atol=0)


def test_strided_slots():
    case = make_read(np.random.default_rng(9))
    slots = torch.tensor(SLOTS).repeat_interleave(2).view(-1, 2)[:, 0]
    for backend in ("torch", "interpret"):
        got = torchkv.gather_slots([to_torch(c) for c in case.caches], slots, backend=backend)
        for side, want in zip(got, wanted_slots(case, np.array(SLOTS), "float32"), strict=True):
            np.testing.assert_array_equal(bits(from_torch(side)), bits(want))


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "layout": "HND"}, {"kv_cache_dtype": "int8", "per_token_head": True}]
)
def test_the_method(options):
    rng = np.random.default_rng(10)
    extents = dict(num_blocks=3, block_size=4, num_heads=2, head_size=8, dtype="float32") | options
    layer = None if "num_layers" not in options else 1
    key, value = (rng.standard_normal((5, 2, 8)).astype(np.float32) for _ in range(2))
    slots = np.array([7, 0, 11, 4, 2], np.int32)
    ours = torchkv.PagedKVCache.create(**extents)
    ours.write(*map(torch.from_numpy, (key, value, slots)), layer=layer)
    theirs = jaxkv.PagedKVCache.create(**extents).write(key, value, slots, layer=layer)
    got = ours.read(torch.from_numpy(slots), dtype="float32", layer=layer)
    exact = "kv_cache_dtype" not in options
    for a, b, want in zip(got, theirs.read(slots, dtype="float32", layer=layer), (key, value), strict=True):
        np.testing.assert_array_equal(bits(from_torch(a)), bits(np.asarray(b)))
        np.testing.assert_allclose(a, want, rtol=0, atol=0 if exact else np.abs(want).max() / 100)


BAD = {
    "rank": (dict(slots=np.zeros((2, 3), np.int32)), ValueError, "slots must have shape (n,), got (2, 3)"),
    "dtype": (dict(slots=np.zeros(3, bool)), TypeError, "slots must have dtype int32 or int64, got bool"),
    "results": (dict(dtype="int8"), TypeError, "dtype must be float32, bfloat16 or float16, got int8"),
    "backend": (dict(backend="cuda"), ValueError, None),
    "layer": (dict(layer=1), ValueError, None),
}


@pytest.mark.parametrize(("more", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_calls(more, kind, text):
    case = make_read(np.random.default_rng(11))
    said = []
    for module, convert, *_ in list(MODULES.values())[::2]:
        given = {"slots": np.array([1], np.int32)} | more
        given = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
        with pytest.raises(kind) as error:
            module.gather_slots([convert(c) for c in case.caches], **given)
        said.append(str(error.value))
    assert text is None or said == [text, text]
    assert said[0].replace("xla", "torch") == said[1]


def test_lengths_must_be_given_to_gather_kv():
    caches = [to_torch(c) for c in make_read(np.random.default_rng(12)).caches]
    with pytest.raises(TypeError, match=r"^seq_lens must be a torch.Tensor, got NoneType$"):
        torchkv.gather_kv(caches, torch.tensor([1]), None, 0)  # type: ignore
    with pytest.raises(TypeError, match=r"^slots must be a torch.Tensor, got list$"):
        torchkv.gather_slots(caches, [1])  # type: ignore
    with pytest.raises(ValueError, match=r"^seq_lens must have shape \(1,\), got \(\)$"):
        jaxkv.gather_kv([c.numpy() for c in caches], np.zeros((1, 1), np.int32), None, 0)  # type: ignore

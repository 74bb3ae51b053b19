"""Bad calls of slot_mapping: one text from both frameworks, and nothing launched."""

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


def integers(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


GOOD = {
    "block_tables": integers(3, 5), "query_start_loc": np.array([0, 1, 3, 6], np.int32), "seq_lens": integers(3),
    "block_size": 4, "num_tokens": 7,
}  # fmt: skip
MOST = 2**31

# name: what differs from a valid call, type, message
BAD = {
    "tables of rank 1": (
        {"block_tables": integers(3)}, ValueError, "block_tables must have shape (num_seqs, max_blocks), got (3,)",
    ),
    "dtype of tables": (
        {"block_tables": integers(3, 5, dtype="float32")}, TypeError,
        "block_tables must have dtype int32 or int64, got float32",
    ),
    "starts of as many": (
        {"query_start_loc": integers(3)}, ValueError, "query_start_loc must have shape (4,), got (3,)",
    ),
    "dtype of starts": (
        {"query_start_loc": integers(4, dtype="bool")}, TypeError,
        "query_start_loc must have dtype int32 or int64, got bool",
    ),
    "number of lengths": ({"seq_lens": integers(4)}, ValueError, "seq_lens must have shape (3,), got (4,)"),
    "dtype of lengths": (
        {"seq_lens": integers(3, dtype="float32")}, TypeError, "seq_lens must have dtype int32 or int64, got float32",
    ),
    "dtype of lengths, starts to be read": (
        {"seq_lens": integers(3, dtype="bool"), "num_tokens": None}, TypeError,
        "seq_lens must have dtype int32 or int64, got bool",
    ),
    "block size of 0": ({"block_size": 0}, ValueError, f"block_size must be at least 1 and below {MOST}, got 0"),
    "large block size": (
        {"block_size": MOST}, ValueError, f"block_size must be at least 1 and below {MOST}, got {MOST}",
    ),
    "negative tokens": ({"num_tokens": -1}, ValueError, f"num_tokens must be at least 0 and below {MOST}, got -1"),
    "too many tokens": (
        {"num_tokens": MOST}, ValueError, f"num_tokens must be at least 0 and below {MOST}, got {MOST}",
    ),
    "too many tokens, read": (
        {"query_start_loc": np.array([0, 1, 3, MOST - 1 + 2**31], np.int64), "num_tokens": 2**40}, ValueError,
        f"num_tokens must be at least 0 and below {MOST}, got {2**40}",
    ),
    "backend": ({"backend": "cuda"}, ValueError, None),
}  # fmt: skip

CHOICES = {"jaxkv": "'triton', 'xla' or 'interpret'", "torchkv": "'triton', 'torch' or 'interpret'"}


def convert(arguments, one):
    return {name: one(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def jax_call(arguments, **more):
    return jaxkv.slot_mapping(**convert(arguments, jnp.asarray) | more)


def torch_call(arguments, **more):
    return torchkv.slot_mapping(**convert(arguments, to_torch) | more)


def torch_fake(arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return torchkv.slot_mapping(**convert(arguments, lambda a: mode.from_tensor(to_torch(a))))


def jax_jit(arguments):
    arrays = {n: x for n, x in arguments.items() if isinstance(x, np.ndarray)}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
    return jax.jit(lambda x: jaxkv.slot_mapping(**x, **static)).lower(shapes)


WAYS = {
    "jaxkv": jax_call,
    "jaxkv interpret": lambda x: jax_call(x, **({} if "backend" in x else {"backend": "interpret"})),
    "jaxkv jit": jax_jit,
    "torchkv": torch_call,
    "torchkv interpret": lambda x: torch_call(x, **({} if "backend" in x else {"backend": "interpret"})),
    "torchkv fake": torch_fake,
}


@pytest.fixture
def nothing_launched(monkeypatch):
    def launched(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(interpreter, "run", launched)
    monkeypatch.setattr(jaxkv.slots.primitive, "slot_mapping", launched)


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_calls(bad, way):
    differs, kind, message = BAD[bad]
    with jax.enable_x64(True), pytest.raises(kind) as error:
        WAYS[way](GOOD | differs)
    assert type(error.value) is kind
    if message is None:
        message = f"backend must be None, {CHOICES[way.split()[0]]}, got 'cuda'"
    assert str(error.value) == message


@pytest.mark.parametrize("way", WAYS)
def test_the_call_that_bad_ones_differ_from_is_good(way):
    WAYS[way](GOOD)


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize("module", [jaxkv, torchkv])
@pytest.mark.parametrize(
    ("name", "number", "shown"),
    [
        ("block_size", None, "None"),
        ("block_size", 4.0, "4.0"),
        ("block_size", True, "True"),
        ("num_tokens", 2.5, "2.5"),
    ],
)
def test_numbers_that_are_none(module, name, number, shown):
    call, optional = (jax_call, False) if module is jaxkv else (torch_call, name == "num_tokens")
    with pytest.raises(TypeError) as error:
        call(GOOD | {name: number})
    assert str(error.value) == f"{name} must be {'None or ' if optional else ''}an int, got {shown}"


# ---- how many tokens there are cannot be read

UNREAD = (
    "num_tokens must be given where query_start_loc cannot be read: under jit, vmap and torch.compile, and while a "
    "CUDA graph is captured; got None"
)
UNKNOWN = GOOD | {"num_tokens": None}


def in_jax_vmap():
    arrays = {n: jnp.stack([x, x]) for n, x in UNKNOWN.items() if isinstance(x, np.ndarray)}
    jax.vmap(lambda x: jaxkv.slot_mapping(**x, block_size=4))(arrays)


def in_torch_vmap():
    arrays = [to_torch(np.stack([x, x])) for x in UNKNOWN.values() if isinstance(x, np.ndarray)]
    torch.vmap(lambda *x: torchkv.slot_mapping(*x, 4))(*arrays)


def compiled(fullgraph=False):
    arrays = [to_torch(x) for x in UNKNOWN.values() if isinstance(x, np.ndarray)]
    torch.compile(lambda *x: torchkv.slot_mapping(*x, 4), fullgraph=fullgraph, backend="aot_eager")(*arrays)


def captured(monkeypatch):
    """No GPU is needed to see what is asked: a CPU tensor that says it is CUDA's, while something is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch_call(UNKNOWN)


@pytest.mark.usefixtures("nothing_launched")
@pytest.mark.parametrize(
    "way",
    [
        lambda _: jax_jit(UNKNOWN),
        lambda _: in_jax_vmap(),
        lambda _: jaxkv.precompile(jaxkv.slot_mapping, *convert(UNKNOWN, jnp.asarray).values()),
        lambda _: torch_fake(UNKNOWN),
        lambda _: in_torch_vmap(),
        lambda _: compiled(),
        lambda _: torchkv.precompile(torchkv.slot_mapping, *convert(UNKNOWN, to_torch).values()),
        captured,
    ],
    ids=["jit", "vmap", "precompile", "fake", "torch vmap", "compile", "torch precompile", "capture"],
)
def test_tokens_that_cannot_be_counted(way, monkeypatch):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        way(monkeypatch)
    assert str(error.value) == UNREAD


@pytest.mark.usefixtures("nothing_launched")
def test_tokens_that_cannot_be_counted_in_one_graph():
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)) as error:  # torch's own, with the text in it
        compiled(fullgraph=True)
    assert UNREAD in str(error.value)


def test_tokens_are_counted_where_they_can_be():
    assert jax_call(UNKNOWN).shape == torch_call(UNKNOWN).shape == (6,)
    starts = UNKNOWN["query_start_loc"]  # known while the rest is traced
    traced = jax.jit(lambda tables, lens: jaxkv.slot_mapping(tables, starts, lens, 4))
    assert traced(UNKNOWN["block_tables"], UNKNOWN["seq_lens"]).shape == (6,)


def test_a_traced_number_of_tokens_says_what_jit_needs():
    with pytest.raises(TypeError, match="num_tokens must be a static int, got a traced value"):
        jax.jit(lambda n: jaxkv.slot_mapping(**convert(GOOD, jnp.asarray) | {"num_tokens": n}))(7)


def test_triton_needs_a_gpu():
    for call in (jax_call, torch_call):
        with pytest.raises(ValueError, match="backend 'triton' needs a CUDA or ROCm device, got cpu"):
            call(GOOD | {"backend": "triton"})


def test_devices():
    given = convert(GOOD, to_torch)
    elsewhere = torch.zeros(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="seq_lens must be on device cpu, as block_tables, got meta"):
        torchkv._slots.SlotCall(given["block_tables"], None, elsewhere, 4, 3, None).check()

"""Both frameworks launch what the reading plans say: the same kernels, grids and arguments, seen without a GPU."""

import numpy as np
import pytest

pytest.importorskip("triton")

import jax
import jax.numpy as jnp

import jaxkv._read
import torchkv
from jaxkv._triton import launch as jax_launch
from kvcore.plan.kernel import Target
from kvcore.run.compiler import compile_kernel, has_gluon, kernel_function
from tests.cases.arrays import to_torch
from tests.cases.gathers import gather
from tests.cases.launches import launch as launch_in_torch
from tests.cases.launches import replace
from tests.cases.reads import make_read
from torchkv._call import AttentionCall, GatherCall
from torchkv._library import base
from torchkv._library import read as _read_library
from torchkv._triton import launch as _launch
from torchkv._triton.attention import Attentions
from torchkv._triton.gather import Gathers

H100 = Target("cuda", 90)
CASES = {
    "decode": dict(),
    "split": dict(seq_lens=(3000, 700), block_size=16),
    "prefill": dict(query_lens=(0, 1, 3, 9), padding=2, soft_cap=2.0),
    "fp8 with a layer": dict(kv_cache_dtype="fp8", storage="uint8", num_layers=3, layer=1, head_size=64),
    "one array": dict(layout="PACKED_HND", sliding_window=3),
}


@pytest.fixture
def launched(monkeypatch):
    """What each framework launches: kernel, grid, and arguments with arrays as their dtypes."""
    seen = {"torch": [], "jax": []}

    def load(kernel, pointers, aligned):
        assert aligned <= set(pointers)
        compile_kernel(kernel, H100, pointers, aligned)  # raises where an argument lacks a type
        return kernel

    def start(kernel, grid, arguments):
        seen["torch"].append((kernel, grid, arguments))

    def launch(kernel, grid, arguments, target, out_type):
        out = jax.tree.leaves(out_type)
        plain = [a if a is None or isinstance(a, int) else "array" for a in [*arguments, *out]]
        seen["jax"].append((kernel, grid, plain))
        return [jnp.zeros(o.shape, o.dtype) for o in out]

    runner = _launch.ON_GPU._replace(start=start, empty=_launch.INTERPRETED.empty)
    replace(monkeypatch, load=load, ON_GPU=runner, target=lambda: H100)
    runs = ("attention", Attentions(results=False), AttentionCall), ("gather", Gathers(results=False), GatherCall)
    for name, launches, call in runs:
        monkeypatch.setattr(_read_library, name, lambda *a, to=launches, call=call: launch_in_torch(to, call(*a)))
        monkeypatch.setitem(base._again, getattr(_read_library, name), lambda arguments: None)
    monkeypatch.setattr(jax_launch, "launch", launch)

    def read(options, operands):
        return jax_launch.read(options.describe(operands), options, operands, H100)

    monkeypatch.setattr(jaxkv._read, "read", read)
    return seen


def assert_same(launched, kernels):
    assert [kernel.name for kernel, _, _ in launched["jax"]] == kernels
    for (kernel, grid, arguments), (jax_kernel, jax_grid, jax_arguments) in zip(*launched.values(), strict=True):
        assert (kernel, grid) == (jax_kernel, jax_grid)
        names = kernel_function(kernel).arg_names
        assert set(names[len(arguments) :]) == set(kernel.constexprs)
        for name, ours, theirs in zip(names, arguments, jax_arguments, strict=False):
            if theirs == "array":  # torch passes its address
                assert isinstance(ours, int), name
                assert name not in kernel.scalars, name
            else:
                assert ours == theirs, name


@pytest.mark.parametrize("name", CASES)
def test_attention(launched, name):
    case = make_read(np.random.default_rng(0), **CASES[name])
    case.call(torchkv, lambda a: to_torch(a.copy()))
    case.call(jaxkv, jnp.asarray)
    split = ["merge_attention_kernel"] if name == "split" else []
    assert_same(launched, ["paged_attention_kernel", *split])


def test_mla_for_hopper(launched):
    case = make_read(
        np.random.default_rng(0), layout="MLA", dtype="bfloat16", head_size=576, head_size_v=512, block_size=16,
        group=16, seq_lens=(3000, 700),
    )  # fmt: skip
    case.call(torchkv, lambda a: to_torch(a.copy()))
    case.call(jaxkv, jnp.asarray)
    assert_same(launched, ["hopper_mla_kernel" if has_gluon() else "paged_attention_kernel", "merge_attention_kernel"])


@pytest.mark.parametrize("name", CASES)
def test_gather(launched, name):
    case = make_read(np.random.default_rng(1), **CASES[name])
    for option in ("soft_cap", "sliding_window"):
        case.options.pop(option, None)
    gather(case, torchkv, lambda a: to_torch(a.copy()), lambda x: x, 7, "bfloat16", None)
    gather(case, jaxkv, jnp.asarray, lambda x: x, 7, "bfloat16", None)
    assert_same(launched, ["gather_kv_kernel"])


def test_a_launch_is_found_again_unless_the_layer_is_out_of_range(launched, monkeypatch):
    case = make_read(np.random.default_rng(2), num_layers=3, layer=1)
    tensors = {}

    def convert(array):
        return tensors.setdefault(id(array), to_torch(array.copy()))

    case.call(torchkv, convert)
    monkeypatch.setattr(AttentionCall, "check", lambda call: pytest.fail("checked again"))
    case.options["layer"] = 2
    case.call(torchkv, convert)
    assert [arguments[9] for _, _, arguments in launched["torch"]] == [1, 2]
    monkeypatch.undo()
    case.options["layer"] = 3
    with pytest.raises(ValueError, match="layer must be at least 0 and below 3, got 3"):
        case.call(torchkv, convert)

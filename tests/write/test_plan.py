"""Both frameworks launch what the plan says: the same kernel, grid, warps and arguments."""

import re
from pathlib import Path

import numpy as np
import pytest

import jaxkv
from kvcore.plan.kernel import Target
from kvcore.plan.write import SCALARS, plan_write, pointers, scalars
from tests.cases.arrays import LAYOUTS, make_case, run_jax, run_torch, to_torch
from tests.cases.launches import launch as launch_in_torch
from tests.cases.launches import replace
from tests.cases.writes import describe

H100 = Target("cuda", 90)


@pytest.mark.parametrize("num_tokens", [1, 67])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_has_one_lane(layout, num_tokens):
    write = describe(layout, num_tokens=num_tokens)
    plan = plan_write(write, H100)
    tokens, rows, one = plan.grid(num_tokens)
    assert one == 1
    assert plan.token_rows == 1
    assert tokens * plan.rows >= num_tokens > (tokens - 1) * plan.rows
    for side in (plan.kernel.constexprs["K"], plan.kernel.constexprs["V"]):
        assert side.columns & (side.columns - 1) == 0
        assert rows * side.columns >= side.num_heads * side.head_units


def test_rows_without_gaps_are_one_long_head():
    assert plan_write(describe("NHD"), H100).kernel.constexprs["K"][:2] == (1, 8 * 128)
    assert plan_write(describe("HND"), H100).kernel.constexprs["K"][:2] == (8, 128)


def test_offsets_within_a_row_get_64_bits_where_they_need_them():
    assert not plan_write(describe("PALLAS", num_blocks=1024), H100).kernel.constexprs["K"].wide
    assert plan_write(describe("PALLAS", num_blocks=2**20), H100).kernel.constexprs["K"].wide
    assert not plan_write(describe("NHD", num_blocks=2**20), H100).kernel.constexprs["K"].wide


@pytest.mark.parametrize(("arch", "hardware"), [(80, False), (89, False), (90, True), (100, True)])
def test_hardware_rounds_fp8_only_where_it_was_seen_exact(arch, hardware):
    fp8 = describe("NHD", kv_cache_dtype="fp8", cache_dtype="uint8")
    assert plan_write(fp8, Target("cuda", arch)).kernel.constexprs["HARDWARE_CAST"] is hardware
    assert not plan_write(fp8, Target("hip", "gfx942", 64)).kernel.constexprs["HARDWARE_CAST"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_frameworks_interpret_the_same_launch(monkeypatch, layout):
    """The interpreter gets plan and arguments from both twins; but for addresses they are equal."""
    from kvcore.run import interpreter

    launches = []

    def record(kernel, grid, arguments):
        launches.append((kernel, grid, [a.dtype if isinstance(a, interpreter.Pointer) else a for a in arguments]))

    monkeypatch.setattr(interpreter, "run", record)
    case = make_case(np.random.default_rng(0), layout=layout, num_layers=3, layer=1, kv_cache_dtype="fp8_e5m2")
    case.slot_mapping = case.slot_mapping.astype(np.int32)  # JAX has no int64 by default
    run_torch(case, "interpret")
    run_jax(case, "interpret")
    assert launches[0] == launches[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_frameworks_compile_the_same_launch(monkeypatch, layout):
    """What jax_triton gets is what torch's launcher compiles."""
    import jax.numpy as jnp
    import triton

    from jaxkv._call import CacheOperands, CacheOptions, WriteOperands, WriteOptions
    from jaxkv._triton import launch as jax_launch
    from kvcore.run import compiler

    write = describe(layout, num_layers=3, layer=1)
    plan = plan_write(write, H100)
    calls = {}
    monkeypatch.setattr(jax_launch.jt, "triton_call", lambda *args, **named: calls.update(jax=(args, named)))
    num_caches = len(write.cache.layout.arrays)
    any_array = jnp.zeros(1)
    cache = CacheOperands((any_array,) * num_caches, (), None, None, None)
    jax_launch.write(
        write,
        WriteOptions(CacheOptions("auto", write.cache.layout, None, layer=1), backend=None),
        WriteOperands(any_array, any_array, cache, jnp.zeros(67, jnp.int32)),
        H100,
    )
    args, named = calls["jax"]

    monkeypatch.setattr(triton, "compile", lambda source, target, options: (source, target, options))
    pointees = dict.fromkeys(pointers(write)) | {"layer": "scalar"}
    for name, dtype in zip(pointees, ["bfloat16"] * (2 + num_caches) + ["int32"], strict=False):
        pointees[name] = dtype
    source, target, options = compiler.compile_kernel(plan.kernel, H100, pointees, frozenset())

    assert (target.backend, target.arch) == ("cuda", named["compute_capability"])
    assert source.fn is named["kernel"]
    assert named["grid"] == plan.grid(67)
    assert {**named["backend_options"], "num_warps": named["num_warps"], "ptx_version": 0} == {
        **options,
        "ptx_version": 0,
    }
    kernel_names = named["kernel"].arg_names
    assert len(args) == len(pointees) + len(SCALARS)
    assert args[-3:] == scalars(write, 67)
    static = {name: value for (place,), value in source.constants.items() for name in [kernel_names[place]]}
    assert {k: static[k] for k in plan.kernel.constexprs} == {k: named[k] for k in plan.kernel.constexprs}
    assert set(kernel_names) == {*pointees, *SCALARS, *plan.kernel.constexprs}


WRITES = {
    "two arrays": dict(),
    "one array, a layer": dict(layout="PACKED_HND", num_layers=3, layer=1),
    "fp8": dict(kv_cache_dtype="fp8"),
    "fp8, a scale a head": dict(kv_cache_dtype="fp8", scales="head"),
    "int8, a scale a token and head": dict(kv_cache_dtype="int8", per_token_head=True),
    "int8, one array": dict(kv_cache_dtype="int8", layout="PACKED_NHD", per_token_head=True),
    "nvfp4": dict(kv_cache_dtype="nvfp4", head_size=48),
}


@pytest.mark.parametrize("name", WRITES)
def test_both_launchers_pass_the_same_arguments(monkeypatch, name):
    """Seen without a GPU. Where JAX passes an array torch passes its address."""
    import jax.numpy as jnp

    from jaxkv._triton import launch as jax_launch
    from kvcore.run.compiler import compile_kernel, kernel_function
    from torchkv._triton import launch as _launch
    from torchkv._triton.write import Writes

    launched = {}

    def load(kernel, pointees, aligned):
        compile_kernel(kernel, H100, pointees, aligned)  # raises where an argument lacks a type
        return kernel

    def start(kernel, grid, arguments):
        launched["torch"] = kernel, grid, list(arguments)

    def launch(kernel, grid, arguments, target):
        launched["jax"] = kernel, grid, [a if a is None or isinstance(a, int) else "array" for a in arguments]

    def write(options, operands):
        return jax_launch.write(options.describe(operands), options, operands, H100)

    runner = _launch.ON_GPU._replace(start=start)
    replace(monkeypatch, load=load, ON_GPU=runner, target=lambda: H100)
    monkeypatch.setattr(Writes, "interpret", lambda self, write, call: launch_in_torch(Writes(None), call))
    monkeypatch.setattr(jax_launch, "launch", launch)
    monkeypatch.setattr(jaxkv._write, "write", write)
    case = make_case(np.random.default_rng(0), **WRITES[name])
    case.slot_mapping = case.slot_mapping.astype(np.int32)  # JAX has no int64 by default
    run_torch(case, "interpret")
    case.call(jaxkv, jnp.asarray, list(map(jnp.asarray, case.memory)))

    (kernel, grid, ours), (jax_kernel, jax_grid, theirs) = launched["torch"], launched["jax"]
    assert (kernel, grid) == (jax_kernel, jax_grid)
    names = kernel_function(kernel).arg_names
    assert set(names[len(ours) :]) == set(kernel.constexprs)
    for name, address, argument in zip(names, ours, theirs, strict=False):
        if argument == "array":
            assert isinstance(address, int), name
            assert name not in kernel.scalars, name
        else:
            assert address == argument, name
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("default", ["0", "1"])
@pytest.mark.parametrize("target", [H100, Target("cuda", 80), Target("hip", "gfx942", 64)], ids=str)
def test_every_kernel_says_whether_multiply_and_add_may_fuse(monkeypatch, target, default):
    """The compiler's default changes in Triton 3.10; bits depend on it."""
    pytest.importorskip("triton")
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    import torchkv
    from jaxkv._triton import launch as jax_launch
    from kvcore import kernels
    from kvcore.run import interpreter
    from tests.cases.gathers import gather_torch
    from tests.cases.reads import attend_torch, make_read
    from tests.cases.rope import RopeCase

    launched = []
    monkeypatch.setattr(interpreter, "run", lambda kernel, grid, arguments: launched.append(kernel))
    replace(monkeypatch, INTERPRETER=target)  # its plan, on a CPU
    rng = np.random.default_rng(0)
    by_head = dict(kv_cache_dtype="int8", per_token_head=True)
    for options in (dict(), dict(layout="PACKED_NHD"), dict(kv_cache_dtype="fp8"), by_head):
        run_torch(make_case(rng, **options), "interpret")
    call = RopeCase("any").make()
    call(torchkv.rope_and_cache, to_torch, [to_torch(cache) for cache in call.caches], backend="interpret")
    for options in (dict(), dict(seq_lens=(3000,)), dict(query_lens=(0, 1, 5, 19)), dict(kv_cache_dtype="int4")):
        case = make_read(rng, dtype="bfloat16", head_size=64, **options)
        attend_torch(case, "interpret")
        gather_torch(case, 19, "bfloat16", "interpret")
    pairs = torch.arange(2200, dtype=torch.int32).view(-1, 2)  # so many that a kernel finds what they have in common
    caches = [torch.zeros(2200, 1, 1, 16), torch.zeros(2200, 1, 1, 16)]
    torchkv.copy_blocks(caches, pairs, backend="interpret")
    torchkv.zero_blocks(caches, pairs[:, 0], backend="interpret")
    torchkv.swap_blocks(caches, [cache.clone() for cache in caches], pairs, backend="interpret")
    old, new = (torchkv.PagedKVCache.create(num_blocks=2, block_size=2, num_heads=1, head_size=16) for _ in range(2))
    old.relayout(new, backend="interpret")
    old.relayout(new, requantise=True, backend="interpret")
    torchkv.slot_mapping(pairs[:3], None, pairs[:3, 0], 4, backend="interpret")

    defined = {
        name
        for file in (f for path in kernels.__path__ for f in Path(path).glob("*.py"))
        for name in re.findall(r"^def (\w*_kernel\w*)\(", file.read_text(), re.MULTILINE)
    }
    assert {kernel.name for kernel in launched} == defined
    seen = {}
    monkeypatch.setattr(jax_launch.jt, "triton_call", lambda *arguments, **named: seen.update(named))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    for kernel in launched:
        fuses = kernel.options["enable_fp_fusion"]
        assert fuses is (kernel.module in ("attention", "merge")), (
            kernel.name
        )  # whose results are rounded, not bits to be kept
        jax_launch.launch(kernel, (1, 1, 1), [], target)
        assert seen["backend_options"]["enable_fp_fusion"] is fuses
        backend = make_backend(GPUTarget(*target))
        assert backend.parse_options({**kernel.options, "num_warps": kernel.num_warps}).enable_fp_fusion is fuses

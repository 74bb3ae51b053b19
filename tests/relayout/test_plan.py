"""Plans of relayout: every unit has one program, each array is passed once, and both frameworks launch the same."""

import numpy as np
import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.cache import CacheArguments
from kvcore.contract.relayout import check_relayout
from kvcore.layout import CacheLayout
from kvcore.plan import relayout as plan
from kvcore.plan import requantise as numbers
from kvcore.plan.kernel import INTERPRETER, Target
from kvcore.run import interpreter
from tests.cases.relayouts import FORMATS, PAIRS, SIZES, WAYS, arrays_of, move, requantise

H100 = Target("cuda", 90)
CASES = {name: ({}, extents) for name, extents in FORMATS.items()} | {
    "K and V in one array": (dict(layout="KV_NHD"), dict(layout="PACKED_NHD")),
    "to one array": (dict(layout="HND"), dict(layout="INTERLEAVED")),
    "from one array": (dict(layout="INTERLEAVED"), dict(layout="HEAD_MAJOR")),
}


REQUANTISED = {
    "bfloat16 to fp8": ({}, dict(kv_cache_dtype="fp8", layout="HND")),
    "to scales of tokens": (dict(kv_cache_dtype="int8"), dict(kv_cache_dtype="int4", per_token_head=True)),
    "of scales of tokens, to one array": (
        dict(kv_cache_dtype="int4", per_token_head=True), dict(layout="INTERLEAVED", kv_cache_dtype="nvfp4"),
    ),
    "from one array, to floats": (dict(layout="PACKED_NHD", kv_cache_dtype="fp8"), dict(dtype="float32")),
}  # fmt: skip
SCALES = [[np.float32([1.5]), np.float32([2.0, 0.5])], [np.float32([0.25, 3.0]), np.float32([0.75])]]


def describe(source="NHD", destination="HND", n=7, dtype="bfloat16", heads=8, num_layers=None, num_blocks=8, to=None):
    caches = []
    for layout in map(CacheLayout.of, (source, destination)):
        layout = layout.with_layer() if num_layers else layout
        sizes = dict(num_blocks=num_blocks, block_size=16, num_heads=heads, head_size=128, num_layers=num_layers)
        shapes = layout.shapes(**sizes, x=8 if "dim/x" in layout.pattern else None)
        caches.append(
            CacheArguments(
                [ArraySpec(shape, dtype) for shape in shapes], "fp8" if dtype == "uint8" else "auto", layout=layout
            )
        )
    if to is not None:  # another format: a dtype, or "fp8"
        dtype = "uint8" if to == "fp8" else to
        arrays = [ArraySpec(array.shape, dtype) for array in caches[1].caches]
        caches[1] = caches[1]._replace(caches=arrays, kv_cache_dtype="fp8" if to == "fp8" else "auto")
    pairs = None if n is None else ArraySpec((n, 2), "int32")
    return check_relayout(*caches, pairs, 128, None, requantise=to is not None)


def two(case):
    source, destination = (CASES | REQUANTISED)[case]
    rng, sizes = np.random.default_rng(0), SIZES | (destination if case in FORMATS else {})
    return (
        arrays_of(rng, **sizes | source, num_blocks=4, block_size=4),
        arrays_of(rng, **sizes | destination, num_blocks=5, block_size=3),
    )


@pytest.mark.parametrize("target", [H100, INTERPRETER])
@pytest.mark.parametrize("heads", [1, 3, 8, 40])
@pytest.mark.parametrize("destination", ["NHD", "HND", "HEAD_MAJOR", "PALLAS", "PACKED_NHD"])
def test_programs_cover_all_that_moves(destination, heads, target):
    for n in (1, 7, None):
        call = describe(destination=destination, heads=heads, n=n, num_layers=3)
        found = plan.plan_relayout(call, target)
        constexprs, (programs, stretches, layers) = found.kernel.constexprs, found.grid
        tokens, count = constexprs["TOKENS"], 128 if n is None else n
        assert programs * tokens >= count > (programs - 1) * tokens
        assert layers == 3
        for run in (constexprs["FIRST"], constexprs["SECOND"]):
            assert run.num_heads * run.units == heads * 128
            assert stretches * run.columns >= heads * 128
        assert constexprs["THIRD"] is constexprs["FOURTH"] is None


@pytest.mark.parametrize(("options", "tile"), [
    ({}, (1, 1024, 4)),
    (dict(dtype="uint8"), (2, 1024, 4)),
    (dict(dtype="float32"), (1, 1024, 8)),
    (dict(heads=1), (8, 128, 4)),
    (dict(heads=32), (1, 2048, 8)),
    (dict(destination="HEAD_MAJOR"), (16, 128, 8)),
    (dict(source="HEAD_MAJOR", destination="NHD"), (16, 128, 8)),
])  # fmt: skip
def test_a_thread_moves_16_bytes_of_k_and_of_v(options, tile):
    kernel = plan.plan_relayout(describe(**options), H100).kernel
    assert (kernel.constexprs["TOKENS"], kernel.constexprs["FIRST"].columns, kernel.num_warps) == tile


def test_offsets_within_a_slot_have_64_bits_where_heads_are_far_apart():
    def wide(**options):
        return plan.plan_relayout(describe(**options), H100).kernel.constexprs["FIRST"].wide

    assert not wide(destination="PALLAS")
    assert wide(destination="PALLAS", num_blocks=2**18)
    assert wide(source="PALLAS", destination="NHD", num_blocks=2**18)
    assert not wide(num_blocks=2**18)


def test_no_pairs_are_no_launch():
    assert 0 in plan.plan_relayout(describe(n=0), H100).grid


@pytest.mark.parametrize("target", [H100, INTERPRETER])
@pytest.mark.parametrize("heads", [1, 3, 8, 40])
@pytest.mark.parametrize("to", ["fp8", "float32"])
@pytest.mark.parametrize("destination", ["NHD", "HND", "HEAD_MAJOR", "PALLAS", "PACKED_NHD"])
def test_programs_cover_all_that_is_requantised(destination, to, heads, target):
    for n in (1, 7, None):
        call = describe(destination=destination, heads=heads, n=n, num_layers=3, to=to)
        found = numbers.plan_requantise(call, target)
        constexprs, (programs, of_heads, layers) = found.kernel.constexprs, found.grid
        tokens, taken, count = constexprs["TOKENS"], constexprs["HEADS"], 128 if n is None else n
        assert programs * tokens >= count > (programs - 1) * tokens
        assert of_heads * taken >= heads > (of_heads - 1) * taken
        assert layers == 3
        for rows in (constexprs[name] for name in ("K", "V", "TARGET_K", "TARGET_V")):
            assert rows.columns >= rows.head_units == 128


@pytest.mark.parametrize(("options", "tile"), [
    (dict(to="fp8"), (2, 8, 8)),
    (dict(dtype="uint8", to="bfloat16"), (2, 8, 8)),
    (dict(dtype="uint8", to="fp8"), (2, 8, 4)),
    (dict(dtype="float32", to="fp8"), (2, 8, 8)),
    (dict(to="fp8", heads=1), (16, 1, 8)),
    (dict(to="fp8", heads=32), (1, 16, 8)),
    (dict(to="fp8", destination="HEAD_MAJOR"), (16, 1, 8)),
    (dict(to="fp8", source="HEAD_MAJOR", destination="NHD"), (16, 1, 8)),
])  # fmt: skip
def test_a_thread_requantises_16_bytes_of_k_and_of_v(options, tile):
    kernel = numbers.plan_requantise(describe(**options), H100).kernel
    assert (kernel.constexprs["TOKENS"], kernel.constexprs["HEADS"], kernel.num_warps) == tile


@pytest.mark.parametrize("case", [*CASES, *REQUANTISED])
def test_both_frameworks_interpret_the_same_launch(monkeypatch, case):
    """The interpreter gets plans and arguments from both twins; but for addresses they are equal."""
    launches = []

    def record(kernel, grid, arguments):
        addresses = [a.data_ptr() for a in arguments if isinstance(a, interpreter.Pointer)]
        assert len(set(addresses)) == len(addresses)  # each array once
        launches.append((kernel, grid, [a.dtype if isinstance(a, interpreter.Pointer) else a for a in arguments]))

    monkeypatch.setattr(interpreter, "run", record)
    source, destination = two(case)
    for name in ("torch interpret", "jax interpret"):
        if case in CASES:
            move(*WAYS[name], source, destination, np.array(PAIRS, np.int32))
        else:
            requantise(*WAYS[name], source, destination, np.array(PAIRS, np.int32), SCALES)
    assert len(launches) == 2
    assert launches[0] == launches[1]


@pytest.mark.parametrize("case", [*CASES, *REQUANTISED])
def test_both_frameworks_compile_the_same_launch(monkeypatch, case):
    """What jax_triton gets is what torch's launcher compiles."""
    import jax.numpy as jnp

    from jaxkv._relayout import RelayoutOperands, RelayoutOptions
    from jaxkv._triton import launch as jax_launch
    from jaxkv.move import _operands_of, _options_of
    from tests.cases.relayouts import cache_of, jaxkv, with_scales

    (spec, _), (target, _) = both = two(case)
    old, new = (cache_of(jaxkv, *cache) for cache in both)
    numbers_move = case in REQUANTISED
    if numbers_move:
        old, new = (with_scales(jaxkv, cache, of) for cache, of in zip((old, new), SCALES, strict=True))
    options = RelayoutOptions(
        _options_of(target), _options_of(spec), spec.head_size, spec.reading["head_size_v"], None,
        requantise=numbers_move,
    )  # fmt: skip
    operands = RelayoutOperands(
        _operands_of(new, numbers_move), _operands_of(old, numbers_move), jnp.asarray(PAIRS, jnp.int32)
    )
    call, calls = options.describe(operands), []
    found = (numbers.plan_requantise if numbers_move else plan.plan_relayout)(call, H100)
    pointers = numbers.POINTERS if numbers_move else plan.POINTERS
    monkeypatch.setattr(jax_launch.jt, "triton_call", lambda *args, **named: calls.append((args, named)))
    jax_launch.relayout(call, operands, H100)
    ((args, named),) = calls
    assert named["kernel"].__name__ == found.kernel.name
    assert named["num_warps"] == found.kernel.num_warps
    assert named["grid"] == found.grid
    assert {k: v for k, v in named["backend_options"].items() if k != "ptx_version"} == found.kernel.options
    assert {k: named[k] for k in found.kernel.constexprs} == found.kernel.constexprs
    names = [n for n in named["kernel"].arg_names if n not in found.kernel.constexprs]
    assert names == [*pointers, *plan.SCALARS]
    given = dict(zip(names, args, strict=True))
    assert tuple(given[name] for name in plan.SCALARS) == (len(PAIRS), 16, 15)
    arrays = [given[name] for name in pointers if given[name] is not None]
    assert len({id(array) for array in arrays}) == len(arrays)
    unused = 2 * (numbers_move and target.kv_cache_dtype == "auto") + 2 * (
        numbers_move and spec.kv_cache_dtype == "auto"
    )
    assert len(arrays) == len(operands.named()) - unused  # static scales of floats

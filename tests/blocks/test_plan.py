"""Plans of copies and zeros of blocks: every word of a block has one program, and both frameworks launch the same."""

import itertools

import numpy as np
import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.blocks import check_blocks
from kvcore.layout import CacheLayout
from kvcore.plan import blocks as plan
from kvcore.plan.kernel import INTERPRETER, Target
from kvcore.run import interpreter
from tests.cases.arrays import LAYOUTS
from tests.cases.blocks import PAIRS, make_blocks, run_jax, run_torch

H100 = Target("cuda", 90)


def describe(layout="NHD", n=7, dtype="bfloat16", num_layers=None, name="pairs", batch=(), **sizes):
    layout = CacheLayout.of(layout)
    layout = layout.with_layer() if num_layers else layout
    given = {"num_blocks": 9, "block_size": 16, "num_heads": 8, "head_size": 128} | sizes
    shapes = layout.shapes(**given, num_layers=num_layers, x=8 if "dim/x" in layout.pattern else None)
    caches = [ArraySpec((*batch, *shape), dtype) for shape in shapes]
    indices = ArraySpec((*batch, n, 2) if name == "pairs" else (*batch, n), "int32")
    return check_blocks(name, indices, caches, [], layout, None, bool(batch))


def words_of(rows, block):
    """Where the words of a block are, as the kernel finds them."""
    index = np.arange(rows.words)
    offset, rest = index % rows.run, index // rows.run
    for size, stride in zip(rows.sizes, rows.strides, strict=True):
        offset, rest = offset + rest % size * stride, rest // size
    return offset + block * rows.block_stride


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("layout", [*LAYOUTS, "(block kv) slot head dim", "(kv block) slot head dim"])
def test_blocks_share_no_word_and_leave_none(layout, num_layers, batch):
    sizes = {"block_size": 4, "num_heads": 2, "head_size": 24, "num_blocks": 5}
    call = describe(layout, num_layers=num_layers, batch=batch, **sizes)
    constexprs = plan.plan_blocks(call, H100).kernel.constexprs
    for array, name in zip(call.arrays, ("FIRST", "SECOND"), strict=False):
        rows = constexprs[name]
        items = range(*batch) if batch else range(1)
        places = [words_of(rows, block) + item * rows.batch_stride for item in items for block in range(5)]
        assert sorted(np.concatenate(places)) == list(range(np.prod(array.shape) * 2 // rows.word))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", [H100, INTERPRETER])
def test_every_word_has_one_slice(layout, target):
    found = plan.plan_blocks(describe(layout, num_layers=2), target)
    constexprs, end = found.kernel.constexprs, 0
    for name in ("FIRST", "SECOND", "THIRD", "FOURTH"):
        rows = constexprs[name]
        if rows is not None:
            assert rows.first_slice == end
            reach = constexprs["TILES"] * constexprs["TILE"]
            assert rows.slices * reach >= rows.words > (rows.slices - 1) * reach
            end += rows.slices
    assert found.slices == constexprs["SLICES"] == end
    assert found.grid(5) == (5 * end, 1, 1)
    assert found.grid(5, 3) == (15 * end, 1, 1)


def test_words_are_as_wide_as_all_strides_allow():
    def word(aligned=True, **options):
        return plan.plan_blocks(describe(**options), H100, (aligned,) * 2).kernel.constexprs["FIRST"].word

    assert word() == word(dtype="uint8") == 8
    assert word(aligned=False) == 2
    assert word(dtype="uint8", head_size=12, num_heads=1, block_size=1) == 4
    assert word(dtype="uint8", head_size=5, num_heads=1, block_size=2) == 2
    assert word(dtype="uint8", head_size=5, num_heads=1, block_size=1) == 1
    assert word(dtype="float32", head_size=5, num_heads=1, block_size=1) == 4
    call = describe()._replace(arrays=tuple(a._replace(steps=(32768, 2048, 256, 2)) for a in describe().arrays))
    rows = plan.plan_blocks(call, H100).kernel.constexprs["FIRST"]
    assert (rows.word, rows.run, rows.sizes, rows.strides) == (2, 1, (16384,), (2,))


def test_axes_without_gaps_are_one():
    rows = plan.plan_blocks(describe("NHD"), H100).kernel.constexprs["FIRST"]
    assert (rows.words, rows.run, rows.sizes) == (4096, 4096, ())
    rows = plan.plan_blocks(describe("KV_NHD", num_layers=3), H100).kernel.constexprs["FIRST"]
    assert (rows.run, rows.sizes, rows.strides) == (4096, (6,), (9 * 4096,))


def test_offsets_get_64_bits_where_they_need_them():
    def wide(**options):
        return plan.plan_blocks(describe(**options), H100).kernel.constexprs["FIRST"].wide

    assert not wide(num_blocks=2**20)  # blocks have them anyway
    assert not wide(num_layers=2, num_blocks=2**18)
    assert wide(num_layers=3, num_blocks=2**19)


@pytest.mark.parametrize(("n", "scan", "nodes"), [
    (0, 64, False), (64, 64, False), (65, 1024, False), (1024, 1024, False), (1025, 1024, True),
])  # fmt: skip
def test_numbers_of_pairs(n, scan, nodes):
    found = plan.plan_blocks(describe(n=n), H100)
    assert found.kernel.constexprs["SCAN"] == scan
    assert (found.nodes is not None) == nodes
    assert plan.plan_blocks(describe(n=n, name="blocks"), H100).nodes is None
    if nodes:
        assert found.nodes_grid(n, 2)[0] * found.rows >= n
        assert found.nodes_grid(n, 2)[1] == 2


@pytest.mark.parametrize("many", [1024, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("indices", [PAIRS["swap"], [1, 2]], ids=["copy", "zero"])
def test_both_frameworks_interpret_the_same_launches(monkeypatch, indices, layout, many):
    """The interpreter gets plans and arguments from both twins; but for addresses they are equal."""
    launches = []

    def record(kernel, grid, arguments):
        launches.append((kernel, grid, [a.dtype if isinstance(a, interpreter.Pointer) else a for a in arguments]))

    monkeypatch.setattr(interpreter, "run", record)
    monkeypatch.setattr(plan, "MANY_PAIRS", many)
    plan.plan_blocks.cache_clear()
    case = make_blocks(np.random.default_rng(0), indices, layout=layout, num_layers=2)
    run_torch(case, "interpret")
    count = len(launches)
    run_jax(case, "interpret")
    assert count == 1 + (many == 1 and case.name == "copy_blocks")
    assert launches[:count] == launches[count:]
    plan.plan_blocks.cache_clear()


@pytest.mark.parametrize(("name", "n"), [*itertools.product(("pairs", "blocks"), (7, 2000))])
def test_both_frameworks_compile_the_same_launches(monkeypatch, name, n):
    """What jax_triton gets is what torch's launcher compiles."""
    import jax.numpy as jnp

    from jaxkv._blocks import BlocksOperands, BlocksOptions
    from jaxkv._call import CacheOperands, CacheOptions
    from jaxkv._triton import launch as jax_launch

    call = describe(n=n, name=name)
    found = plan.plan_blocks(call, H100)
    calls = []

    def triton_call(*args, out_type, **named):
        calls.append((args, named))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in out_type)

    monkeypatch.setattr(jax_launch.jt, "triton_call", triton_call)
    cache = CacheOperands((jnp.zeros(1), jnp.zeros(1)), (), None, None, None)
    options = BlocksOptions(CacheOptions("auto", call.layout, None, None), None)
    operands = BlocksOperands(cache, None, None)._replace(**{name: jnp.zeros(call.indices.shape, jnp.int32)})
    jax_launch.move_blocks(call, options, operands, H100)
    wanted = [*([found.nodes] if found.nodes else []), found.kernel]
    assert [named["kernel"].__name__ for _, named in calls] == [kernel.name for kernel in wanted]
    for (args, named), kernel in zip(calls, wanted, strict=True):
        assert named["num_warps"] == kernel.num_warps
        assert {k: v for k, v in named["backend_options"].items() if k != "ptx_version"} == kernel.options
        assert {k: named[k] for k in kernel.constexprs} == kernel.constexprs
        names = named["kernel"].arg_names
        given = dict(zip(names, args, strict=False))
        assert [n for n in names if n not in kernel.constexprs][: len(args)] == [*given]
        assert (given["n"], given["num_blocks"]) == (n, call.num_blocks)
    assert calls[-1][1]["grid"] == found.grid(n)

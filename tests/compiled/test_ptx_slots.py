"""The kernel that maps tokens to slots, compiled for GPUs that are not there."""

import re

import pytest

from kvcore.arrays import ArraySpec
from kvcore.contract.slots import check_slot_mapping
from kvcore.plan.kernel import Target
from kvcore.plan.slots import plan_slot_mapping
from kvcore.run.compiler import compile_kernel

TARGETS = [Target("cuda", arch) for arch in (80, 86, 90, 100)] + [Target("hip", "gfx942", 64)]
NAMES = [f"{target.backend} {target.arch}" for target in TARGETS]


def compiled(target, ragged=True, index="int32", num_tokens=8192, block_size=16):
    def spec(*shape):
        return ArraySpec(shape, index)

    starts = spec(65) if ragged else None
    plan = plan_slot_mapping(check_slot_mapping(spec(64, 512), starts, spec(64), block_size, num_tokens))
    pointers = {
        "block_tables_ptr": index, "query_start_loc_ptr": index if ragged else None, "seq_lens_ptr": index,
        "slots_ptr": "int32",
    }  # fmt: skip
    aligned = frozenset(name for name, dtype in pointers.items() if dtype)
    return plan, compile_kernel(plan.kernel, target, pointers, aligned)


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_it_fits(target, ragged, index):
    _, kernel = compiled(target, ragged, index)
    assert kernel.metadata.shared <= 1024


def test_it_keeps_everything_in_registers():
    for num_tokens in (64, 8192, 2**20):
        _, kernel = compiled(Target("cuda", 90), num_tokens=num_tokens)
        assert not re.findall(r"(ld|st)\.local", kernel.asm["ptx"])


def test_a_token_of_a_decode_takes_two_loads_one_after_the_other():
    """Its length, then its block: nothing is searched for."""
    _, kernel = compiled(Target("cuda", 90), ragged=False, num_tokens=256)
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"ld\.global", ptx)) == 2
    assert "bar.sync" not in ptx
    assert not re.findall(r"\b(div|rem)\.", ptx)  # blocks of 16


@pytest.mark.parametrize(("num_tokens", "programs", "tokens"), [
    (1, 1, 32), (256, 8, 32), (8192, 256, 32), (8193, 257, 32), (16384, 256, 64), (65536, 256, 256),
    (524288, 2048, 256),
])  # fmt: skip
def test_about_256_programs_share_the_tokens(num_tokens, programs, tokens):
    plan = plan_slot_mapping(
        check_slot_mapping(*(ArraySpec(shape, "int32") for shape in ((64, 512), (65,), (64,))), 16, num_tokens)
    )
    assert (plan.grid, plan.kernel.constexprs["TOKENS"]) == ((programs, 1, 1), tokens)

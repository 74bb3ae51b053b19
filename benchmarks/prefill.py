"""Attention of many query rows beside other implementations, timed in turns, in the same run.

`uv run python -m benchmarks prefill [--json FILE]`, after `… prefill --build`, which compiles.

Sides: `torchkv` and `jaxkv` with the kernel that the plan chooses, which `kernel` and `kernels` name; `other`, torchkv
with the kernel for every GPU; FlashInfer; `sdpa`, torch's on K and V that lie in sequence, where it has the same mask.

Of each there are `us`, `tflops` (of what masks leave), `spread` (between the fastest and the slowest turn), `error`
(against float32, as a part of the largest element) and `apart` (from torchkv's result, as a part of its norm).
`torchkv_vs_…` and `jaxkv_vs_…` say how many times as fast as a side they are.
"""

from typing import Any

from benchmarks import report, sides
from benchmarks.attention_inputs import Case


def _case(name: str, queries: int = 4096, context: int = 8192, batch: int = 1, **options: Any) -> Case:
    return Case(name, batch, context, queries=queries, **{"long": batch, **options})


CASES = (
    _case("no mask", causal=False),
    _case("no mask, pages of 64", causal=False, block_size=64),
    _case("no mask, pages of 128", causal=False, block_size=128),
    _case("causal"),
    _case("causal, pages of 64", block_size=64),
    _case("from nothing", 16384, 16384),
    _case("192/128, 128 heads", q_heads=128, kv_heads=128, head_size=192),
    _case("head size 64", head_size=64, head_size_v=64),
    _case("head size 256", head_size=256, head_size_v=256),
    _case("eight sequences", 512, 8704, batch=8),
    _case("short ones", 512, 512, batch=32),
    _case("mixed", 2048, 4096, batch=64, long=1),  # 63 sequences have one query token each
    _case("window of 1,024", sliding_window=1024),
    _case("soft cap", soft_cap=30.0),
)
"""4,096 query tokens on 8,192 positions, causal, 32 and 8 heads of 128, pages of 16; or as the name says."""

TARGETS = {
    "no mask": 600,
    "no mask, pages of 64": 630,
    "causal": 570,
    "from nothing": 590,
    "192/128, 128 heads": 540,
    "head size 64": 430,
    "head size 256": 540,
    "eight sequences": 550,
}
"""TFLOP/s."""

TARGETS_US = {"mixed": 540}


def _with_targets(case: Case, row: dict[str, Any]) -> None:
    if case.name in TARGETS:
        row["target_us"] = case.flops / TARGETS[case.name] / 1e6
    if case.name in TARGETS_US:
        row["target_us"] = TARGETS_US[case.name]
    if case.name == "no mask":
        row["jaxkv_target_us"] = case.flops / 585 / 1e6


def main(argv: list[str]) -> None:
    args = sides.parser("prefill", __doc__).parse_args(argv)
    if args.build:
        return sides.build("prefill", CASES, args)
    rows = sides.run("prefill", CASES, ("flashinfer", "sdpa"), args, _with_targets)
    columns = {"case": "s", "torchkv_kernel": "s", "target_us": ".1f"}
    columns |= {f"{name}_us": ".1f" for name in sides.SIDES} | {f"{name}_tflops": ".0f" for name in sides.SIDES}
    columns |= {f"{ours}_vs_flashinfer": ".3f" for ours in ("torchkv", "jaxkv")} | {"torchkv_vs_sdpa": ".3f"}
    if args.turns:
        print(report.table(rows, columns | {"torchkv_error": ".1e", "other_apart": ".1e"}))
    return None

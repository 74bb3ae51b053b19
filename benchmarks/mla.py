"""Decode over the latent rows of MLA against its limits, beside other implementations, timed in turns, in the same run.

`uv run python -m benchmarks mla [--json FILE]`, after `… mla --build`, which compiles. Sides and columns are those of
`benchmarks.prefill`. `bytes_limit_us` is what a plain device copy would take for the bytes of the rows, each read once,
`flops_limit_us` what torch's product of large matrices would for as many multiplications and additions; `of_bytes` and
`of_flops`, of torchkv and jaxkv, are these limits over their time: 1 is the limit.
"""

from typing import Any

from benchmarks import report, sides
from benchmarks.attention_inputs import Case
from benchmarks.common import COPY_BYTES, bandwidth, product_rate

SHAPES = {  # query heads, sequences, context, query tokens of each sequence: the target in µs, if there is one
    (128, 64, 8192, 1): 260,
    (128, 8, 32768, 1): 145,
    (128, 1, 131072, 1): None,
    (16, 64, 8192, 1): 218,
    (16, 1, 131072, 1): None,
    (128, 64, 8192, 2): None,
    (128, 64, 8192, 4): None,
}


def _case(block_size: int, q_heads: int, batch: int, context: int, queries: int) -> Case:
    name = f"{q_heads} heads, {batch} × {context:,}" + (f", {queries} tokens" if queries > 1 else "")
    latent: dict[str, Any] = {"layout": "MLA", "kv_heads": 1, "head_size": 576, "head_size_v": 512}
    more: dict[str, Any] = {"queries": queries, "long": batch, "block_size": block_size}
    return Case(f"{name}, pages of {block_size}", batch, context, q_heads=q_heads, **more, **latent)


CASES = tuple(_case(block_size, *shape) for shape in SHAPES for block_size in (16, 64))


def main(argv: list[str]) -> None:
    args = sides.parser("mla", __doc__).parse_args(argv)
    if args.build:
        return sides.build("mla", CASES, args)
    copied, rate = bandwidth(COPY_BYTES // args.divide), product_rate(max(128, 8192 // args.divide))
    print(f"copy: {copied / 1e12:.3f} TB/s, products: {rate / 1e12:.0f} TFLOP/s", flush=True)

    def complete(case: Case, row: dict[str, Any]) -> None:
        row["target_us"] = SHAPES[case.q_heads, case.batch, case.context, case.queries]
        limits = {"bytes": row["bytes"] / copied, "flops": row["flops"] / rate}
        row |= {f"{what}_limit_us": seconds * 1e6 for what, seconds in limits.items()}
        for name in ("torchkv", "jaxkv"):
            if f"{name}_us" in row:
                row |= {f"{name}_of_{what}": seconds * 1e6 / row[f"{name}_us"] for what, seconds in limits.items()}

    given = {"copy_tb_s": copied / 1e12, "product_tflops": rate / 1e12}
    rows = sides.run("mla", CASES, ("flashinfer",), args, complete, **given)
    columns = {"case": "s", "torchkv_kernel": "s", "target_us": ".0f"}
    columns |= {f"{name}_us": ".1f" for name in ("torchkv", "jaxkv", "other", "flashinfer")}
    columns |= {"torchkv_tflops": ".0f", "bytes_limit_us": ".1f", "flops_limit_us": ".1f"}
    columns |= {"torchkv_of_bytes": ".3f", "torchkv_of_flops": ".3f", "jaxkv_of_bytes": ".3f"}
    columns |= {"torchkv_vs_flashinfer": ".3f", "jaxkv_vs_flashinfer": ".3f", "torchkv_vs_other": ".2f"}
    columns |= {"torchkv_error": ".1e", "other_apart": ".1e", "flashinfer_apart": ".1e"}
    if args.turns:
        print(report.table(rows, columns))
    return None

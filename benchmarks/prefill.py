"""Attention of many query rows, with the kernel that a plan chooses and with the one for every GPU, in the same run.

`uv run python -m benchmarks prefill [--json FILE]`. Columns: `tflops` counts what masks leave; `apart` is how far the
two kernels' results lie apart, as a part of the result's norm. Times are torch's: `attention` has JAX's, too.
"""

import argparse
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks import report
from benchmarks.timing import torch_time
from torchkv._call import AttentionCall
from torchkv._triton import attention


@dataclass(frozen=True)
class Case:
    """Sequences that all have `new` query tokens, the last of `context` positions."""

    name: str
    new: int = 4096
    context: int = 8192
    sequences: int = 1
    decodes: int = 0  # more sequences, with one query token each
    causal: bool = True
    block_size: int = 16
    q_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    head_size_v: int = 128
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of what the masks leave."""
        window = self.sliding_window or self.context
        pairs = sum(min(self.context - self.new + t + 1, window) for t in range(self.new))
        pairs = pairs if self.causal else self.new * self.context
        pairs = self.sequences * pairs + self.decodes * min(self.context, window)
        return 2 * self.q_heads * (self.head_size + self.head_size_v) * pairs


CASES = (
    Case("no mask", causal=False),
    Case("no mask, pages of 64", causal=False, block_size=64),
    Case("no mask, pages of 128", causal=False, block_size=128),
    Case("causal"),
    Case("causal, pages of 64", block_size=64),
    Case("from nothing", 16384, 16384),
    Case("192/128, 128 heads", q_heads=128, kv_heads=128, head_size=192),
    Case("head size 64", head_size=64, head_size_v=64),
    Case("head size 256", head_size=256, head_size_v=256),
    Case("eight sequences", 512, 8704, sequences=8),
    Case("short ones", 512, 512, sequences=32),
    Case("mixed", 2048, 4096, decodes=63),
    Case("window of 1,024", sliding_window=1024),
    Case("soft cap", soft_cap=30.0),
)


def make_call(case: Case) -> AttentionCall:
    """A call with random caches, and tables in random order."""
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = -(-case.context // case.block_size)
    sequences = case.sequences + case.decodes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)

    front = (sequences * blocks, case.block_size, case.kv_heads)
    tables = torch.randperm(sequences * blocks, device="cuda", generator=generator).view(sequences, blocks).int()
    counts = torch.tensor([0] + [case.new] * case.sequences + [1] * case.decodes, device="cuda")
    return AttentionCall(
        query=normal(case.new * case.sequences + case.decodes, case.q_heads, case.head_size),
        caches=[normal(*front, case.head_size), normal(*front, case.head_size_v)],
        block_tables=tables,
        seq_lens=torch.full((sequences,), case.context, dtype=torch.int32, device="cuda"),
        query_start_loc=counts.cumsum(0).int(),
        scale=None,
        causal=case.causal,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        sinks=None,
        kv_cache_dtype="auto",
        k_scale=None,
        v_scale=None,
        layout=None,
        layer=None,
        layer_index=None,
        head_size_v=None,
        backend=None,
    )


def measure(case: Case) -> dict[str, Any]:
    """A row: what each kernel takes."""
    call = make_call(case)
    row: dict[str, Any] = {"case": case.name, "flops": case.flops}
    results = []
    for side, gluon in (("chosen", attention.launches_gluon), ("other", lambda target: False)):
        op = attention.Attentions(results=False)  # which has launched nothing yet
        with mock.patch.object(attention, "launches_gluon", gluon):
            launched, (out, _) = op.launch(call, op.tensors(call))
        results.append(out.float())
        row[f"{side}_us"] = torch_time([lambda op=op: op.launch(call, op.tensors(call))]) * 1e6
        row[f"{side}_tflops"] = case.flops / row[f"{side}_us"] / 1e6
        row[f"{side}_kernel"] = launched.kernels.plan.attend.name
    row["apart"] = float((results[0] - results[1]).norm() / results[1].norm())
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks prefill", description=__doc__)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--cases", nargs="+", help="the names of some")
    args = parser.parse_args(argv)
    rows = []
    for case in CASES:
        if args.cases is None or case.name in args.cases:
            rows.append(measure(case))
            print(rows[-1], flush=True)
            report.save(args.json, rows, benchmark="prefill")
            torch.cuda.empty_cache()
    columns = {"case": "s", "chosen_kernel": "s", "chosen_us": ".1f", "chosen_tflops": ".0f", "other_us": ".1f"}
    print(report.table(rows, columns | {"other_tflops": ".0f", "apart": ".1e"}))

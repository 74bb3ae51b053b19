"""DTensors over two and four processes, joined by gloo over loopback."""

import pytest

from tests.cases.processes import run, run_joined


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_that_share_dtensors(count):
    flags = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for rank, lines in enumerate(run_joined("tests.cases.torch_processes", count, **flags)):
        checks = (
            "writes_and_attention", "other_ops", "slots_and_moves", "moves_that_are_refused",
            "what_does_not_fit_is_made_to_or_refused", "the_same_text",
        )  # fmt: skip
        assert [line for line in lines if line.startswith("rank")] == [
            f"rank {rank}: {name} on {count} ranks" for name in checks
        ]


ALONE = """
import os, torch, torchkv
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
row = torch.ones(1, 2, 8)
caches = [distribute_tensor(torch.zeros(3, 4, 2, 8), mesh, [Shard(2)]) for _ in range(2)]
try:
    torchkv.reshape_and_cache_flash(row, row, *caches, torch.tensor([5]))
except TypeError as error:
    print(error)
import torchkv.distributed
torchkv.reshape_and_cache_flash(row, row, *caches, torch.tensor([5]))
print(caches[0].to_local().sum().item())
query = distribute_tensor(torch.ones(1, 2, 8), mesh, [Shard(1)])
attend = lambda query, key_cache, value_cache: torchkv.paged_attention(
    query, (key_cache, value_cache), torch.tensor([[1]]), torch.tensor([2]))
print(torch.compile(attend, fullgraph=True, backend="aot_eager")(query, *caches).to_local().tolist()[0][0][0])
dist.destroy_process_group()
"""


def test_the_rules_are_imported_by_who_wants_them_and_torch_compiles_with_them():
    lines = run(ALONE, text=True).splitlines()
    assert lines[0] == "DTensors need torchkv.distributed, which must be imported, got it not imported"
    assert lines[1] == "16.0"
    assert float(lines[2]) == pytest.approx(1 / (1 + 2.718281828 ** -(8**0.5)), rel=1e-4)


def test_every_op_has_a_rule():
    rules = run(
        "import torchkv.distributed, torch\n"
        "from torch.distributed.tensor import DTensor\n"
        "from torch._library.simple_registry import singleton\n"
        "from torchkv._library.base import CALLS\n"
        "print(len(CALLS), all(singleton.find(op._schema.name).torch_dispatch_rules.find(DTensor) for op in CALLS))",
        text=True,
    )
    count, every = rules.splitlines()[0].split()
    assert int(count) >= 14
    assert every == "True"

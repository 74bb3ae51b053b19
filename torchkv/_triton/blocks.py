"""The kernels that move whole blocks: how they are prepared and run."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.blocks import Blocks
from kvcore.plan import blocks as plan_blocks
from kvcore.plan.kernel import Target
from torchkv._blocks import BlocksCall
from torchkv._memory import address_of
from torchkv._triton.launch import Load, Runner, aligned_pointers, pointees
from torchkv._triton.launches import Apart, Launch, Launches


class BlocksKernels(NamedTuple):
    """The kernels of a call, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How they are launched.
        kernel: What copies, or fills with zeros.
        nodes: What finds out before how pairs depend on each other, or None.
    """

    described: Blocks
    plan: plan_blocks.BlocksPlan
    kernel: Any
    nodes: Any

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[()]:
        """Starts the kernels, unless there is nothing to do."""
        plan, n, num_blocks = self.plan, tensors[-1].shape[0], self.described.num_blocks
        grid = plan.grid(n)
        if 0 in grid:
            return ()
        found: tuple[Any, ...] = (None,) if self.described.copies else ()
        if self.nodes is not None:
            nodes = runner.empty((n, 4), (4, 1), torch.int32)
            found = (runner.address(nodes),)
            runner.start(self.nodes, plan.nodes_grid(n), (pointers[-1], n, num_blocks, *found))
        runner.start(self.kernel, grid, (*pointers, *found, n, num_blocks))
        return ()


def _pairs_class(tensors: Sequence[Tensor]) -> int:
    shape = tensors[-1].shape
    return plan_blocks.pairs_class(shape[0]) if shape else 0  # a scalar is for the contract to refuse


class Moves(Launches[BlocksKernels]):
    """Launches of an op whose tensors are those that are written to, then pairs or blocks."""

    any_length: ClassVar[Mapping[str, int]] = {"pairs": 0, "blocks": 0}

    def __init__(self) -> None:
        super().__init__(k_scale=None, varies=_pairs_class)

    def tensors(self, call: BlocksCall) -> list[Tensor]:
        return [*call.written, call.indices]

    def pointers(self, described: Blocks, call: BlocksCall) -> list[Any]:
        arguments = plan_blocks.arguments(described, call.written, call.indices, None, n=0)
        return arguments[: len(plan_blocks.ARRAYS) + 1]

    def prepare(self, call: BlocksCall, described: Blocks, target: Target, load: Load) -> Launch[BlocksKernels]:
        plan = plan_blocks.plan_blocks(described, target, tuple(address_of(t) % 16 == 0 for t in call.written))
        names, values = plan_blocks.pointers(described), self.pointers(described, call)
        aligned, pointed = aligned_pointers(names, values), pointees(names, values)
        nodes = None
        if described.copies:
            pointed["nodes_ptr"] = None
        if plan.nodes is not None:
            aligned |= {"nodes_ptr"}  # a new tensor
            pointed["nodes_ptr"] = "int32"
            of_nodes = {name: pointed[name] for name in ("pairs_ptr", "nodes_ptr")}
            nodes = load(plan.nodes, of_nodes, aligned & frozenset(of_nodes))
        count = len(call.written)
        return Launch(
            BlocksKernels(described, plan, load(plan.kernel, pointed, aligned), nodes),
            call.device,
            num_layers=None,
            aligned=count + 1,
            any_length=(count,),
            written=range(count),
            apart=Apart([*combinations(range(count), 2)]) if count > 1 else None,
        )

"""The launch of the kernel that swaps blocks, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

from jaxkv._swap import SwapOperands
from kvcore.contract.swap import Swap
from kvcore.plan.kernel import Target
from kvcore.plan.swap import arguments, plan_swap


def launch_swap(call: Swap, operands: SwapOperands, target: Target, launch: Callable[..., Any]) -> None:
    """Launches a call with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    The destination is updated where it is: for the former, its arrays are `jax.Ref`s, for the latter NumPy's.
    """
    pairs = operands.pairs
    batch, n = pairs.shape[:2] if call.batched else (1, pairs.shape[0])
    plan = plan_swap(call, target)
    grid = plan.grid(n, batch)
    if 0 in grid:
        return
    launch(plan.kernel, grid, arguments(call, operands.source.memory, operands.cache.memory, pairs, n), target)

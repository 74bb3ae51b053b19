"""The launch of the kernels that move whole blocks, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv._blocks import BlocksOperands
from kvcore.contract.blocks import Blocks
from kvcore.plan.blocks import arguments, plan_blocks
from kvcore.plan.kernel import Target


def launch_blocks(call: Blocks, operands: BlocksOperands, target: Target, launch: Callable[..., Any]) -> None:
    """Launches a call with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    Caches and scale caches are updated where they are: the former's are `jax.Ref`s, the latter's NumPy arrays.
    """
    indices, nodes = operands.indices, None
    batch, n = indices.shape[:2] if call.batched else (1, indices.shape[0])
    plan = plan_blocks(call, target)
    if 0 in plan.grid(n, batch):
        return
    if plan.nodes is not None:
        out = (jax.ShapeDtypeStruct((batch, n, 4), jnp.int32),)
        (nodes,) = launch(plan.nodes, plan.nodes_grid(n, batch), [indices, n, call.num_blocks], target, out)
    launch(plan.kernel, plan.grid(n, batch), arguments(call, operands.cache.memory, indices, nodes, n), target)

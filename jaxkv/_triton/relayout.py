"""The launch of the kernel of `relayout`, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

from jaxkv._relayout import RelayoutOperands
from kvcore.contract.relayout import Relayout
from kvcore.plan.kernel import Target
from kvcore.plan.relayout import arguments, plan_relayout


def launch_relayout(call: Relayout, operands: RelayoutOperands, target: Target, launch: Callable[..., Any]) -> None:
    """Launches a call with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    The destination is updated where it is: the former's arrays are `jax.Ref`s, the latter's NumPy arrays.
    """
    plan = plan_relayout(call, target)
    if 0 not in plan.grid:
        inputs = arguments(call, operands.source.memory, operands.cache.memory, operands.pairs)
        launch(plan.kernel, plan.grid, inputs, target)

"""The launch of a kernel of `relayout`, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

from jaxkv._relayout import RelayoutOperands
from kvcore.contract.relayout import Relayout
from kvcore.plan import requantise
from kvcore.plan.kernel import Target
from kvcore.plan.relayout import arguments, plan_relayout, scalars


def launch_relayout(call: Relayout, operands: RelayoutOperands, target: Target, launch: Callable[..., Any]) -> None:
    """Launches a call with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    The destination is updated where it is: the former's arrays are `jax.Ref`s, the latter's NumPy arrays.
    """
    memory = operands.source.memory, operands.cache.memory, operands.pairs
    if call.requantise:
        plan = requantise.plan_requantise(call, target)
        static = [scale for cache in (operands.source, operands.cache) for scale in (cache.k_scale, cache.v_scale)]
        inputs = [*requantise.arguments(call, *memory, static), *scalars(call)]
    else:
        plan, inputs = plan_relayout(call, target), arguments(call, *memory)
    if 0 not in plan.grid:
        launch(plan.kernel, plan.grid, inputs, target)

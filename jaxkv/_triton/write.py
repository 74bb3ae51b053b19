"""The launch of the kernels that write, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

from jaxkv._call import WriteOperands, WriteOptions, layer_of
from jaxkv._views import array_of
from kvcore.contract.write import Write
from kvcore.plan.kernel import Target
from kvcore.plan.write import arguments, plan_write


def launch_write(
    call: Write, options: WriteOptions, operands: WriteOperands, target: Target, launch: Callable[..., Any]
) -> None:
    """Launches a write with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    Caches and scale caches are updated where they are: the former's are `jax.Ref`s, the latter's NumPy arrays.
    """
    cache = operands.cache
    num_tokens = operands.slot_mapping.shape[0]
    plan = plan_write(call, target, layer_is_pointer=cache.layer is not None)
    inputs = arguments(
        call, array_of(operands.key), array_of(operands.value), cache.caches, cache.scale_caches, operands.slot_mapping,
        cache.k_scale, cache.v_scale, layer_of(options.cache, cache), num_tokens,
    )  # fmt: skip
    launch(plan.kernel, plan.grid(num_tokens), inputs, target)

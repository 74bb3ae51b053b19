"""The launch of the kernel that rotates and writes, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

import jax

from jaxkv._call import layer_of
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._views import array_of
from kvcore.contract.rope import Rope
from kvcore.plan.kernel import Target
from kvcore.plan.rope import arguments, plan_rope


def launch_rope(
    call: Rope,
    options: RotatedWriteOptions,
    operands: RotatedWriteOperands,
    target: Target,
    launch: Callable[..., Any],
) -> Any:
    """Launches the op with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`.

    Caches and scale caches are updated where they are: the former's are `jax.Ref`s, the latter's NumPy arrays.

    Returns:
        The rotated query.
    """
    cache = operands.cache
    query, key, value = map(array_of, (operands.query, operands.key, operands.value))
    num_tokens, num_written = operands.query.shape[0], operands.slot_mapping.shape[0]
    plan = plan_rope(call, target, layer_is_pointer=cache.layer is not None)
    inputs = arguments(
        call, query, key, value, cache.caches, cache.scale_caches, operands.positions, operands.cos_sin,
        operands.slot_mapping, operands.q_norm, operands.k_norm, cache.k_scale, cache.v_scale,
        layer_of(options.cache, cache), num_tokens, num_written,
    )  # fmt: skip
    out_type = (jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype),)
    (rotated,) = launch(plan.kernel, plan.grid(num_tokens, num_written), inputs, target, out_type)
    return rotated

"""The write as a Triton kernel."""

from typing import TYPE_CHECKING

import jax
from jax import lax

from jaxkv._triton.launch import as_bytes, launch, target_of
from kvcore.contract.write import Write
from kvcore.plan.write import arguments, plan_write

if TYPE_CHECKING:
    from jaxkv._primitive.write import Operands


def write(
    call: Write, operands: "Operands", layer: int | None, platform: str, compute_capability: int | None
) -> list[jax.Array]:
    """The new arrays: the same buffers, updated in place."""
    n = operands.slot_mapping.shape[0]
    target = target_of(platform, compute_capability)
    plan = plan_write(call, target, layer_is_pointer=operands.layer is not None)
    if 0 in plan.grid(n):
        return list(operands.memory)
    refs = [jax.new_ref(as_bytes(array)) for array in operands.memory]
    count = len(call.cache.layout.arrays)
    inputs = arguments(
        call, as_bytes(operands.key), as_bytes(operands.value), refs[:count], refs[count:], operands.slot_mapping,
        operands.k_scale, operands.v_scale, layer if operands.layer is None else operands.layer, n,
    )  # fmt: skip
    launch(plan.kernel, plan.grid(n), inputs, target)
    new = [jax.freeze(ref) for ref in refs]
    return [lax.bitcast_convert_type(n, a.dtype) for n, a in zip(new, operands.memory, strict=True)]

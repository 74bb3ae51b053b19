"""The launch of the kernel that maps tokens to slots, compiled or interpreted."""

from collections.abc import Callable
from typing import Any

from jaxkv._slots import SlotOperands, slots_result
from kvcore.contract.slots import SlotMapping
from kvcore.plan import slots as plan_slots
from kvcore.plan.kernel import Target


def launch_slot_mapping(call: SlotMapping, operands: SlotOperands, target: Target, launch: Callable[..., Any]) -> Any:
    """Launches it with `launch`, that of `jaxkv._triton.launch` or of `jaxkv._triton.interpret`; its result."""
    plan = plan_slots.plan_slot_mapping(call)
    (slots,) = launch(plan.kernel, plan.grid, plan_slots.arguments(call, *operands), target, (slots_result(call),))
    return slots

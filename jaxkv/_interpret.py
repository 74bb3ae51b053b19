"""The Triton kernel in its interpreter, behind a host callback: slow, exact, and without a GPU."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import jax
import numpy as np

from kvcore.contract import Write
from kvcore.plan import INTERPRETER, plan_write, scalars

if TYPE_CHECKING:
    from jaxkv._primitive import Operands


def write(call: Write, operands: "Operands", layer: int | None) -> list[jax.Array]:
    """The new caches."""
    worker = _worker()
    plan = plan_write(call, INTERPRETER, layer_is_pointer=operands.layer is not None)

    def on_host(x: "Operands") -> list[np.ndarray]:
        from kvcore import interpreter

        def pointer(array: np.ndarray | None) -> interpreter.Pointer | None:
            return None if array is None else interpreter.Pointer(array.ctypes.data, array.dtype.name)

        x = jax.tree.map(np.ascontiguousarray, x)
        caches = [c.copy() for c in x.caches]
        n = len(x.slot_mapping)
        arguments = [
            *map(pointer, (x.key, x.value, *caches, x.slot_mapping, x.k_scale, x.v_scale)),
            layer if x.layer is None else pointer(x.layer),
            *scalars(call, n),
        ]
        worker.submit(
            interpreter.run, "reshape_and_cache", plan.kernel, plan.grid(n), arguments, plan.constexprs
        ).result()
        return caches

    shapes = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in operands.caches]
    return list(jax.pure_callback(on_host, shapes, operands))


@cache
def _worker() -> ThreadPoolExecutor:
    """A thread that computes as NumPy expects.

    XLA's threads, and those started from them, flush subnormal numbers to zero. This one starts now, while a program is
    lowered, so not from one of them.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="jaxkv-interpreter")
    worker.submit(lambda: None).result()
    return worker

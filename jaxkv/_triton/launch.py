"""Launch a plan's kernel through jax_triton: the only module that imports it."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv._triton import compat as _compat
from kvcore import installed
from kvcore.formats import FP8
from kvcore.plan.kernel import KernelPlan, Target
from kvcore.run.compiler import kernel_function

with installed.needed("jax_triton", installed.JAX_TRITON):
    jt = _compat.import_jax_triton()

# The lowest PTX version that each compute capability needs, with what the kernels use. Triton would write the
# highest that its own ptxas knows, which an older driver refuses.
_PTX_VERSIONS = {80: 78, 86: 78, 87: 78, 89: 81, 90: 80, 100: 86, 101: 86, 103: 88, 110: 90, 120: 87, 121: 88}


def launch(
    kernel: KernelPlan, grid: tuple[int, int, int], arguments: Sequence[Any], target: Target, out_type: Any = ()
) -> Any:
    """Calls a kernel. Arrays of `out_type` follow the arguments and are returned."""
    options = dict(kernel.options)
    if target.backend == "cuda":
        options["ptx_version"] = _PTX_VERSIONS.get(int(target.arch))
    return jt.triton_call(
        *arguments,
        kernel=kernel_function(kernel),
        out_type=out_type,
        grid=grid,
        num_warps=kernel.num_warps,
        compute_capability=target.arch if target.backend == "cuda" else None,
        backend_options=options,
        name=kernel.name,
        **kernel.constexprs,
    )


def as_bytes(x: jax.Array) -> jax.Array:
    """Quantised elements as bytes, which is a view. Triton refuses fp8 types where the target lacks them."""
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.name in FP8 or x.dtype == jnp.int8 else x


def target_of(platform: str, compute_capability: int | None) -> Target:
    """What to compile for."""
    if platform == "rocm":
        return Target("hip", "", 64)
    if chosen := os.environ.get("JAXKV_COMPUTE_CAPABILITY"):
        compute_capability = int(chosen)
    if compute_capability is None:
        compute_capability = _attached() or 80
    return Target("cuda", compute_capability)


def _attached() -> int | None:
    """The compute capability of this host's GPU, if it has one.

    Without, as when exporting from a host of another kind, 8.0 is compiled for: PTX that newer GPUs translate.
    """
    try:
        version = jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None
    return int(version.replace(".", ""))

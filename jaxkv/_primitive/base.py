"""Pairs of primitives, and the functions that register their rules.

Users bind the first primitive of a pair, and transformations know it. Where several devices share the work it lowers to
a custom partitioning (see `sharding`), which gives each device the second one, for its own heads; that one lowers to
Triton kernels or to XLA's operations, whichever the platform has.

A primitive's arguments are the leaves of a call's operands. Its parameters are `tree`, their structure, and `options`,
the static half of the call (see `jaxkv._call`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxkv._blocks import BlocksOperands, BlocksOptions
from jaxkv._call import ReadOperands, ReadOptions, WriteOperands, WriteOptions
from jaxkv._mesh import vary, varying_axes
from jaxkv._relayout import RelayoutOperands, RelayoutOptions
from jaxkv._rotated import RotatedWriteOperands, RotatedWriteOptions
from jaxkv._slots import SlotOperands, SlotOptions
from jaxkv._swap import SwapOperands, SwapOptions
from jaxkv._views import array_of
from kvcore.contract.checks import no_triton_error

CacheOpOptions = WriteOptions | RotatedWriteOptions | ReadOptions | BlocksOptions | SwapOptions | RelayoutOptions
CacheOpOperands = WriteOperands | RotatedWriteOperands | ReadOperands | BlocksOperands | SwapOperands | RelayoutOperands

Options = CacheOpOptions | SlotOptions
Operands = CacheOpOperands | SlotOperands

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


def make_primitives(name: str, result_types: Callable[[Any, Any], list[Any]]) -> tuple[Primitive, Primitive]:
    """The primitive that users bind, and the one that computes on a single device.

    Args:
        name: Of the first; the second one's ends in `_local`.
        result_types: Makes the types of the results of options, and of operands that are types.
    """

    def abstract(*types: Any, tree: Any, options: Any) -> list[Any]:
        return result_types(options, jax.tree.unflatten(tree, types))

    def make(name: str) -> Primitive:
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
        primitive.def_abstract_eval(abstract)
        return primitive

    return make(name), make(f"{name}_local")


def bind(primitive: Primitive, options: Options, operands: Operands) -> list[Any]:
    """Binds a primitive to a call."""
    leaves, tree = jax.tree.flatten(operands)
    return primitive.bind(*leaves, tree=tree, options=options)


# ---- one device


def lower_by_platform(local_p: Primitive, compute: Callable[[Any, Any, Any, str, str], Sequence[Any]]) -> None:
    """Lowers a primitive to what a backend of each platform computes.

    Args:
        local_p: The primitive that computes on a single device.
        compute: Computes the results of five arguments: the contract's description of the call, options, operands,
            the name of a backend that runs on the platform, and the platform.
    """
    for platform in PLATFORMS:

        def implementation(*leaves: Any, tree: Any, options: Any, platform: str = platform) -> list[Any]:
            operands = vary(jax.tree.unflatten(tree, leaves), varying_axes(leaves))
            call = options.describe(operands)
            backend = _backend_on(platform, options.backend)
            if backend != "xla":
                _check_static(platform, operands)
            return list(compute(call, options, operands, backend, platform))

        mlir.register_lowering(local_p, mlir.lower_fun(implementation, multiple_results=True), platform=platform)


def _backend_on(platform: str, backend: str | None) -> str:
    """The backend that is meant on a platform; an error if it cannot run there."""
    gpu = platform in ("cuda", "rocm")
    if backend == "triton" and not gpu:
        raise no_triton_error(platform)
    return backend or ("triton" if gpu else "xla")


def _check_static(platform: str, operands: Operands) -> None:
    """Raises where jax.export leaves sizes open: grids and strides of a kernel are numbers."""
    for name, operand in operands.named().items():
        array = array_of(operand)
        if not all(isinstance(size, int) for size in array.shape):
            raise ValueError(
                f"{name} must have a static shape on {platform}, where kernels depend on it, got {array.shape}"
            )


def compute_capability(axis_context: Any) -> int | None:
    """Of the CUDA devices to compile for, 90 for 9.0; None where they are unknown (export) or no CUDA devices."""
    mesh = getattr(axis_context, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):
        devices: Any = mesh.devices.flat
    else:  # none, or an abstract one
        devices = getattr(axis_context, "device_assignment", None) or ()
    for device in devices:
        version = getattr(device, "compute_capability", None)
        if isinstance(version, str) and version.replace(".", "").isdecimal():
            return int(version.replace(".", ""))
    return None


# ---- transformations


def batch_by(primitive: Primitive, batched: Callable[[Any, Any, Any, int], list[Any]]) -> None:
    """Gives a primitive its rule for vmap.

    Args:
        primitive: The one that users bind.
        batched: Computes the results, with the batch as their first axis, of four arguments: options; operands, of
            which those that are batched have the batch as their first axis; whether each operand is batched; and the
            batch's size.
    """

    # Within jit, or an eager loop would be compiled anew each time.
    @functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
    def results(leaves: tuple[Any, ...], dims: tuple[Any, ...], tree: Any, options: Any) -> list[Any]:
        is_batched = [isinstance(dim, int) for dim in dims]
        batch = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if isinstance(dim, int))
        in_front = [
            batching.bdim_at_front(leaf, dim, batch) if isinstance(dim, int) else leaf
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        return batched(options, jax.tree.unflatten(tree, in_front), jax.tree.unflatten(tree, is_batched), batch)

    def rule(leaves: Sequence[Any], dims: Sequence[Any], *, tree: Any, options: Any) -> tuple[list[Any], list[int]]:
        new = results(tuple(leaves), tuple(dims), tree, options)
        return new, [0] * len(new)

    batching.primitive_batchers[primitive] = rule


def loop_over(primitive: Primitive) -> Callable[[Any, Any, Any, int], list[jax.Array]]:
    """A rule for `batch_by`: a loop over the batch. Operands that are not batched are not copied."""

    def batched(options: Any, operands: Any, is_batched: Any, batch: int) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(operands)
        items = {i: leaf for i, leaf in enumerate(leaves) if jax.tree.leaves(is_batched)[i]}

        def one(item: dict[int, jax.Array]) -> list[jax.Array]:
            return primitive.bind(*(item.get(i, leaf) for i, leaf in enumerate(leaves)), tree=tree, options=options)

        return lax.map(one, items)

    return batched


def refuse_derivatives(primitive: Primitive, message: Callable[[Any], str]) -> None:
    """Makes differentiation an error, whose message depends on the options."""

    def jvp(primals: Any, tangents: Any, *, options: Any, **_: Any) -> Any:
        raise NotImplementedError(message(options))

    ad.primitive_jvps[primitive] = jvp

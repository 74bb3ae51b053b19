"""Registration of the ops with torch.library: dispatch by device, FakeTensor, vmap.

`torch.library.Library` costs 2 µs a call, `custom_op` and `triton_op` ten times that, and the latter clones caches
that are views of one tensor under torch.compile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

from kvcore.checks import no_triton_error
from torchkv import _torch, _triton
from torchkv._call import Call, check, interpret_error

_OPTIONS = (
    "Tensor slot_mapping, str kv_cache_dtype, Tensor? k_scale, Tensor? v_scale, "
    "str? layout, SymInt? layer, Tensor? layer_index, str? backend"
)
_library = Library("torchkv", "DEF")


def _bump(call: Call) -> None:
    """Tells autograd that the caches changed, as torch's own in-place operations do."""
    if not call.caches[0].is_inference():
        torch.autograd.graph.increment_version(call.caches)


def _define(name: str, num_caches: int) -> Any:
    """Defines one op; its caches are the arguments after key and value."""
    names = ("key_cache", "value_cache") if num_caches == 2 else ("kv_cache",)
    mutated = ", ".join(f"Tensor({'ab'[i]}!) {cache}" for i, cache in enumerate(names))
    _library.define(
        f"{name}(Tensor key, Tensor value, {mutated}, {_OPTIONS}) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
    )

    def call_of(args: Sequence[Any]) -> Call:
        return Call(args[0], args[1], tuple(args[2 : 2 + num_caches]), *args[2 + num_caches :])

    def fake(*args: Any) -> None:
        check(call_of(args))

    @torch.no_grad()
    def on_host(*args: Any) -> None:
        call = call_of(args)
        write = check(call)
        if call.backend == "triton":
            raise no_triton_error(call.key.device.type)
        if call.backend == "interpret":
            _triton.interpret_write(write, call)
            _bump(call)
        else:
            _torch.write(write, call)

    def on_gpu(*args: Any) -> None:
        call = call_of(args)
        if call.backend is None or call.backend == "triton":
            _triton.launch(call)
            _bump(call)
            return
        write = check(call)
        if call.backend == "interpret":
            raise interpret_error(call.key.device)
        with torch.no_grad():
            _torch.write(write, call)

    _library.impl(name, on_host, "CPU")
    _library.impl(name, on_gpu, "CUDA")  # ROCm builds of torch use the same key
    torch.library.register_fake(f"torchkv::{name}", fake, lib=_library)
    op = getattr(torch.ops.torchkv, name).default
    torch.library.register_vmap(f"torchkv::{name}", _vmap(op, num_caches), lib=_library)
    return op


def _vmap(op: Any, num_caches: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[None, None]:
        """Batched caches: one call each. Shared caches: the batch is more tokens."""
        slots = 2 + num_caches
        caches_batched = [in_dims[i] is not None for i in range(2, slots)]
        if any(caches_batched):
            if not all(caches_batched):
                raise ValueError("vmap must map all caches or none")
            for i in range(info.batch_size):
                op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            return None, None
        if in_dims[slots] is None:
            raise ValueError("vmap must map slot_mapping where it does not map the caches")
        if any(d is not None for d in in_dims[slots + 1 :]):
            raise ValueError("vmap must map the caches where it maps scales or layer")
        batched = [
            (a.movedim(d, 0) if d is not None else a.expand(info.batch_size, *a.shape))
            for a, d in ((args[i], in_dims[i]) for i in (0, 1, slots))
        ]
        tokens = batched[2].shape[1]
        key, value, slot_mapping = (t[:, :tokens].flatten(0, 1) for t in batched)
        op(key, value, *args[2:slots], slot_mapping, *args[slots + 1 :])
        return None, None

    return rule


flash = _define("reshape_and_cache_flash", 2)
diffkv = _define("reshape_and_cache_flash_diffkv", 1)

"""Registration of the ops with torch.library: dispatch by device, FakeTensor, vmap.

`torch.library.Library` costs 2 µs a call, `custom_op` and `triton_op` ten times that, and the latter clones caches
that are views of one tensor under torch.compile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

from kvcore.contract.checks import no_triton_error
from kvcore.contract.write import split_of_latent
from kvcore.formats import DS_MLA_ROPE
from torchkv._call import Call, check, interpret_error, memory_names
from torchkv._memory import check_address, check_apart
from torchkv._torch import write as _torch
from torchkv._triton import write as _triton

_library = Library("torchkv", "DEF")


def _bump(call: Call) -> None:
    """Tells autograd that the caches changed, as torch's own in-place operations do."""
    if not call.memory[0].is_inference():
        torch.autograd.graph.increment_version(call.memory)


def _define(
    name: str,
    options: str,
    call_of: Callable[[Sequence[Any]], Call],
    num_written: int,
    rows: tuple[str, str] = ("key", "value"),
) -> Any:
    """Defines one op. Its arguments are the rows, the tensors that it writes to, slot_mapping, kv_cache_dtype, options.

    Args:
        name: The op's name.
        options: The rest of its schema.
        call_of: Makes a call of its arguments.
        num_written: Tensors that it writes to.
        rows: Names of the first two arguments.
    """
    names = memory_names(num_written)
    mutated = ", ".join(f"Tensor({alias}!) {tensor}" for alias, tensor in zip("abcd", names, strict=False))
    _library.define(
        f"{name}(Tensor {rows[0]}, Tensor {rows[1]}, {mutated}, Tensor slot_mapping, str kv_cache_dtype, {options}) "
        "-> ()",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def fake(*args: Any) -> None:
        check(call_of(args))

    @torch.no_grad()
    def on_host(*args: Any) -> None:
        call = call_of(args)
        write = check(call)
        if call.backend == "triton":
            raise no_triton_error(call.key.device.type)
        check_apart(names, call.memory)
        check_address(call.memory[0], write.cache.format)
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
        check_apart(names, call.memory)
        check_address(call.memory[0], write.cache.format)
        with torch.no_grad():
            _torch.write(write, call)

    _library.impl(name, on_host, "CPU")
    _library.impl(name, on_gpu, "CUDA")  # ROCm builds of torch use the same key
    torch.library.register_fake(f"torchkv::{name}", fake, lib=_library)
    op = getattr(torch.ops.torchkv, name).default
    torch.library.register_vmap(f"torchkv::{name}", _vmap(op, num_written), lib=_library)
    return op


def _vmap(op: Any, num_written: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[None, None]:
        """Batched caches: one call each. Shared caches: the batch is more tokens."""
        slots = 2 + num_written
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


_LAYER = "SymInt? layer, Tensor? layer_index, str? backend"
_STATIC = f"Tensor? k_scale, Tensor? v_scale, str? layout, {_LAYER}"
_COMPUTED = f"str? layout, str? scale_layout, {_LAYER}"


def _static(num_caches: int) -> Callable[[Sequence[Any]], Call]:
    slots = 2 + num_caches
    return lambda args: Call(args[0], args[1], tuple(args[2:slots]), *args[slots:])


def _computed(num_caches: int) -> Callable[[Sequence[Any]], Call]:
    slots = 2 + num_caches + 2

    def call_of(args: Sequence[Any]) -> Call:
        slot_mapping, kv_cache_dtype, layout, scale_layout, layer, layer_index, backend = args[slots:]
        return Call(
            args[0], args[1], tuple(args[2:slots]), slot_mapping, kv_cache_dtype, None, None, layout, layer,
            layer_index, backend, scale_layout,
        )  # fmt: skip

    return call_of


def _mla(args: Sequence[Any]) -> Call:
    kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, layer, layer_index, backend = args
    if k_pe.dim() == kv_c.dim() == 2 and not k_pe.shape[1] and k_pe.shape[0] == kv_c.shape[0]:
        if kv_cache_dtype == "fp8_ds_mla":
            k_pe = k_pe.new_zeros((1, 1)).expand(kv_c.shape[0], DS_MLA_ROPE)
        else:
            columns = split_of_latent(kv_c.shape[1])
            kv_c, k_pe = kv_c[:, :columns], kv_c[:, columns:]
    return Call(
        kv_c, k_pe, (kv_cache,), slot_mapping, kv_cache_dtype, scale, scale, None, layer, layer_index, backend,
        rows=True,
    )  # fmt: skip


_FLASH, _DIFFKV, _QUANT = "reshape_and_cache_flash", "reshape_and_cache_flash_diffkv", "_per_token_head_quant"
flash = _define(_FLASH, _STATIC, _static(2), 2)
diffkv = _define(_DIFFKV, _STATIC, _static(1), 1)
flash_quant = _define(_FLASH + _QUANT, _COMPUTED, _computed(2), 4)
diffkv_quant = _define(_DIFFKV + _QUANT, _COMPUTED, _computed(1), 3)
mla = _define("concat_and_cache_mla", f"Tensor? scale, {_LAYER}", _mla, 1, rows=("kv_c", "k_pe"))

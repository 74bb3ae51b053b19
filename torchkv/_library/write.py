"""The ops that write a cache, in place, as torch.library knows them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcore.contract.write import Write, split_of_latent
from kvcore.formats import DS_MLA_ROPE
from torchkv._call import WriteCall
from torchkv._library.base import Backends, Rule, call_each, define
from torchkv._torch import write as torch_write
from torchkv._triton.write import Writes


def _fake(write: Write, call: WriteCall) -> None:
    """The op has no results: that the call was checked is all."""


_BACKENDS = Backends(torch_write.write, _fake)


def _vmap(num_written: int) -> Rule:
    """Caches that are mapped are written by a call each. For those that are not, the batch is more tokens."""
    slots = 2 + num_written  # after key, value, and the tensors that are written to

    def rule(op: Any, batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[None, None]:
        caches_mapped = [dim is not None for dim in in_dims[2:slots]]
        if any(caches_mapped):
            if not all(caches_mapped):
                raise ValueError("vmap must map all caches or none")
            call_each(op, batch_size, in_dims, args)
            return None, None
        if in_dims[slots] is None:
            raise ValueError("vmap must map slot_mapping where it does not map the caches")
        if any(dim is not None for dim in in_dims[slots + 1 :]):
            raise ValueError("vmap must map the caches where it maps scales or layer")
        key, value, slot_mapping = (
            args[i].expand(batch_size, *args[i].shape) if in_dims[i] is None else args[i].movedim(in_dims[i], 0)
            for i in (0, 1, slots)
        )
        num_tokens = slot_mapping.shape[1]
        key, value, slot_mapping = (t[:, :num_tokens].flatten(0, 1) for t in (key, value, slot_mapping))
        op(key, value, *args[2:slots], slot_mapping, *args[slots + 1 :])
        return None, None

    return rule


_LAYER = "SymInt? layer, Tensor? layer_index, str? backend"
_STATIC = f"Tensor slot_mapping, str kv_cache_dtype, Tensor? k_scale, Tensor? v_scale, str? layout, {_LAYER}"
_COMPUTED = f"Tensor slot_mapping, str kv_cache_dtype, str? layout, str? scale_layout, {_LAYER}"


# ---- static scales, or none


def _flash_call(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> WriteCall:
    return WriteCall(key, value, (key_cache, value_cache), (), *rest)


def _diffkv_call(key: Tensor, value: Tensor, kv_cache: Tensor, *rest: Any) -> WriteCall:
    return WriteCall(key, value, (kv_cache,), (), *rest)


flash = define(
    f"reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, {_STATIC}) -> ()",
    _flash_call,
    Writes(k_scale=6),
    _BACKENDS,
    _vmap(num_written=2),
)
diffkv = define(
    f"reshape_and_cache_flash_diffkv(Tensor key, Tensor value, Tensor(a!) kv_cache, {_STATIC}) -> ()",
    _diffkv_call,
    Writes(k_scale=5),
    _BACKENDS,
    _vmap(num_written=1),
)


# ---- a scale for each token and head, which is computed


def _flash_quant_call(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    *rest: Any,
) -> WriteCall:
    return _computed_call(key, value, (key_cache, value_cache), (k_scale_cache, v_scale_cache), *rest)


def _diffkv_quant_call(
    key: Tensor, value: Tensor, kv_cache: Tensor, k_scale_cache: Tensor, v_scale_cache: Tensor, *rest: Any
) -> WriteCall:
    return _computed_call(key, value, (kv_cache,), (k_scale_cache, v_scale_cache), *rest)


def _computed_call(
    key: Tensor,
    value: Tensor,
    caches: tuple[Tensor, ...],
    scale_caches: tuple[Tensor, ...],
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    layout: str | None,
    scale_layout: str | None,
    layer: int | None,
    layer_index: Tensor | None,
    backend: str | None,
) -> WriteCall:
    return WriteCall(
        key, value, caches, scale_caches, slot_mapping, kv_cache_dtype, None, None, layout, layer, layer_index, backend,
        scale_layout,
    )  # fmt: skip


flash_quant = define(
    "reshape_and_cache_flash_per_token_head_quant(Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor(c!) k_scale_cache, Tensor(d!) v_scale_cache, "
    f"{_COMPUTED}) -> ()",
    _flash_quant_call,
    Writes(k_scale=None),
    _BACKENDS,
    _vmap(num_written=4),
)
diffkv_quant = define(
    "reshape_and_cache_flash_diffkv_per_token_head_quant(Tensor key, Tensor value, Tensor(a!) kv_cache, "
    f"Tensor(b!) k_scale_cache, Tensor(c!) v_scale_cache, {_COMPUTED}) -> ()",
    _diffkv_quant_call,
    Writes(k_scale=None),
    _BACKENDS,
    _vmap(num_written=3),
)


# ---- rows of multi-head latent attention


def _mla_call(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor | None,
    layer: int | None,
    layer_index: Tensor | None,
    backend: str | None,
) -> WriteCall:
    if k_pe.dim() == kv_c.dim() == 2 and not k_pe.shape[1] and k_pe.shape[0] == kv_c.shape[0]:
        # Rows without a rotary part: zeros in its place where the format has one, else the row's second half.
        if kv_cache_dtype == "fp8_ds_mla":
            k_pe = k_pe.new_zeros((1, 1)).expand(kv_c.shape[0], DS_MLA_ROPE)
        else:
            columns = split_of_latent(kv_c.shape[1])
            kv_c, k_pe = kv_c[:, :columns], kv_c[:, columns:]
    return WriteCall(
        kv_c, k_pe, (kv_cache,), (), slot_mapping, kv_cache_dtype, scale, scale, None, layer, layer_index, backend,
        latent=True,
    )  # fmt: skip


mla = define(
    "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
    f"Tensor? scale, {_LAYER}) -> ()",
    _mla_call,
    Writes(k_scale=None),
    _BACKENDS,
    _vmap(num_written=1),
)

"""One call of an op: its arguments under their names, and the contract's verdict on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.arrays import ArraySpec, array_names
from kvcore.contract.cache import CacheArguments
from kvcore.contract.checks import check_devices, check_scale
from kvcore.contract.write import Write, check_mla, check_write
from torchkv._arguments import spec_of


class Call(NamedTuple):
    """Arguments of an op that writes.

    `memory` is all tensors that are written to: one cache or two, then scale caches, if there are any. `layer` is a
    static index, `layer_index` one in memory; at most one of them is given.
    """

    key: Tensor
    value: Tensor
    memory: tuple[Tensor, ...]
    slot_mapping: Tensor
    kv_cache_dtype: str
    k_scale: Tensor | None
    v_scale: Tensor | None
    layout: str | None
    layer: int | None
    layer_index: Tensor | None
    backend: str | None
    scale_layout: str | None = None
    rows: bool = False
    """Whether it is `concat_and_cache_mla`: rows of a single head, for which the tensors have no axis."""

    @property
    def num_caches(self) -> int:
        """Tensors of `memory` that are caches."""
        return 2 - len(self.memory) % 2

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """The key and the value cache, or the one with both."""
        return self.memory[: self.num_caches]

    @property
    def scale_caches(self) -> tuple[Tensor, ...]:
        """Those of key and value, or none."""
        return self.memory[self.num_caches :]


def memory_names(num_written: int) -> tuple[str, ...]:
    """What schemas and errors call `Call.memory`, by its length."""
    num_caches = 2 - num_written % 2
    return array_names(num_caches, num_written - num_caches)


def check(call: Call) -> Write:
    """What the contract says of a call; tensors may be fake.

    Raises:
        ValueError: a shape, layout, choice or device does not fit.
        TypeError: a dtype does not fit.
    """
    key, value, slot_mapping = spec_of(call.key), spec_of(call.value), spec_of(call.slot_mapping)
    caches, scale_caches = ([spec_of(t) for t in tensors] for tensors in (call.caches, call.scale_caches))
    k_scale, v_scale = (None if t is None else spec_of(t) for t in (call.k_scale, call.v_scale))
    layer = call.layer if call.layer_index is None else spec_of(call.layer_index)
    if call.rows:
        check_mla(key, value, caches[0], call.kv_cache_dtype, layer)
        if k_scale is not None:
            check_scale("scale", k_scale, 1)
        check_devices([("kv_c", key), ("k_pe", value), ("scale", k_scale)], "kv_cache", caches[0])
        key, value = _with_head(key), _with_head(value)
        if call.kv_cache_dtype != "fp8_ds_mla":  # which is a format of rows
            caches = [_with_head(caches[0])]
    cache = CacheArguments(
        caches=caches,
        kv_cache_dtype=call.kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
        layout=call.layout,
        layer=layer,
        scale_caches=scale_caches,
        scale_layout=call.scale_layout,
    )
    return check_write(key, value, slot_mapping, cache)


def interpret_error(device: torch.device) -> ValueError:
    """The error for the backend "interpret" where memory is not the host's."""
    return ValueError(f"backend 'interpret' needs CPU tensors, got device {device}")


def _with_head(rows: ArraySpec) -> ArraySpec:
    """As `unsqueeze(-2)`."""
    shape, steps = rows.shape, rows.steps
    return rows._replace(shape=(*shape[:-1], 1, shape[-1]), strides=(*steps[:-1], shape[-1] * steps[-1], steps[-1]))

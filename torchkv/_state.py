"""What of a cache is saved, and loaded again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcore.arrays import array_names
from kvcore.cache_spec import CacheSpec
from torchkv._arguments import check_tensors, dtype_name


class Stateful:
    """A cache whose tensors can be saved and loaded."""

    caches: tuple[Tensor, ...]
    spec: CacheSpec
    k_scale: Tensor | None
    v_scale: Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """What the cache holds, for `torch.save` and `load_state_dict`.

        Returns:
            The cache's own tensors, not copies, as "key_cache" and "value_cache", or as "kv_cache"; "k_scale" and
            "v_scale", which may be None; and "spec": extents, layout and formats as numbers and strings, so that
            `torch.load` reads it with weights_only.
        """
        return {**self._tensors, "spec": self.spec.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what `state_dict` gave into this cache, whose memory stays where it is. Devices may differ.

        Args:
            state: From a cache that was created like this one.

        Raises:
            ValueError: an entry is missing or superfluous, or an extent, a layout, a format or a shape is not this
                cache's. Nothing was copied then.
            TypeError: a dtype or type does not fit.
        """
        _check_state(self._tensors, self.spec, state)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                if tensor is not None:
                    tensor.copy_(state[name])

    @property
    def _tensors(self) -> dict[str, Tensor | None]:
        names = array_names(len(self.caches))
        return {**dict(zip(names, self.caches, strict=True)), "k_scale": self.k_scale, "v_scale": self.v_scale}


def _check_state(tensors: Mapping[str, Tensor | None], spec: CacheSpec, state: Mapping[str, Any]) -> None:
    """Raises unless `PagedKVCache.state_dict` of a cache like this one gave the state.

    Args:
        tensors: The cache's tensors by name; None where it has none.
        spec: The cache's spec.
        state: What is to be loaded.

    Raises:
        ValueError: an entry is missing or superfluous, or an extent, a layout, a format or a shape is another.
        TypeError: a dtype or type does not fit.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")
    if state.keys() != tensors.keys() | {"spec"}:
        raise ValueError(f"state must have the entries {', '.join([*tensors, 'spec'])}, got {', '.join(state)}")
    spec.check_plain(state["spec"])
    for name, tensor in tensors.items():
        saved = state[name]
        if tensor is None or saved is None:
            if tensor is not saved:
                wanted, got = ("None" if t is None else "a torch.Tensor" for t in (tensor, saved))
                raise ValueError(f"state's {name} must be {wanted}, as in this cache, got {got}")
            continue
        check_tensors(**{f"state's {name}": saved})
        if saved.shape != tensor.shape:
            raise ValueError(f"state's {name} must have shape {tuple(tensor.shape)}, got {tuple(saved.shape)}")
        if saved.dtype != tensor.dtype:
            raise TypeError(f"state's {name} must have dtype {dtype_name(tensor)}, got {dtype_name(saved)}")

"""What goes from the cache to the attention of one layer, and how it gets there.

transformers hands a layer's attention the keys and values that `Cache.update` returned, but no cache. From 5.24 on,
models give `update` the dictionary of keyword arguments that attention is about to get, for caches to change: the
handle goes into it. Before 5.24 it is an attribute of the keys. Either way it lives for one call of one layer: nothing
is global, so that any number of caches, models and threads go on side by side.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

ATTENTION = "torchkv"
"""The name of the attention, for `set_attn_implementation`."""

KEYWORD = "torchkv_handle"


class UnsupportedError(ValueError):
    """What a model or a call asks for cannot be done with a paged cache."""


class Layer(Protocol):
    """What attention needs of a layer's part of the cache."""

    def arrived(self) -> None:
        """Says that the attention that `update` left keys to is the right one."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        window: int | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Writes the new keys and values, and attends: `[batch, tokens, num_q_heads, head_size_v]`."""
        ...


class Handle(NamedTuple):
    """A layer's part of the cache, and the new keys that it was given, `[batch, heads, tokens, head_size]`."""

    layer: Layer
    key: Tensor


def pass_on(handle: Handle, kwargs: dict[str, Any] | None) -> None:
    """Leaves a handle for the attention that comes next."""
    if kwargs is None:
        handle.key._torchkv_layer = handle.layer  # type: ignore[attr-defined]  # no handle: it would keep its own key
    else:
        kwargs[KEYWORD] = handle


def take(key: Tensor, kwargs: dict[str, Any]) -> Handle:
    """The handle that `pass_on` left.

    Raises:
        UnsupportedError: there is none, or the keys are others than those that it came with.
    """
    handle, layer = kwargs.pop(KEYWORD, None), getattr(key, "_torchkv_layer", None)
    if handle is None and layer is not None:
        handle = Handle(layer, key)
    if handle is None:
        raise UnsupportedError(
            f'attention "{ATTENTION}" must be used with a torchkv PagedCache, whose keys the model leaves as they are: '
            "pass cache=PagedCache.for_model(model, …), also to a forward without generate"
        )
    handle.layer.arrived()
    if handle.key is not key:
        raise UnsupportedError(
            "key must be what the cache was given: this model changes keys between its cache and its attention"
        )
    return handle

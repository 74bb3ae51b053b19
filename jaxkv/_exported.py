"""How `jax.export` writes, in a serialised program, the pytrees that users pass to it: registered when imported."""

import json
from dataclasses import fields
from typing import Any

from jax import export

from jaxkv.cache import PagedKVCache
from kvcore.batch import RaggedBatch
from kvcore.cache_spec import CacheSpec
from kvcore.layout import CacheLayout


def _as_json(static: Any) -> bytes:
    """What is static of a cache, its spec: a field each, layouts as JSON of their own."""
    (spec,) = static
    values = {field.name: getattr(spec, field.name) for field in fields(CacheSpec)}
    return json.dumps({n: v.to_json() if isinstance(v, CacheLayout) else v for n, v in values.items()}).encode()


def _of_json(text: bytes | bytearray) -> Any:
    values = json.loads(text)
    layouts = {n: CacheLayout.from_json(values[n]) for n in ("layout", "scale_layout") if values[n] is not None}
    return (CacheSpec(**(values | layouts)),)


export.register_pytree_node_serialization(
    PagedKVCache, serialized_name="jaxkv.PagedKVCache", serialize_auxdata=_as_json, deserialize_auxdata=_of_json
)
export.register_namedtuple_serialization(RaggedBatch, serialized_name="jaxkv.RaggedBatch")

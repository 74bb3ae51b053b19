"""Ways to write the front of a layer in JAX: from the fused projection of query, key and value into the cache.

A *form* is such a way. The form "none" leaves the front out: the difference to it is what a front costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

import jaxkv

BLOCK_SIZE = 16
MAX_POSITION = 4096
EPSILON = 1e-6
E4M3_MAX = 448.0

Caches = tuple[Array, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of the loop: those of Llama 3 8B unless they are made smaller for a CPU.

    Attributes:
        tokens: Of a step.
        q_heads: Heads of query; 0 where only the write is timed: nothing is rotated then.
        kv_cache_dtype: "auto" for bfloat16, or "fp8".
        norm: Whether each head of query and key is normed before it is rotated.
    """

    tokens: int
    q_heads: int = 32
    kv_cache_dtype: str = "auto"
    norm: bool = True
    layers: int = 32
    heads: int = 8
    head_size: int = 128

    @property
    def hidden(self) -> int:
        """Elements of the hidden state: as many as those of query, or of key and value."""
        return (self.q_heads or 2 * self.heads) * self.head_size

    @property
    def columns(self) -> int:
        """Of the fused projection: query's heads, then key's, then value's."""
        return (self.q_heads + 2 * self.heads) * self.head_size

    @property
    def blocks(self) -> int:
        """Of a layer: twice as many as the tokens fill, so that slots are scattered."""
        return 2 * -(-self.tokens // BLOCK_SIZE)

    @property
    def slots(self) -> int:
        """Of a layer."""
        return self.blocks * BLOCK_SIZE

    @property
    def cache_dtype(self) -> Any:
        return jnp.bfloat16 if self.kv_cache_dtype == "auto" else jnp.float8_e4m3fn


class Inputs(NamedTuple):
    """Arrays that every layer reads."""

    weights: Array  # bfloat16 [hidden, columns]
    slots: Array  # int32 [tokens]: in a layer; negative ones are skipped
    positions: Array  # int32 [tokens]
    cos_sin: Array  # float32 [MAX_POSITION, head_size]
    q_norm: Array  # bfloat16 [head_size]
    k_norm: Array  # bfloat16 [head_size]
    k_scale: Array  # float32 [1]
    v_scale: Array  # float32 [1]


class Step(NamedTuple):
    """What XLA's forms compute once a step, for all layers."""

    cosine: Array  # float32 [tokens, 1, head_size / 2]
    sine: Array
    slots: Array  # int32 [tokens], those to be skipped beyond all layers' slots


Rotate = Callable[[Array, Step], Array]

Front = Callable[[Shape, Inputs, Step, Array, Caches, Any], tuple[Array | None, Caches]]
"""Takes the projection `[tokens, columns]` into the caches of a layer. Returns query, if there is one, and caches."""


class Form(NamedTuple):
    """A way to write the front.

    Attributes:
        name: As results call it.
        arrays: Shapes of the caches; each has its heads and their elements as last axes, and K before V.
        front: What it does.
    """

    name: str
    arrays: Callable[[Shape], tuple[tuple[int, ...], ...]]
    front: Front


# ---- shapes of caches


def by_layer(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.layers, shape.blocks, BLOCK_SIZE, shape.heads, shape.head_size),) * 2


def stacked(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.layers * shape.blocks, BLOCK_SIZE, shape.heads, shape.head_size),) * 2


def flat(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.layers * shape.slots, shape.heads, shape.head_size),) * 2


def packed(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.layers * shape.slots, 2 * shape.heads, shape.head_size),)


# ---- parts of fronts


def split(shape: Shape, qkv: Array) -> tuple[Array, Array]:
    """Query and key together, `[tokens, q_heads + heads, head_size]`, and value, as slices of the projection."""
    heads = qkv.reshape(shape.tokens, -1, shape.head_size)
    turning, value = jnp.split(heads, [shape.q_heads + shape.heads], axis=1)
    return turning, value


def kv_views(shape: Shape, qkv: Array) -> tuple[Any, Any]:
    """Key and value as views, which kernels read where they lie."""
    start, middle = shape.q_heads, shape.q_heads + shape.heads
    key = jaxkv.heads(qkv, start, middle, head_size=shape.head_size)
    return key, jaxkv.heads(qkv, middle, middle + shape.heads, head_size=shape.head_size)


def halves(x: Array, step: Step) -> Array:
    """Rotates x `[tokens, heads, head_size]` in float32, each half apart."""
    left, right = jnp.split(x, 2, axis=-1)
    cosine, sine = (jnp.broadcast_to(each, left.shape) for each in (step.cosine, step.sine))
    return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)


def reverse(x: Array, step: Step) -> Array:
    """The same with the halves as an axis that is reversed: XLA fuses that more readily than a concatenation."""
    pairs = x.reshape(*x.shape[:-1], 2, -1)
    cosine, sine = (jnp.broadcast_to(each[:, :, None], pairs.shape) for each in (step.cosine, step.sine))
    sign = jnp.array([-1, 1], jnp.float32)[:, None]
    return (pairs * cosine + pairs[..., ::-1, :] * sine * jnp.broadcast_to(sign, pairs.shape)).reshape(x.shape)


def normed(shape: Shape, x: Array, weight: Array) -> Array:
    """Heads in float32, normed by weights that broadcast to them."""
    x = x.astype(jnp.float32)
    if not shape.norm:
        return x
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(mean + EPSILON) * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)


def written_out(query: Array) -> Array:
    """Query in bfloat16 as attention reads it, from memory: what follows may not be fused with what makes it."""
    return lax.optimization_barrier(query.astype(jnp.bfloat16))


def together(shape: Shape, inputs: Inputs, step: Step, qkv: Array, rotate: Rotate = halves) -> tuple[Array, ...]:
    """Query, rotated, in bfloat16; key, rotated, in float32; value. Query and key are rotated as one array."""
    turning, value = split(shape, qkv)
    weights = [inputs.q_norm[None]] * shape.q_heads + [inputs.k_norm[None]] * shape.heads
    turned = rotate(normed(shape, turning, jnp.concatenate(weights)), step)
    query, key = jnp.split(turned, [shape.q_heads], axis=1)
    return written_out(query), key, value


def apart(shape: Shape, inputs: Inputs, step: Step, qkv: Array, rotate: Rotate = halves) -> tuple[Array, ...]:
    """The same, with query and key rotated apart, so that key's rotation can be fused with its write."""
    turning, value = split(shape, qkv)
    query, key = jnp.split(turning, [shape.q_heads], axis=1)
    query = rotate(normed(shape, query, inputs.q_norm), step)
    return written_out(query), rotate(normed(shape, key, inputs.k_norm), step), value


def stored(shape: Shape, x: Array, scale: Array) -> Array:
    """Elements as the cache holds them."""
    if shape.kv_cache_dtype == "auto":
        return x.astype(shape.cache_dtype)
    # XLA's cast makes NaN of what is too large.
    divided = x.astype(jnp.float32) / jnp.broadcast_to(scale, x.shape)
    return jnp.clip(divided, -E4M3_MAX, E4M3_MAX).astype(shape.cache_dtype)


def kv_of(shape: Shape, qkv: Array) -> tuple[Array, Array]:
    """Key and value as slices of the projection, `[tokens, heads, head_size]`."""
    heads = qkv.reshape(shape.tokens, -1, shape.head_size)
    _, key, value = jnp.split(heads, [shape.q_heads, shape.q_heads + shape.heads], axis=1)
    return key, value


def scatter(caches: Caches, rows: tuple[Array, ...], slots: Array) -> Caches:
    return tuple(
        c.at[slots].set(x, mode="drop", unique_indices=True) for c, x in zip(caches, rows, strict=True)
    )  # fmt: skip


def scatter_packed(caches: Caches, rows: tuple[Array, ...], slots: Array) -> Caches:
    return scatter(caches, (jnp.concatenate(rows, axis=1),), slots)


def set_row(caches: Caches, rows: tuple[Array, ...], slots: Array) -> Caches:
    """The rows of one token, unless its slot is to be skipped, by updating slices of the caches."""
    new = []
    for cache, row in zip(caches, rows, strict=True):
        old = lax.dynamic_slice_in_dim(cache, slots[0], 1)
        row = jnp.where(slots[0] < cache.shape[0], row, old)
        new.append(lax.dynamic_update_slice_in_dim(cache, row, slots[0], 0))
    return tuple(new)


# ---- fronts that only write


def write_none(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    return None, caches


def jaxkv_write(rows: Callable[[Shape, Array], tuple[Any, Any]], indexed: bool) -> Front:
    """A write by jaxkv: of slices or views, to the layer of an index or to slots of stacked layers."""

    def front(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
        slots = inputs.slots if indexed else step.slots + layer * shape.slots
        write: Any = jaxkv.reshape_and_cache_flash
        new = write(*rows(shape, qkv), *caches, slots, layer=layer if indexed else None)
        return None, new

    return front


def write_flat(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    return None, scatter(caches, kv_of(shape, qkv), step.slots + layer * shape.slots)


def write_two_index(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    slots = step.slots + layer * shape.slots
    at = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    return None, tuple(c.at[at].set(x, mode="drop") for c, x in zip(caches, kv_of(shape, qkv), strict=True))


WRITES = (
    Form("none", by_layer, write_none),
    Form("jaxkv_slices", by_layer, jaxkv_write(kv_of, indexed=True)),
    Form("jaxkv_heads", by_layer, jaxkv_write(kv_views, indexed=True)),
    Form("jaxkv_stacked", stacked, jaxkv_write(kv_of, indexed=False)),
    Form("jaxkv_stacked_heads", stacked, jaxkv_write(kv_views, indexed=False)),
    Form("xla_flat", flat, write_flat),
    Form("xla_two_index", stacked, write_two_index),
)


# ---- whole fronts


def front_none(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    return qkv.reshape(shape.tokens, -1, shape.head_size)[:, : shape.q_heads], caches


def front_steps(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    query, key, value = together(shape, inputs, step, qkv)
    scales = () if shape.kv_cache_dtype == "auto" else (inputs.k_scale, inputs.v_scale)
    rows = key.astype(value.dtype), value
    write: Any = jaxkv.reshape_and_cache_flash
    return query, write(*rows, *caches, inputs.slots, shape.kv_cache_dtype, *scales, layer=layer)


def front_fused(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
    options: dict[str, Any] = {"rope": "neox", "kv_cache_dtype": shape.kv_cache_dtype, "layer": layer}
    if shape.norm:
        options |= {"q_norm": inputs.q_norm, "k_norm": inputs.k_norm, "eps": EPSILON}
    if shape.kv_cache_dtype != "auto":
        options |= {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    query = jaxkv.heads(qkv, 0, shape.q_heads, head_size=shape.head_size)
    rows = query, *kv_views(shape, qkv)
    query, *new = jaxkv.rope_and_cache(*rows, caches, inputs.positions, inputs.cos_sin, inputs.slots, **options)
    return query, tuple(new)


def xla_front(parts: Callable[..., tuple[Array, ...]], rotate: Rotate, write: Callable[..., Caches]) -> Front:
    """A front without jaxkv: how query and key are rotated, and how rows are written to slots of all layers."""

    def front(shape: Shape, inputs: Inputs, step: Step, qkv: Array, caches: Caches, layer: Any) -> Any:
        query, key, value = parts(shape, inputs, step, qkv, rotate)
        rows = stored(shape, key, inputs.k_scale), stored(shape, value, inputs.v_scale)
        return query, write(caches, rows, step.slots + layer * shape.slots)

    return front


FRONTS = (
    Form("none", by_layer, front_none),
    Form("jaxkv_steps", by_layer, front_steps),
    Form("jaxkv_fused", by_layer, front_fused),
    Form("xla_flat", flat, xla_front(together, halves, scatter)),
    Form("xla_flat_apart", flat, xla_front(apart, halves, scatter)),
    Form("xla_flat_reverse", flat, xla_front(apart, reverse, scatter)),
    Form("xla_packed", packed, xla_front(apart, halves, scatter_packed)),
    Form("xla_packed_reverse", packed, xla_front(apart, reverse, scatter_packed)),
    Form("xla_row", flat, xla_front(apart, reverse, set_row)),
)
"""The last one is for one token."""

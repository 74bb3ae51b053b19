"""The loop that `benchmarks loop` times: steps of layers, each with one of the fronts of `loop_forms`.

A layer projects its hidden state to query, key and value, has a form take them into the cache, reads back what lies in
its slots, and makes the next hidden state of it all. Of the form "none" the same is left, but the front.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import jaxkv
from benchmarks.loop_forms import MAX_POSITION, Caches, Form, Inputs, Shape, Step, kv_of

POISON = 0.25  # what slots hold that are not written
SCALE = 0.03125  # of what is quantised: normed heads use much of fp8's range, and none of it overflows

# ---- the loop


def prepare(shape: Shape, inputs: Inputs) -> Step:
    cosine, sine = jnp.split(inputs.cos_sin[inputs.positions][:, None], 2, axis=-1)
    skipped = (inputs.slots < 0) | (inputs.slots >= shape.slots)
    return Step(cosine, sine, jnp.where(skipped, shape.layers * shape.slots, inputs.slots))


def one_layer(form: Form, shape: Shape, inputs: Inputs, step: Step, x: Array, caches: Caches, layer: Any) -> Any:
    """The next hidden state `[tokens, hidden]`, and the caches."""
    qkv = x @ inputs.weights
    query, caches = form.front(shape, inputs, step, qkv, caches, layer)
    key, value = (part.astype(jnp.float32) for part in read(shape, caches, step.slots + layer * shape.slots))
    raw_key, raw_value = kv_of(shape, qkv)
    key, value = key + raw_key.astype(jnp.float32), value + raw_value.astype(jnp.float32)
    if query is None:
        mixed = jnp.concatenate([key, value], axis=1)
    else:
        query = query.reshape(shape.tokens, shape.heads, -1, shape.head_size).astype(jnp.float32)
        mixed = query + jnp.broadcast_to((key + value)[:, :, None], query.shape)
    return jnp.tanh(mixed * 0.5).astype(x.dtype).reshape(x.shape), caches


def read(shape: Shape, caches: Caches, slots: Array) -> tuple[Array, Array]:
    """Keys and values in slots, `[tokens, heads, head_size]`; of slots that are skipped some others'."""
    rows = [c.reshape(-1, *c.shape[-2:]).at[slots].get(mode="clip") for c in caches]
    key, value = rows if len(rows) == 2 else jnp.split(rows[0], 2, axis=1)
    if shape.kv_cache_dtype != "auto":
        key, value = (x.astype(jnp.float32) * SCALE for x in (key, value))
    return key, value


def loop(form: Form, shape: Shape, steps: int, unrolled: bool, x: Array, caches: Caches, inputs: Inputs) -> Any:
    """So many steps over all layers; `unrolled` says whether layers are a loop, whose index is traced, or not."""

    def body(_: Any, carry: Any) -> Any:
        step = prepare(shape, inputs)

        def layer(index: Any, carry: Any) -> Any:
            x, caches = carry
            return one_layer(form, shape, inputs, step, x, caches, index)

        if not unrolled:
            return lax.fori_loop(0, shape.layers, layer, carry)
        for index in range(shape.layers):
            carry = layer(index, carry)
        return carry

    return lax.fori_loop(0, steps, body, (x, caches))


# ---- arrays, and what is right


def make_inputs(shape: Shape) -> Inputs:
    keys = jax.random.split(jax.random.key(0), 6)
    bf16 = jnp.bfloat16
    return Inputs(
        weights=jax.random.normal(keys[0], (shape.hidden, shape.columns), bf16) * bf16(shape.hidden**-0.5),
        slots=jax.random.permutation(keys[1], shape.slots)[: shape.tokens].astype(jnp.int32),
        positions=jax.random.randint(keys[2], (shape.tokens,), 0, MAX_POSITION, jnp.int32),
        cos_sin=jaxkv.rope_table({"head_dim": shape.head_size}, MAX_POSITION),
        q_norm=jax.random.uniform(keys[3], (shape.head_size,), bf16, 0.5, 1.5),
        k_norm=jax.random.uniform(keys[4], (shape.head_size,), bf16, 0.5, 1.5),
        k_scale=jnp.full(1, SCALE, jnp.float32),
        v_scale=jnp.full(1, SCALE * 2, jnp.float32),
    )


def make_caches(form: Form, shape: Shape) -> Caches:
    return tuple(jnp.full(each, POISON, shape.cache_dtype) for each in form.arrays(shape))


def make_hidden(shape: Shape) -> Array:
    return jax.random.normal(jax.random.key(1), (shape.tokens, shape.hidden), jnp.bfloat16)


@jax.jit(static_argnums=(0, 1))
def front_alone(form: Form, shape: Shape, inputs: Inputs, qkv: Array, caches: Caches) -> Any:
    """Query, and K and V of all slots `[layers * slots, 2 * heads, head_size]`, in float32, after one layer's front."""
    query, new = form.front(shape, inputs, prepare(shape, inputs), qkv, caches, jnp.int32(shape.layers - 1))
    rows = jnp.concatenate([c.reshape(-1, *c.shape[-2:]) for c in new], axis=1)
    return query, rows


def differences(forms: Sequence[Form], shape: Shape, inputs: Inputs) -> dict[str, str]:
    """What is wrong with the results of forms, by their names: all give the first one's query and caches.

    Elements may differ by one step of their formats, as XLA and the kernels round sums and products in orders of their
    own; a form that only writes gives the same bits.
    """
    # The first of several tokens is skipped: its slot keeps what it had.
    inputs = inputs._replace(slots=inputs.slots.at[0].set(-1) if shape.tokens > 1 else inputs.slots)
    qkv = jax.random.normal(jax.random.key(2), (shape.tokens, shape.columns), jnp.bfloat16)
    found: dict[str, str] = {}
    expected = None
    for form in forms:
        if form.name == "none":
            continue
        query, caches = front_alone(form, shape, inputs, qkv, make_caches(form, shape))
        if expected is None:
            expected = query, caches
            written = int((caches != jnp.full((), POISON, caches.dtype)).any(axis=(1, 2)).sum())
            if written != max(1, shape.tokens - 1):
                found[form.name] = f"writes {written} slots of {shape.tokens} tokens"
            continue
        for name, a, b in zip(("query", "cache"), expected, (query, caches), strict=True):
            if a is not None and not (excess := float(_excess(a, b, shape.q_heads > 0))) <= 0:
                found[form.name] = f"gives another {name}: {excess:.3g} more than rounding explains"
    return found


@jax.jit(static_argnums=2)
def _excess(a: Array, b: Array, rounded: bool) -> Array:
    """By how much the largest difference exceeds what one rounding may make of the same number, if any does."""
    step, least = 0.0, 0.0
    if rounded:
        step = float(jnp.finfo(a.dtype).eps)
        least = 2.0**-9 if a.dtype.itemsize == 1 else 1e-5  # of differences between larger numbers
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    excess = jnp.abs(a - b) - jnp.maximum(step * jnp.maximum(jnp.abs(a), jnp.abs(b)), least)
    return jnp.max(jnp.where(jnp.isnan(excess), jnp.inf, excess))

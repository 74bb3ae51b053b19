"""The contract of `rope_and_cache`: every check, every error message, once for both frameworks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvcore.arrays import ArraySpec, shape_of, with_unit_axis
from kvcore.contract.cache import CacheArguments, check_cache_devices
from kvcore.contract.checks import check_indices, check_rank, either, is_integer, is_number, layout_of
from kvcore.contract.write import Write, check_mla, check_write, in_latent_order, with_latent_head
from kvcore.formats import FLOATS, FP8_DS_MLA
from kvcore.layout import CacheLayout

ROPES = ("neox", "gptj")
"""Which elements of a head form a pair that is turned: those half of rotary_dim apart, or neighbours."""


class RopeOptions(NamedTuple):
    """Numbers that a rotation and a norm are computed with; hashable.

    Attributes:
        interleaved: Whether the elements of a pair are neighbours ("gptj"), not half of rotary_dim apart ("neox").
        rotary_dim: How many elements of a head, its first ones, are rotated; None for all.
        sections: How many pairs have the angles of the first, second and third row of positions; None where positions
            have one row.
        eps: What is added to the mean of the squares.
    """

    interleaved: bool = False
    rotary_dim: int | None = None
    sections: tuple[int, int, int] | None = None
    eps: float = 1e-6


class Rope(NamedTuple):
    """A call of `rope_and_cache` that fulfils the contract; hashable.

    Attributes:
        write: What is written; key and value have an axis for heads, also those of MLA.
        query: The spec of query.
        positions: The spec of positions.
        cos_sin: The spec of cos_sin.
        q_norm: The spec of the weights that query is normed with, or None.
        k_norm: The spec of the weights that key is normed with, or None.
        options: Numbers; rotary_dim is not None.
        latent: Whether value is rotated, not key: of MLA's rows, which are kv_c and k_pe.
    """

    write: Write
    query: ArraySpec
    positions: ArraySpec
    cos_sin: ArraySpec
    q_norm: ArraySpec | None
    k_norm: ArraySpec | None
    options: RopeOptions
    latent: bool

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return self.cos_sin.shape[1]

    @property
    def computed(self) -> tuple[bool, bool]:
        """Whether key, and value, are normed or rotated on their way, so that they come as float32."""
        return not self.latent or self.k_norm is not None, self.latent


def check_rope_options(rope: Any, rotary_dim: Any, mrope_section: Any, eps: Any) -> RopeOptions:
    """Checks the numbers of `rope_and_cache`; NumPy's count as Python's.

    Raises:
        ValueError: a choice or a number is out of range.
        TypeError: an argument is of another type.
    """
    if rope not in ROPES:
        raise ValueError(f"rope must be {either(map(repr, ROPES))}, got {rope!r}")
    if rotary_dim is not None:
        if not is_integer(rotary_dim):
            raise TypeError(f"rotary_dim must be None or an int, got {rotary_dim!r}")
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    if mrope_section is not None:
        sizes = list(mrope_section) if isinstance(mrope_section, (list, tuple, np.ndarray)) else None
        if sizes is None or len(sizes) != 3 or not all(map(is_integer, sizes)):
            raise TypeError(f"mrope_section must be None or three ints, got {mrope_section!r}")
        if min(sizes) < 0:
            raise ValueError(f"mrope_section must not be negative, got {tuple(map(int, sizes))}")
        mrope_section = tuple(map(int, sizes))
    if not is_number(eps):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    return RopeOptions(
        interleaved=rope == "gptj",
        rotary_dim=None if rotary_dim is None else int(rotary_dim),
        sections=mrope_section,
        eps=float(np.float32(eps)),
    )


def split_caches(caches: Sequence[Any], name: str = "caches") -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays of a cache, which errors call by that name, taken apart: caches, and scale caches that may follow.

    Raises:
        ValueError: there are none, or more than four.
    """
    if not 1 <= len(caches) <= 4:
        raise ValueError(
            f"{name} must be (key_cache, value_cache) or (kv_cache,), followed by (k_scale_cache, v_scale_cache) where "
            f"each token's head has a scale, got {len(caches)} arrays"
        )
    count = 2 - len(caches) % 2
    return tuple(caches[:count]), tuple(caches[count:])


def is_latent(arguments: CacheArguments) -> bool:
    """Whether caches hold rows of MLA, of which value is rotated."""
    caches, layout = arguments.caches, arguments.layout
    if len(caches) != 1:
        return layout is not None and CacheLayout.of(layout).latent
    if layout is None and arguments.quantised == FP8_DS_MLA:
        return True
    return layout_of(layout, caches, arguments.layer).latent


def check_rope(
    query: ArraySpec,
    key: ArraySpec,
    value: ArraySpec,
    positions: ArraySpec,
    cos_sin: ArraySpec,
    slot_mapping: ArraySpec,
    q_norm: ArraySpec | None,
    k_norm: ArraySpec | None,
    options: RopeOptions,
    arguments: CacheArguments,
    latent: bool | None = None,
) -> Rope:
    """Checks the arguments of `rope_and_cache`.

    Args:
        query: `(num_tokens, num_q_heads, head_size)`.
        key: `(num_tokens, num_heads, head_size)`; of MLA kv_c, `(num_tokens, kv_lora_rank)`.
        value: `(num_tokens, num_heads, head_size_v)`; of MLA k_pe, `(num_tokens, qk_rope_head_dim)`.
        positions: `(num_tokens,)`, or `(3, num_tokens)`.
        cos_sin: `(max_position, rotary_dim)`.
        slot_mapping: `(n,)`, n ≤ num_tokens.
        q_norm: `(head_size,)`, or None.
        k_norm: `(head_size,)`, or None.
        options: What `check_rope_options` lets pass.
        arguments: The cache that is written.
        latent: Whether these are rows of MLA that have an axis for their one head already; None where it is to be found
            out, and they have none.

    Raises:
        ValueError: a shape, an extent, a choice or a device does not fit.
        TypeError: a dtype or a type does not fit.
    """
    if latent is None:
        latent = is_latent(arguments)
        if latent:
            key, value, arguments = _with_heads(key, value, arguments)
    write = check_write(key, value, slot_mapping, arguments)
    tokens = key.shape[0]
    rotated = (value if latent else key).shape[2]
    if key.dtype not in FLOATS:
        raise TypeError(f"key must have dtype {either(FLOATS)}, got {key.dtype}")
    if len(query.shape) != 3 or query.shape[0] != tokens or query.shape[2] != rotated or query.shape[1] < 1:
        raise ValueError(f"query must have shape ({tokens}, num_q_heads, {rotated}), got {shape_of(query)}")
    if query.dtype != key.dtype:
        raise TypeError(f"query must have dtype {key.dtype}, as key, got {query.dtype}")
    rotary_dim = _rotary_dim(options.rotary_dim, rotated)
    check_rank("cos_sin", cos_sin, 2, f"(max_position, {rotary_dim})")
    if cos_sin.shape[1] != rotary_dim:
        raise ValueError(f"cos_sin must have shape (max_position, {rotary_dim}), got {shape_of(cos_sin)}")
    _check_float("cos_sin", cos_sin, key)
    if options.sections is not None and sum(options.sections) != rotary_dim // 2:
        raise ValueError(
            f"mrope_section must add up to rotary_dim / 2 = {rotary_dim // 2}, got {options.sections}, "
            f"which are {sum(options.sections)}"
        )
    check_indices("positions", positions, (tokens,) if options.sections is None else (3, tokens))
    for name, weights, size in (("q_norm", q_norm, rotated), ("k_norm", k_norm, key.shape[2])):
        if weights is not None:
            if tuple(weights.shape) != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {shape_of(weights)}")
            _check_float(name, weights, key)
    named = [("query", query), ("positions", positions), ("cos_sin", cos_sin), ("q_norm", q_norm), ("k_norm", k_norm)]
    check_cache_devices(arguments, named)
    return Rope(
        write, query, positions, cos_sin, q_norm, k_norm, options._replace(rotary_dim=rotary_dim), latent
    )  # fmt: skip


def check_positions(positions: np.ndarray, max_position: int) -> None:
    """Checks positions whose numbers are known before anything is launched.

    Raises:
        ValueError: one is beyond the table. Negative ones are left to the op, which makes zeros of them.
    """
    if positions.size and positions.max() >= max_position:
        raise ValueError(f"cos_sin must have a row for position {positions.max()}, got {max_position} rows")


def _with_heads(
    key: ArraySpec, value: ArraySpec, arguments: CacheArguments
) -> tuple[ArraySpec, ArraySpec, CacheArguments]:
    """MLA's kv_c, k_pe and cache with an axis for their one head."""
    if len(arguments.caches) != 1 or arguments.scale_caches:
        raise ValueError(
            f"caches must be one array for layout '{CacheLayout.of(arguments.layout or 'MLA')}', "
            f"got {len(arguments.caches) + len(arguments.scale_caches)}"
        )
    if arguments.v_scale is not None:
        raise ValueError("v_scale must be None for rows of MLA, where k_scale is for the whole row")
    kv_cache = arguments.caches[0]
    layout = CacheLayout.MLA if arguments.layer is None else CacheLayout.MLA.with_layer()
    if arguments.layout is not None:
        layout = CacheLayout.of(arguments.layout)
    rows = in_latent_order(layout, kv_cache)
    check_mla(key, value, rows, arguments.kv_cache_dtype, arguments.layer, ("key", "value"))
    if value.shape[1] < 2:
        raise ValueError(f"value must have at least 2 columns to be rotated, got shape {shape_of(value)}")
    layout, kv_cache = with_latent_head(layout, kv_cache, arguments.kv_cache_dtype)
    arguments = arguments._replace(caches=[kv_cache], layout=layout, v_scale=arguments.k_scale)
    return with_unit_axis(key, 1), with_unit_axis(value, 1), arguments


def _rotary_dim(rotary_dim: int | None, head_size: int) -> int:
    """How many elements are rotated."""
    if rotary_dim is None:
        if head_size < 2 or head_size % 2:
            raise ValueError(f"rotary_dim must be given for an odd head_size, got None and {head_size}")
        return head_size
    if rotary_dim > head_size:
        raise ValueError(f"rotary_dim must be at most head_size = {head_size}, got {rotary_dim}")
    return rotary_dim


def _check_float(name: str, spec: ArraySpec, key: ArraySpec) -> None:
    """Checks that an array is float32, or of key's dtype."""
    if spec.dtype not in ("float32", key.dtype):
        raise TypeError(f"{name} must have dtype {either(dict.fromkeys(('float32', key.dtype)))}, got {spec.dtype}")

"""Number formats of the cache: names, storage dtypes, and the bit-level facts that define a rounding."""

import struct
from typing import NamedTuple


class FloatFormat(NamedTuple):
    """A binary number format, described far enough to round a float32 to it exactly.

    It is passed to the Triton kernels as a constexpr, hence a NamedTuple of plain integers and strings.

    Attributes:
        name: The dtype's name in NumPy (ml_dtypes), JAX and torch, or that of the `kv_cache_dtype`.
        bits: Width of one element, in bits. Elements of 4 bits lie two in a byte, the first in its low half.
        mantissa_bits: Explicit mantissa bits.
        bias: Exponent bias.
        clamp: float32 bit pattern of the magnitude at which larger ones are clamped before rounding: the
            largest finite value where the format saturates, the first value that rounds to infinity where
            it does not.
        nan: Bit pattern that every NaN becomes, whatever its sign and payload.
        integer: Whether it holds integers, in two's complement; the other numbers do not matter then.
        unsigned_zero: Whether it has one zero only, as the fnuz formats.
    """

    name: str
    bits: int
    mantissa_bits: int
    bias: int
    clamp: int
    nan: int
    integer: bool = False
    unsigned_zero: bool = False

    @property
    def elements_per_unit(self) -> int:
        """Elements of a stored unit: 2 in a byte, or 1."""
        return 2 if self.bits == 4 else 1

    @property
    def largest(self) -> float:
        """The largest magnitude of a format that saturates."""
        return struct.unpack("<f", struct.pack("<I", self.clamp))[0]


FLOAT32 = FloatFormat("float32", 32, 23, 127, 0x7F800000, 0x7FC00000)
BFLOAT16 = FloatFormat("bfloat16", 16, 7, 127, 0x7F800000, 0x7FC0)
FLOAT16 = FloatFormat("float16", 16, 10, 15, 0x47800000, 0x7E00)  # 65536.0: rounds to infinity
E4M3 = FloatFormat("float8_e4m3fn", 8, 3, 7, 0x43E00000, 0x7F)  # 448.0: saturates, as all below
E5M2 = FloatFormat("float8_e5m2", 8, 2, 15, 0x47600000, 0x7F)  # 57344.0
E4M3FNUZ = FloatFormat("float8_e4m3fnuz", 8, 3, 8, 0x43700000, 0x80, unsigned_zero=True)  # 240.0
E5M2FNUZ = FloatFormat("float8_e5m2fnuz", 8, 2, 16, 0x47600000, 0x80, unsigned_zero=True)  # 57344.0
INT8 = FloatFormat("int8", 8, 0, 0, 0x42FE0000, 0, integer=True)  # 127.0
INT4 = FloatFormat("int4", 4, 0, 0, 0x40E00000, 0, integer=True)  # 7.0
NVFP4 = FloatFormat("nvfp4", 4, 1, 1, 0x40C00000, 7)  # e2m1, 6.0; it has no NaN
FP8_DS_MLA = E4M3._replace(name="fp8_ds_mla")

FLOATS = {f.name: f for f in (FLOAT32, BFLOAT16, FLOAT16)}
"""Unquantised dtypes, of inputs and of caches."""

FP8 = {f.name: f for f in (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ)}
"""Quantised float dtypes."""

KV_CACHE_DTYPES: dict[str, FloatFormat | None] = {
    "auto": None,
    "fp8": E4M3,
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
    "fp8_e4m3fnuz": E4M3FNUZ,
    "fp8_e5m2fnuz": E5M2FNUZ,
    "int8": INT8,
    "int4": INT4,
    "nvfp4": NVFP4,
    "fp8_ds_mla": FP8_DS_MLA,
}
"""`kv_cache_dtype` → the stored format; None where the cache's own dtype decides."""

PER_TOKEN_HEAD = tuple(n for n, f in KV_CACHE_DTYPES.items() if f is not None and f not in (NVFP4, FP8_DS_MLA))
"""What `kv_cache_dtype` may be where each token's head has a scale of its own."""

NVFP4_GROUP = 16
"""Elements along dim that share a scale."""

DS_MLA_GROUP, DS_MLA_LATENT, DS_MLA_ROPE = 128, 512, 64
"""A row of fp8_ds_mla: 512 elements of e4m3, a float32 scale for each 128 of them, then 64 of bfloat16."""

DS_MLA_ROW = DS_MLA_LATENT + 4 * (DS_MLA_LATENT // DS_MLA_GROUP) + 2 * DS_MLA_ROPE
"""Bytes of a row of fp8_ds_mla: 656."""

DS_MLA_SMALLEST_SCALE = 2.0**-13
"""The least of its scales, which are powers of two: the first that is not below 1e-4."""

SMALLEST_SCALE = 2.0**-126
"""Scales that are computed are never below this, float32's least normal number: such rows count as zeros."""


def storage_of(stored: FloatFormat) -> tuple[str, ...]:
    """The dtypes that a cache of quantised elements may have."""
    return (stored.name, "uint8") if stored.name in FP8 or stored is INT8 else ("uint8",)


def stored_size(stored: FloatFormat | None, head_size: int) -> int:
    """Units (bytes, where quantised) that a head's elements take along the axis dim, scales beside them included.

    Raises:
        ValueError: the format does not divide head_size.
    """
    if stored is None:
        return head_size
    check_head_size("head_size", stored, head_size)
    if stored == FP8_DS_MLA:
        return DS_MLA_ROW
    return head_size // stored.elements_per_unit + (head_size // NVFP4_GROUP if stored == NVFP4 else 0)


def check_head_size(name: str, stored: FloatFormat, head_size: int) -> None:
    """Raises unless the format can hold heads of this size."""
    wanted = {"int4": (2, "even"), "nvfp4": (NVFP4_GROUP, f"a multiple of {NVFP4_GROUP}")}.get(stored.name)
    if wanted is not None and head_size % wanted[0]:
        raise ValueError(f"{name} must be {wanted[1]} for kv_cache_dtype {stored.name!r}, got {head_size}")
    if stored == FP8_DS_MLA and head_size != DS_MLA_LATENT + DS_MLA_ROPE:
        raise ValueError(
            f"{name} must be {DS_MLA_LATENT + DS_MLA_ROPE} for kv_cache_dtype 'fp8_ds_mla', got {head_size}"
        )

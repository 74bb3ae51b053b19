"""Number formats of the cache: names, storage dtypes, and the bit-level facts that define a rounding."""

from typing import NamedTuple


class FloatFormat(NamedTuple):
    """A binary floating-point format, described far enough to round a float32 to it exactly.

    It is passed to the Triton kernels as a constexpr, hence a NamedTuple of plain integers and strings.

    Attributes:
        name: The dtype's name in NumPy (ml_dtypes), JAX and torch.
        bits: Width of one element, in bits.
        mantissa_bits: Explicit mantissa bits.
        bias: Exponent bias.
        clamp: float32 bit pattern of the magnitude at which larger ones are clamped before rounding: the
            largest finite value where the format saturates, the first value that rounds to infinity where
            it does not.
        nan: Bit pattern that every NaN becomes, whatever its sign and payload.
    """

    name: str
    bits: int
    mantissa_bits: int
    bias: int
    clamp: int
    nan: int


FLOAT32 = FloatFormat("float32", 32, 23, 127, 0x7F800000, 0x7FC00000)
BFLOAT16 = FloatFormat("bfloat16", 16, 7, 127, 0x7F800000, 0x7FC0)
FLOAT16 = FloatFormat("float16", 16, 10, 15, 0x47800000, 0x7E00)  # 65536.0: rounds to infinity
E4M3 = FloatFormat("float8_e4m3fn", 8, 3, 7, 0x43E00000, 0x7F)  # 448.0: saturates
E5M2 = FloatFormat("float8_e5m2", 8, 2, 15, 0x47600000, 0x7F)  # 57344.0: saturates

FLOATS = {f.name: f for f in (FLOAT32, BFLOAT16, FLOAT16)}
"""Unquantised dtypes, of inputs and of caches."""

FP8 = {f.name: f for f in (E4M3, E5M2)}
"""Quantised float dtypes."""

KV_CACHE_DTYPES: dict[str, FloatFormat | None] = {
    "auto": None,
    "fp8": E4M3,
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
}
"""`kv_cache_dtype` → the stored format; None where the cache's own dtype decides."""

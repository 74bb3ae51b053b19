"""Elements of a cache as floats: the one place where a stored format is read."""

import triton
import triton.language as tl


@triton.jit
def decode(x, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Elements of FORMAT (fp8 as bytes) as floats of COMPUTE; both are kvcore.quantization.FloatFormat.

    Exact, for COMPUTE has all numbers of FORMAT. Scales are left to the caller.
    """
    if FORMAT.bits == 8:
        if FORMAT.mantissa_bits == 2:  # e5m2 is the upper half of float16
            x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        elif HARDWARE_FP8:
            x = x.to(tl.float8e4nv, bitcast=True)
        else:
            x = _e4m3(x)
    elif FORMAT.mantissa_bits == 7 and COMPUTE.bits == 32:  # by hand: the interpreter's cast loses subnormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if COMPUTE.bits == 32:
        x = x.to(tl.float32)
    elif COMPUTE.mantissa_bits == 7:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float16)
    return x


@triton.jit
def _e4m3(x):
    """Float32 of e4m3 bytes with integer arithmetic: the same fields in float16, whose exponents are 2^8 smaller."""
    magnitude = x & 0x7F
    half = (magnitude.to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)

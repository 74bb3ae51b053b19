"""Elements of a cache as floats: the one place where a stored format is read."""

import triton
import triton.language as tl

_PICK = "{{ .reg .b32 r; .reg .b16 t; prmt.b32 r, $1, 0, {}; cvt.u16.u32 t, r; cvt.rn.f16x2.e4m3x2 $0, t; }}"
_PICK_LOW = tl.constexpr(_PICK.format("0x4420"))  # bytes 0 and 2
_PICK_HIGH = tl.constexpr(_PICK.format("0x4431"))  # bytes 1 and 3


@triton.jit
def widen(x):
    """Floats as float32."""
    if x.dtype == tl.bfloat16:  # by hand: the interpreter's cast loses subnormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, COMPUTE: tl.constexpr):
    """Floats as floats of COMPUTE, a kvcore.quantization.FloatFormat."""
    if COMPUTE.bits == 32:
        x = widen(x)
    elif COMPUTE.mantissa_bits == 7:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float16)
    return x


@triton.jit
def decode(x, FORMAT: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """Elements of FORMAT (fp8 as bytes), a kvcore.quantization.FloatFormat, as floats of a type that has them all."""
    if FORMAT.bits == 8:
        if FORMAT.mantissa_bits == 2:  # e5m2 is the upper half of float16
            x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        elif HARDWARE_FP8:
            x = x.to(tl.float8e4nv, bitcast=True)
        else:
            x = _e4m3(x)
    return x


@triton.jit
def decode_lane(
    x, LANE: tl.constexpr, PACK: tl.constexpr, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE_FP8: tl.constexpr
):
    """One of the PACK elements in each word, as floats of COMPUTE. Two bytes of a 16-bit word, or the word itself.

    Exact, for COMPUTE has all numbers of FORMAT. Tensor cores read 16-bit words from shared memory as they lie. Bytes
    would be carried one by one.
    """
    if PACK == 1:
        x = narrow(decode(x, FORMAT, HARDWARE_FP8), COMPUTE)
    elif FORMAT.mantissa_bits == 2:
        if LANE == 0:
            x = x << 8
        else:
            x = x & 0xFF00
        x = narrow(x.to(tl.float16, bitcast=True), COMPUTE)
    elif HARDWARE_FP8 and COMPUTE.mantissa_bits == 10:  # two words at a time: pick their bytes, convert both
        if LANE == 0:
            x = tl.inline_asm_elementwise(_PICK_LOW, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
        else:
            x = tl.inline_asm_elementwise(_PICK_HIGH, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        if LANE > 0:
            x = x >> 8
        x = narrow(decode(x.to(tl.uint8), FORMAT, HARDWARE_FP8), COMPUTE)
    return x


@triton.jit
def _e4m3(x):
    """Float32 of e4m3 bytes with integer arithmetic: the same fields in float16, whose exponents are 2^8 smaller."""
    magnitude = x & 0x7F
    half = (magnitude.to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)

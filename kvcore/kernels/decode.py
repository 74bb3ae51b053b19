"""Elements of a cache as floats: the one place where a stored format is read."""

import triton
import triton.language as tl


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
    """Floats as floats of COMPUTE, a kvcore.formats.FloatFormat."""
    if COMPUTE.bits == 32:
        x = widen(x)
    elif COMPUTE.mantissa_bits == 7:
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float16)
    return x


@triton.jit
def decode(x, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Elements of FORMAT, a kvcore.formats.FloatFormat, as floats of a type that has them all.

    Quantised ones are bytes; of those of 4 bits the lower halves count. HARDWARE: whether the target converts e4m3.
    """
    if FORMAT.integer:
        if FORMAT.bits == 4:
            x = ((x & 15) ^ 8).to(tl.int32) - 8
        else:
            x = x.to(tl.int8, bitcast=True)
        x = x.to(tl.float32)
    elif FORMAT.bits == 4:  # the fields of e2m1 in float16, whose exponents are 2^14 smaller
        half = ((x & 7).to(tl.uint16) << 9) | ((x & 8).to(tl.uint16) << 12)
        x = half.to(tl.float16, bitcast=True) * 16384.0
    elif FORMAT.bits == 8:
        if FORMAT.unsigned_zero:
            x = _fnuz(x, FORMAT)
        elif FORMAT.mantissa_bits == 2:  # e5m2 is the upper half of float16
            x = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
        elif HARDWARE:
            x = x.to(tl.float8e4nv, bitcast=True)
        else:
            x = _e4m3(x)
    return x


# Words of 16 bits hold two bytes or four elements of 4 bits. Two words at a time, in one register, become two float16:
# their lanes are picked and converted together.
_TEMPLATE = "{{ .reg .b32 r, s; .reg .b16 t; {} }}"
_PTX_E4M3 = tl.constexpr(
    [
        _TEMPLATE.format(f"prmt.b32 r, $1, 0, {pick}; cvt.u16.u32 t, r; cvt.rn.f16x2.e4m3x2 $0, t;")
        for pick in ("0x4420", "0x4431")
    ]
)
# 1024 + n is 0x6400 + n in float16, for n below 1024: a byte with its sign flipped is n = 128 + element.
_PTX_INT8 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"xor.b32 r, $1, 0x80808080; mov.b32 s, 0x64646464; prmt.b32 r, r, s, {pick}; "
            "mov.b32 s, 0x64806480; sub.f16x2 $0, r, s;"
        )
        for pick in ("0x4240", "0x4341")
    ]
)
# Likewise n = 8 + element; the third operation is (r & mask) ^ 0x6408.
_PTX_INT4 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"shr.u32 r, $1, {4 * lane}; lop3.b32 r, r, 0x000F000F, 0x64086408, 0x6A; "
            "mov.b32 s, 0x64086408; sub.f16x2 $0, r, s;"
        )
        for lane in range(4)
    ]
)
_PTX_E2M1 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"shr.u32 r, $1, {4 * lane}; and.b32 s, r, 0x00080008; and.b32 r, r, 0x00070007; shl.b32 r, r, 9; "
            "shl.b32 s, s, 12; or.b32 r, r, s; mov.b32 s, 0x74007400; mul.f16x2 $0, r, s;"
        )
        for lane in range(4)
    ]
)


@triton.jit
def _convert_pairs(x, LANES: tl.constexpr, LANE: tl.constexpr):
    PTX: tl.constexpr = LANES[LANE]
    return tl.inline_asm_elementwise(PTX, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def decode_lane(
    x, LANE: tl.constexpr, PACK: tl.constexpr, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, HARDWARE: tl.constexpr
):
    """One of the PACK elements in each word, as floats of COMPUTE: in words of 16 bits, in bytes, or the word itself.

    Exact, for COMPUTE has all numbers of FORMAT. Tensor cores read 16-bit words from shared memory as they lie. Bytes
    would be carried one by one. HARDWARE: whether the target has the instructions that FORMAT wants.
    """
    PAIRS: tl.constexpr = HARDWARE and COMPUTE.mantissa_bits == 10 and PACK * FORMAT.bits == 16
    if PACK == 1:
        x = narrow(decode(x, FORMAT, HARDWARE), COMPUTE)
    elif FORMAT.mantissa_bits == 2 and not FORMAT.unsigned_zero:
        if LANE == 0:
            x = x << 8
        else:
            x = x & 0xFF00
        x = narrow(x.to(tl.float16, bitcast=True), COMPUTE)
    elif PAIRS and FORMAT.bits == 8 and FORMAT.integer:
        x = _convert_pairs(x, _PTX_INT8, LANE)
    elif PAIRS and FORMAT.bits == 8 and not FORMAT.unsigned_zero:
        x = _convert_pairs(x, _PTX_E4M3, LANE)
    elif PAIRS and FORMAT.integer:
        x = _convert_pairs(x, _PTX_INT4, LANE)
    elif PAIRS and FORMAT.bits == 4:
        x = _convert_pairs(x, _PTX_E2M1, LANE)
    else:
        if LANE > 0:
            x = x >> (LANE * FORMAT.bits)
        x = narrow(decode(x.to(tl.uint8), FORMAT, HARDWARE), COMPUTE)
    return x


@triton.jit
def _e4m3(x):
    """Float32 of e4m3 bytes with integer arithmetic: the same fields in float16, whose exponents are 2^8 smaller."""
    magnitude = x & 0x7F
    half = (magnitude.to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _fnuz(x, FORMAT: tl.constexpr):
    """Float32 of fnuz bytes: the same fields in float32, whose exponents are 2^(127 - bias) smaller."""
    bits = ((x & 0x7F).to(tl.uint32) << (23 - FORMAT.mantissa_bits)) | ((x & 0x80).to(tl.uint32) << 24)
    FACTOR: tl.constexpr = (254 - FORMAT.bias) << 23
    factor = tl.full(x.shape, FACTOR, tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(x == 0x80, float("nan"), bits.to(tl.float32, bitcast=True) * factor)

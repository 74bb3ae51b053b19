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

    Quantised elements are bytes; one of 4 bits is the lower half of its byte, and the upper half is ignored.
    HARDWARE: whether the target converts e4m3.
    """
    if FORMAT.integer:
        if FORMAT.bits == 4:
            x = ((x & 15) ^ 8).to(tl.int32) - 8
        else:
            x = x.to(tl.int8, bitcast=True)
        x = x.to(tl.float32)
    elif FORMAT.bits == 4:  # the fields of e2m1 in float16 are numbers 2^14 times smaller
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


@triton.jit
def unpack(units, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr):
    """Elements of stored units `[ROWS, COLUMNS]`, each in the low bits of its own: what `encode.pack` undoes."""
    if FORMAT.bits == 4:
        units = tl.reshape(tl.join(units, units >> 4), [ROWS, COLUMNS * 2])
    return units


@triton.jit
def dequantise(x, computed_scale, static_scale, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Elements of FORMAT, in the low bits of units, times their scales, as float32; a scale of None is 1."""
    x = widen(decode(x, FORMAT, HARDWARE))
    if computed_scale is not None:
        x = x * computed_scale
    if static_scale is not None:
        x = x * static_scale
    return x


# PTX that turns one element of each of two 16-bit words, which share the register $1, into two float16 in $0.
_TEMPLATE = "{{ .reg .b32 r, s; .reg .b16 t; {} }}"

# prmt gathers the two bytes, cvt converts both.
_PTX_E4M3 = tl.constexpr(
    [
        _TEMPLATE.format(f"prmt.b32 r, $1, 0, {bytes}; cvt.u16.u32 t, r; cvt.rn.f16x2.e4m3x2 $0, t;")
        for bytes in ("0x4420", "0x4431")
    ]
)
# In float16, 0x6400 + n is the number 1024 + n, for n below 1024. xor turns a byte's element e, from -128 to 127, into
# n = 128 + e; prmt puts it below 0x64; sub takes away 0x6480, 1024 + 128.
_PTX_INT8 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"xor.b32 r, $1, 0x80808080; mov.b32 s, 0x64646464; prmt.b32 r, r, s, {bytes}; "
            "mov.b32 s, 0x64806480; sub.f16x2 $0, r, s;"
        )
        for bytes in ("0x4240", "0x4341")
    ]
)
# Four bits with the upper one flipped are n = 8 + e. lop3 computes (r & 0x000F) ^ 0x6408, which is 0x6400 + n; sub
# takes away 1024 + 8.
_PTX_INT4 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"shr.u32 r, $1, {4 * element}; lop3.b32 r, r, 0x000F000F, 0x64086408, 0x6A; "
            "mov.b32 s, 0x64086408; sub.f16x2 $0, r, s;"
        )
        for element in range(4)
    ]
)
# The three bits of e2m1's magnitude become the two lowest of float16's exponent and the highest of its mantissa; the
# fourth becomes the sign. The exponent is then 14 too small: mul multiplies by 0x7400, which is 2^14.
_PTX_E2M1 = tl.constexpr(
    [
        _TEMPLATE.format(
            f"shr.u32 r, $1, {4 * element}; and.b32 s, r, 0x00080008; and.b32 r, r, 0x00070007; shl.b32 r, r, 9; "
            "shl.b32 s, s, 12; or.b32 r, r, s; mov.b32 s, 0x74007400; mul.f16x2 $0, r, s;"
        )
        for element in range(4)
    ]
)


@triton.jit
def _convert_pairs(words, PTX_OF_ELEMENTS: tl.constexpr, ELEMENT: tl.constexpr):
    """One element of 16-bit words as float16, two words at a time."""
    PTX: tl.constexpr = PTX_OF_ELEMENTS[ELEMENT]
    return tl.inline_asm_elementwise(PTX, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def decode_element(words, ELEMENT: tl.constexpr, ELEMENTS: tl.constexpr, FORMAT: tl.constexpr, COMPUTE: tl.constexpr,
                   HARDWARE: tl.constexpr):  # fmt: skip
    """One of the ELEMENTS of each word, as floats of COMPUTE, which has all numbers of FORMAT.

    A word is one element, a byte of two, or 16 bits of two or four. HARDWARE: whether the target has the instructions
    that FORMAT wants.
    """
    PAIRS: tl.constexpr = HARDWARE and COMPUTE.mantissa_bits == 10 and ELEMENTS * FORMAT.bits == 16
    if ELEMENTS == 1:
        x = narrow(decode(words, FORMAT, HARDWARE), COMPUTE)
    elif FORMAT.mantissa_bits == 2 and not FORMAT.unsigned_zero:  # e5m2 is the upper half of float16
        if ELEMENT == 0:
            words = words << 8
        else:
            words = words & 0xFF00
        x = narrow(words.to(tl.float16, bitcast=True), COMPUTE)
    elif PAIRS and FORMAT.bits == 8 and FORMAT.integer:
        x = _convert_pairs(words, _PTX_INT8, ELEMENT)
    elif PAIRS and FORMAT.bits == 8 and not FORMAT.unsigned_zero:
        x = _convert_pairs(words, _PTX_E4M3, ELEMENT)
    elif PAIRS and FORMAT.integer:
        x = _convert_pairs(words, _PTX_INT4, ELEMENT)
    elif PAIRS and FORMAT.bits == 4:
        x = _convert_pairs(words, _PTX_E2M1, ELEMENT)
    else:
        if ELEMENT > 0:
            words = words >> (ELEMENT * FORMAT.bits)
        x = narrow(decode(words.to(tl.uint8), FORMAT, HARDWARE), COMPUTE)
    return x


@triton.jit
def _e4m3(x):
    """Float32 of e4m3 bytes with integer arithmetic: the same fields in float16 are numbers 2^8 times smaller."""
    magnitude = x & 0x7F
    half = (magnitude.to(tl.uint16) << 7) | ((x & 0x80).to(tl.uint16) << 8)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _fnuz(x, FORMAT: tl.constexpr):
    """Float32 of fnuz bytes: the same fields in float32 are numbers 2^(127 - bias) times smaller."""
    bits = ((x & 0x7F).to(tl.uint32) << (23 - FORMAT.mantissa_bits)) | ((x & 0x80).to(tl.uint32) << 24)
    FACTOR: tl.constexpr = (127 + (127 - FORMAT.bias)) << 23  # the bits of 2^(127 - bias)
    factor = tl.full(x.shape, FACTOR, tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(x == 0x80, float("nan"), bits.to(tl.float32, bitcast=True) * factor)

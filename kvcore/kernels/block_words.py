"""Blocks of a cache as words: integers, the widest that arrays' shapes and addresses allow.

R is kvcore.plan.blocks.BlockRows of one array.
"""

import triton
import triton.language as tl


@triton.jit
def word_offsets(index, R: tl.constexpr):
    """Where words of a block are, relative to the block's first."""
    AXES: tl.constexpr = len(R.sizes)
    offset = index
    if AXES > 0:
        offset, rest = index % R.run, index // R.run
        for axis in tl.static_range(AXES):
            offset += rest % R.sizes[axis] * R.strides[axis]
            rest = rest // R.sizes[axis]
    return offset


@triton.jit
def as_words(array_ptr, batch, R: tl.constexpr):
    """The array as words of integers."""
    if R.word == 8:
        words = array_ptr.to(tl.pointer_type(tl.int64))
    elif R.word == 4:
        words = array_ptr.to(tl.pointer_type(tl.int32))
    elif R.word == 2:
        words = array_ptr.to(tl.pointer_type(tl.int16))
    else:
        words = array_ptr.to(tl.pointer_type(tl.int8))
    return words + batch.to(tl.int64) * R.batch_stride

"""What `slot_mapping` gives, as plain loops."""

import numpy as np

_MOST = 2**31 - 1


def slot_mapping(
    block_tables: np.ndarray,
    query_start_loc: np.ndarray | None,
    seq_lens: np.ndarray,
    block_size: int,
    num_tokens: int | None = None,
) -> np.ndarray:
    """The slot of each new token, `[num_tokens]` of int32; -1 for one that has none."""
    num_seqs, max_blocks = block_tables.shape
    starts = list(range(num_seqs + 1)) if query_start_loc is None else query_start_loc.tolist()
    count = max(0, *starts) if num_tokens is None else num_tokens
    slots = np.full(count, -1, np.int32)
    begin = 0
    for seq in range(num_seqs):
        begin, end = max(begin, starts[seq]), starts[seq + 1]
        length = min(int(seq_lens[seq]), _MOST)
        for token in range(begin, min(end, count)):
            position = length - (min(end, _MOST) - token)
            if 0 <= position < max_blocks * block_size:
                block = int(block_tables[seq, position // block_size])
                slot = block * block_size + position % block_size
                if 0 <= slot <= _MOST:
                    slots[token] = slot
    return slots

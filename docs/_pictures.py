"""Makes the pictures of concepts.md, in docs/pictures: `python docs/_pictures.py`. A test compares them.

What they show is computed: elements by `CacheLayout.draw`, slots by the oracle, weights by NumPy.
"""

from pathlib import Path

import numpy as np

from kvcore.formats import FLOATS, KV_CACHE_DTYPES
from kvcore.layout import CacheLayout
from kvcore.oracle.slots import slot_mapping
from kvcore.pattern import CONSTANTS
from kvcore.svg import MARGIN, Canvas

FOLDER = Path(__file__).parent / "pictures"

CELL, ROW = 16, 20
"""Width and height of a token's cell, in px."""


def layouts() -> dict[str, str]:
    """Each layout with a name, and the default one of vLLM, with the token of slot 2."""
    sizes = {
        "PACKED_NHD": {"head_size_v": 2},
        "PACKED_HND": {"head_size_v": 2},
        "MLA": {"head_size": 6, "head_size_v": 4},
    }
    pictures = {name: CacheLayout.of(name).draw(slot=2, **sizes.get(name, {})) for name in CONSTANTS}
    pictures["vllm-lbhnc"] = CacheLayout.from_vllm("LBHNC").draw(head_size=2, slot=2)
    return {f"layout-{name.lower().replace('_', '-')}": picture.svg for name, picture in pictures.items()}


def pool(canvas: Canvas, y: float, num_blocks: int, block_size: int, holds: dict[int, tuple[str, str]]) -> list[float]:
    """The blocks of a cache, and a kind and a label of each slot that holds something; returns the blocks' middles."""
    width, gap, middles = 16, 8, []
    for block in range(num_blocks):
        x = MARGIN + block * (block_size * width + gap)
        middles.append(x + block_size * width / 2)
        slots = range(block * block_size, (block + 1) * block_size)
        canvas.text(middles[-1], y - 6, f"block {block}", "muted", "middle")
        canvas.text(middles[-1], y + 34, f"{slots[0]}–{slots[-1]}", "muted", "middle")
        for place, slot in enumerate(slots):
            kind, label = holds.get(slot, ("none", ""))
            on = "on" if kind.endswith("-on") else ""
            canvas.box(x + place * width, y, width, ROW, kind, label=label, ink=on)
    return middles


def page() -> str:
    """Tokens, their slots, and padding."""
    slots, block_size, num_blocks = [6, 7, 12, -1], 4, 6
    canvas = Canvas("Slot mapping", f"slot_mapping = {slots}, block_size = {block_size}: token 3 is padding")
    x = 150
    for token, slot in enumerate(slots):
        canvas.box(
            x + token * 40, 16, 40, ROW, "none dashed" if slot < 0 else "k-on", label=str(token), ink="on" * (slot >= 0)
        )
        canvas.box(x + token * 40, 42, 40, ROW, "none dashed" if slot < 0 else "band", label=str(slot))
    canvas.text(x - 8, 30, "token of key", "muted", "end")
    canvas.text(x - 8, 56, "slot_mapping", "muted", "end")
    canvas.text(x + 164, 56, "skipped", "muted")
    holds = {slot: ("k-on", str(token)) for token, slot in enumerate(slots)}
    middles = pool(canvas, 120, num_blocks, block_size, holds)
    for token, slot in enumerate(slots):
        if slot >= 0:
            at = middles[slot // block_size] + (slot % block_size - block_size / 2 + 0.5) * 16
            canvas.arrow((x + token * 40 + 20, 64), (at, 101))
    canvas.text(MARGIN, 188, "slot 6 = 1 · 4 + 2: place 2 of block 1  (block_size = 4)")
    return canvas.svg()


def page_table() -> str:
    """Two sequences, their block tables, and the blocks of the cache that they hold."""
    tables, lengths, block_size, num_blocks = [[5, 2, 3], [4, 0, -1]], [10, 6], 4, 6
    canvas = Canvas("Block tables", f"block_tables = {tables}, seq_lens = {lengths}, block_size = {block_size}")
    holds, entries, x = {}, [], 12 + 100
    for seq, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        kind = "ab"[seq]
        starts = np.array([0, length])  # as if all were new: the slot of every position
        slots = slot_mapping(np.array([table]), starts, np.array([length]), block_size)
        canvas.text(x, 26, f"sequence {seq}, seq_lens[{seq}] = {length}", "bold")
        for position, slot in enumerate(slots.tolist()):
            last = position == length - 1
            canvas.box(x + position * CELL, 38, CELL, ROW, kind + "-on" * last, label=str(position), ink="on" * last)
            holds[slot] = (kind + "-on" * last, str(position))
        for column, block in enumerate(table):
            at = x + column * block_size * CELL
            canvas.box(at, 72, block_size * CELL, ROW, "none dashed" if block < 0 else kind, label=str(block))
            entries += [(at + block_size * CELL / 2, block)] * (block >= 0)
        x += len(table) * block_size * CELL + 36
    canvas.text(104, 52, "position", "muted", "end")
    canvas.text(104, 86, "block_tables", "muted", "end")
    middles = pool(canvas, 162, num_blocks, block_size, holds)
    for at, block in entries:
        canvas.arrow((at, 94), (middles[block], 143))
    position, (table, *_) = lengths[0] - 1, tables
    block, place = table[position // block_size], position % block_size
    canvas.text(
        MARGIN, 236,
        f"Position {position} of sequence 0: block_tables[0, {position} // {block_size}] = {block}, "
        f"slot {block} · {block_size} + {place} = {block * block_size + place}.",
    )  # fmt: skip
    return canvas.svg()


def ragged_batch() -> str:
    """One call for a chunk of a prompt, two sequences that decode, and padding."""
    tables, block_size, num_tokens = np.array([[1, 4, 2], [3, 5, -1], [0, -1, -1]]), 4, 10
    starts, lengths = np.array([0, 5, 6, 7]), np.array([9, 6, 3])
    slots = slot_mapping(tables, starts, lengths, block_size, num_tokens).tolist()
    canvas = Canvas(
        "A ragged batch",
        f"query_start_loc = {starts.tolist()}, seq_lens = {lengths.tolist()}, slot_mapping = {slots}",
    )
    left, y, kinds = 192, 12.0, "abc"
    roles = ["prompt chunk", "decode", "decode"]
    rows = {}
    for seq, (length, role) in enumerate(zip(lengths.tolist(), roles, strict=True)):
        first = length - int(starts[seq + 1] - starts[seq])
        canvas.text(left - 8, y + 14, f"sequence {seq}, {role}", anchor="end")
        for position in range(length):
            new = position >= first
            canvas.box(left + position * 28, y, 28, ROW, kinds[seq] + "-on" * new, label=str(position), ink="on" * new)
            if new:
                rows[int(starts[seq]) + position - first] = (seq, position)
        canvas.text(left + length * 28 + 8, y + 14, f"seq_lens[{seq}] = {length}", "muted")
        y += 28
    canvas.text(left, y + 10, "strong colours: new tokens, of this call", "muted")
    y += 44
    canvas.text(left - 8, y - 4, "query_start_loc", "muted", "end")
    for start in starts.tolist():
        canvas.text(left + start * 28 + 3, y - 4, str(start), "bold")
    for name in ("query, key, value", "position", "slot_mapping"):
        canvas.text(left - 8, y + 14, name, "muted", "end")
        for token in range(num_tokens):
            seq, position = rows.get(token, (None, "–"))
            label = {"query, key, value": token, "position": position, "slot_mapping": slots[token]}[name]
            main = name == "query, key, value" and seq is not None
            kind = "none dashed" if seq is None else kinds[seq] + "-on" * main
            canvas.box(left + token * 28, y, 28, ROW, kind, label=str(label), ink="on" * main)
        y += ROW + 4
    canvas.text(left + 7 * 28 + 4, y + 12, "padding", "muted")
    return canvas.svg()


def split_and_merge() -> str:
    """Parts of a long context, a result and a log-sum-exp of each, and how they are merged."""
    lses = np.array([1.2, 3.1, 2.4])
    lse = np.log(np.exp(lses).sum())
    canvas = Canvas("Split and merge", f"Three parts with log-sum-exps {lses.tolist()}, merged: {lse:.2f}")
    left, wide = 12 + 80, 156
    canvas.text(left - 8, 34, "positions", "muted", "end")
    canvas.text(left - 8, 92, "attention", "muted", "end")
    canvas.text(left - 8, 150, "weight", "muted", "end")
    canvas.text(left - 8, 204, "merged", "muted", "end")
    for part, kind in enumerate("abc"):
        x = left + part * wide
        for i in range(4):
            label = str(part * 4 + i)
            canvas.box(x + i * wide / 4, 20, wide / 4, ROW, kind, label=label)
        canvas.arrow((x + wide / 2, 42), (x + wide / 2, 74))
        canvas.box(x + 8, 78, wide - 16, ROW, kind, label=f"out{part}, lse{part} = {lses[part]}")
        canvas.arrow((x + wide / 2, 100), (x + wide / 2, 132))
        weight = np.exp(lses[part] - lse)
        canvas.box(x + 8, 136, wide - 16, ROW, kind + "-on", label=f"w{part} = {weight:.2f}", ink="on")
        canvas.arrow((x + wide / 2, 158), (left + wide * (1.5 + 0.5 * (part - 1)), 187))
    canvas.box(left + 8, 190, 3 * wide - 16, ROW, "band", label=f"out = w0·out0 + w1·out1 + w2·out2,  lse = {lse:.2f}")
    canvas.text(left + 8, 232, "weight of a part: exp(its lse − lse)")
    canvas.text(left + 8, 250, "lse = log(exp(lse0) + exp(lse1) + exp(lse2))")
    return canvas.svg()


def formats() -> str:
    """The bytes of one head of 16 elements in some formats, drawn to scale."""
    head, left, byte = 16, 164, 13
    canvas = Canvas("A head of 16 elements", "Its bytes in bfloat16, fp8 or int8, int4 and nvfp4, with their scales")
    rows = [
        ("bfloat16", "bfloat16", 0),
        ("fp8, int8", "int8", 0),
        ("int8 per_token_head", "int8", 4),
        ("int4", "int4", 0),
    ]
    y = 20
    for title, name, scales in [*rows, ("nvfp4", "nvfp4", 1)]:
        stored = KV_CACHE_DTYPES.get(name) or FLOATS[name]
        width = byte * stored.bits / 8
        canvas.text(left - 8, y + 14, title, anchor="end")
        for i in range(head):
            canvas.box(left + i * width, y, width, ROW, "k", label=str(i) if width > byte else "")
        x = left + head * width
        if scales:
            canvas.box(x, y, scales * byte, ROW, "k-on", label="scale" if scales > 1 else "s", ink="on")
        nbytes = head * stored.bits // 8
        canvas.text(
            x + scales * byte + 8, y + 14, f"{nbytes} + {scales} bytes" if scales else f"{nbytes} bytes", "muted"
        )
        y += 28
    return canvas.svg()


def pictures() -> dict[str, str]:
    """All pictures, by the names of their files."""
    made = {"slot-mapping": page(), "block-tables": page_table(), "ragged-batch": ragged_batch()}
    made |= {"split-and-merge": split_and_merge(), "formats": formats(), **layouts()}
    return {f"{name}.svg": svg for name, svg in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg)

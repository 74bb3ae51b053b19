"""Calls of torch.ops.torchkv, which takes all arguments by place."""

import torch

import torchkv  # noqa: F401, defines the ops


def positional(op, **named):
    """The op's arguments in its schema's order: what is named, and the default or None for the others."""
    values = [named.pop(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments]
    assert not named, f"{op} has no {', '.join(named)}"
    return tuple(values)


def attention_arguments(query, caches, block_tables, seq_lens, **named):
    """Arguments of `paged_attention`; causal, over a cache that is not quantised, unless they say otherwise."""

    given = {"causal": True, "kv_cache_dtype": "auto"} | named
    return positional(
        torch.ops.torchkv.paged_attention.default, query=query, caches=list(caches), block_tables=block_tables,
        seq_lens=seq_lens, **given,
    )  # fmt: skip


def gather_arguments(caches, block_tables, seq_lens, max_len, **named):
    """Arguments of `gather_kv`; from a cache that is not quantised, unless they say otherwise."""

    given = {"kv_cache_dtype": "auto"} | named
    return positional(
        torch.ops.torchkv.gather_kv.default, caches=list(caches), block_tables=block_tables, seq_lens=seq_lens,
        max_len=max_len, **given,
    )  # fmt: skip

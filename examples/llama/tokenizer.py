"""The tokenizer that a GGUF file describes, built from the file's own vocabulary and merges."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
"""Values of `tokenizer.ggml.token_type` that need attention."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, _LLAMA3),
    "llama3": (False, _LLAMA3),
    "llama-v3": (False, _LLAMA3),
}
"""`tokenizer.ggml.pre` → whether every digit stands alone first, and the expression that cuts text into words
(None: GPT-2's)."""


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer.

    Args:
        meta: The file's metadata, by key.

    Returns:
        A tokenizer whose `encode` adds the begin-of-text token where the file asks for it, and takes control
        tokens such as `<|im_end|>` in the text for what they are.

    Raises:
        ValueError: a kind of tokenizer that is not built here.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(meta)
    elif kind == "llama":
        tokenizer = _sentencepiece(meta)
    else:
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2' or 'llama', got {kind!r}")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED]
    )
    # SentencePiece files without the key want the token; that is llama.cpp's default too.
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        begin = meta["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
        )
    return tokenizer


def _byte_level(meta: dict[str, Any]) -> Tokenizer:
    """GPT-2's kind: bytes spelled as printable characters, merged within words."""
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(map(repr, SPLITS))}, got {pre!r}")
    digits_alone, words = SPLITS[pre]
    vocabulary = {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=words is not None))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: dict[str, Any]) -> Tokenizer:
    """Llama 1's and 2's kind: spaces spelled `▁`, merges ranked by the score of what they make."""
    tokens, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    prefix = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer

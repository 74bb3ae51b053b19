"""The tokenizer that a GGUF file describes, built from the file's own vocabulary and merges."""

from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` that need attention."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """How text is cut before merges are looked for, by `tokenizer.ggml.pre`."""

    digits_alone: bool = False  # each digit is a word of its own, whatever stands before it
    words: str | None = None  # a regular expression; None: GPT-2's
    llama3: bool = False  # a word in the vocabulary needs no merges, and text starts with a token of its own


SPLITTINGS = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "smollm": Splitting(digits_alone=True),
    "llama-bpe": Splitting(words=_LLAMA3, llama3=True),
    "llama3": Splitting(words=_LLAMA3, llama3=True),
    "llama-v3": Splitting(words=_LLAMA3, llama3=True),
}


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
    # Without the key, the tokenizers of Llama 1, 2 and 3 want the token: llama.cpp's defaults.
    llama3 = kind == "gpt2" and SPLITTINGS[_pre(meta)].llama3
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or llama3):
        begin = meta["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
        )
    return tokenizer


def _pre(meta: dict[str, Any]) -> str:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITTINGS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(map(repr, SPLITTINGS))}, got {pre!r}")
    return pre


def _byte_level(meta: dict[str, Any]) -> Tokenizer:
    """GPT-2's kind: bytes spelled as printable characters, merged within words."""
    splitting = SPLITTINGS[_pre(meta)]
    vocabulary = {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting.llama3))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.words is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.words is None))
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

"""Tokenizers of other Llamas."""

from examples.llama.text import TextStream
from examples.llama.tokenizer import build_tokenizer
from tests.cases.examples import _byte_alphabet


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁helo",
        "he",
        "ll",
        "hell",
        "▁hello",
    ]
    pieces += ["hello"]
    scores = [0.0] * (len(pieces) - 5) + [-1.0, -2.0, -3.0, -5.0, -4.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = build_tokenizer(meta)
    assert tokenizer.encode("hello hell").tokens == ["<s>", "▁hello", "▁", "hell"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for text in ("hello hell", "é", " hello"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_llama3_groups_digits_by_three_and_starts_with_its_token():
    tokens = [*sorted(_byte_alphabet()), "<|begin|>"]
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
    }
    tokenizer = build_tokenizer(meta)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 12345678")]
    assert words == ["ab", "Ġ", "123", "456", "78"]
    assert tokenizer.encode("a").tokens == ["<|begin|>", "a"]


def test_text_stream_holds_back_half_characters(smollm):
    prompt, answer = smollm.tokenizer.encode("Hi").ids, smollm.tokenizer.encode(" 🙂 漢!").ids
    stream = TextStream(smollm.tokenizer, prompt)
    pieces = [stream.more(answer[:count]) for count in range(len(answer) + 1)]
    assert "".join(pieces) == " 🙂 漢!"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    stream = TextStream(smollm.tokenizer, prompt)
    assert stream.more(smollm.tokenizer.encode(" \N{CUNEIFORM SIGN A}").ids[:-1]).strip() == ""
    assert stream.rest().endswith("\N{REPLACEMENT CHARACTER}")

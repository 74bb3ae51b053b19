"""Token ids as text, piece by piece."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer shows for a character of which only some bytes are there."""


class TextStream:
    """Turns a growing answer into the pieces of text that it adds.

    An answer is decoded together with its prompt, because a token's text may depend on the one before it, and
    a character that is not complete yet is held back.

    Args:
        tokenizer: The model's.
        prompt: Token ids of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._prompt_length = len(self._ids)
        self._shown = len(tokenizer.decode(self._ids))
        self._text = ""

    def more(self, answer: Sequence[int]) -> str:
        """What `answer`, all new token ids so far, adds to what was returned before."""
        self._ids[self._prompt_length :] = answer
        self._text = self._tokenizer.decode(self._ids)
        return self._take(len(self._text.rstrip(_HALF)))

    def rest(self) -> str:
        """What was held back, when no more is to come."""
        return self._take(len(self._text))

    def _take(self, stop: int) -> str:
        piece = self._text[self._shown : stop]
        self._shown = max(self._shown, stop)
        return piece

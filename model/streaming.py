"""Text from tokens as they come: no character cut in half, nothing beyond a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.tokenizer import Tokenizer

_CONTEXT = 6  # ids before the new ones, which decide how those are written: with a leading space or without
_MAX_BYTES = 4  # of a character in UTF-8, and so the ids it may take
_REPLACEMENT = "\ufffd"


def check_stop(stop: Sequence[str]) -> None:
    """Raise ValueError for an empty stop string."""
    if "" in stop:
        raise InputError("stop: an empty string would end every text at once")


class TextStream:
    """Decodes one row, id by id: the pieces that `add` and `end` return make up its text.

    It ends at end-of-text or before the first of the stop strings; what may begin one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False
        self._pending: list[int] = []  # ids whose text is not complete yet
        self._told = 0  # characters of their text that are
        self._held = ""  # text that may begin a stop string
        self._set_context(list(prompt))

    def add(self, token: int) -> str:
        """The text that is certain by now; `ended` turns true with the token that ends it."""
        if self.ended:
            return ""
        if token in self.tokenizer.end_ids:
            return self.end()
        if token < self.tokenizer.vocab_size:  # another tool's folder may pad its vocabulary: no text
            self._pending.append(token)
            self._held += self._decode()
        stop = self._first_stop()
        if stop >= 0:
            self.ended = True
            return self._held[:stop]
        keep = self._may_begin_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def end(self) -> str:
        """What was held back."""
        if self.ended:
            return ""
        self.ended = True
        self._held += self._text()[self._told :]
        stop = self._first_stop()
        return self._held if stop < 0 else self._held[:stop]

    def _set_context(self, ids: list[int]) -> None:
        """Keep the last ids, from a character's start: byte fallback decodes nothing after part of one."""
        for n in range(_CONTEXT, _CONTEXT + _MAX_BYTES):
            self._context = ids[-n:]
            self._context_text = self.tokenizer.decode(self._context)
            if not self._context_text.startswith(_REPLACEMENT):
                return

    def _text(self) -> str:
        text = self.tokenizer.decode(self._context + self._pending)
        return text[len(self._context_text) :]

    def _decode(self) -> str:
        text = self._text()
        whole = text.rstrip(_REPLACEMENT)  # the end may be a character's first bytes, each written as one
        new = whole[self._told :]
        self._told += len(new)
        if whole == text:
            self._set_context(self._context + self._pending)
            self._pending, self._told = [], 0
        return new

    def _first_stop(self) -> int:
        found = [place for stop in self.stop if (place := self._held.find(stop)) >= 0]
        return min(found, default=-1)

    def _may_begin_stop(self) -> int:
        """How many of the last characters held begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)

"""Whether a text is well formed: whether the templates could have written it, word for word.

So a recipe that passes lists what its title promises in amounts that fit, and its steps use exactly that; a
poem keeps its image; an answer belongs to its question; nothing is repeated, cut off or misspelt.
"""

from __future__ import annotations

from fusedgpt.train.data.synthetic.grammar import steered_grammar
from fusedgpt.train.data.synthetic.parts import Furthest, Reader, State

_BEFORE, _FOUND = 30, 20  # characters that a fault shows


class Checker:
    """Reads texts by the templates of a prompt."""

    def __init__(self, prompt: str, *, domain: str | None = None) -> None:
        self._root = steered_grammar(prompt, domain)

    def fault(self, text: str) -> str | None:
        """What is wrong with the text, at the first place where no reading can go on; None if nothing is."""
        reader = Reader(text)
        ends = self._root.read(reader, {State(end=0)})
        if any(state.end == len(text) for state in ends):
            return None
        furthest = reader.furthest
        end = max((state.end for state in ends), default=-1)
        if end >= furthest.end:
            return f"after {_end(text, end)!r} the text should end, but {_start(text[end:])!r} follows"
        return _describe(text, furthest)

    def share(self, texts: list[str]) -> float:
        """The share of well-formed texts."""
        return sum(self.fault(text) is None for text in texts) / max(len(texts), 1)


def _describe(text: str, furthest: Furthest) -> str:
    wanted = sorted(furthest.expected, key=lambda one: (len(one), one))[:3]
    expected = " or ".join(repr(_start(one)) for one in wanted)
    if len(furthest.expected) > len(wanted):
        expected += " or others"
    place = f"after {_end(text, furthest.end)!r}" if furthest.end else "at the start"
    if furthest.end >= len(text):
        return f"{place} the text is cut off: {expected} is missing"
    return f"{place} there is {_start(text[furthest.end :])!r} instead of {expected}"


def _end(text: str, end: int) -> str:
    return text[max(0, end - _BEFORE) : end]


def _start(text: str) -> str:
    return text[:_FOUND]

"""What texts are to be made for, and where progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fusedgpt.model.tokenizer import gpt2_tokenizer

Progress = Callable[[int, int], None]  # done, total
Bar = Callable[[str], AbstractContextManager[Progress]]


def no_bar(title: str) -> AbstractContextManager[Progress]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the texts are for; `seed` varies them. `note` gets messages for the user, `bar` shows progress."""

    prompt: str
    domain: str
    seed: int = 0
    note: Callable[[str], object] = lambda message: None
    bar: Bar = no_bar


def count_gpt2_tokens(texts: Sequence[str]) -> list[int]:
    """The number of GPT-2 tokens of each text, whatever tokenizer the model uses."""
    return [len(ids) for ids in gpt2_tokenizer().encode_batch(texts)]

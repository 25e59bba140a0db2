"""A tokenizer trained on text of any shape: in bounded time, with progress, and Ctrl-C ends it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fusedgpt.train.data.text import tokenizer_training
from fusedgpt.train.data.text.sources import DataError, Piece
from fusedgpt.train.data.text.tokenizer_training import train_tokenizer

WORDS = "the cat sat on the mat, and the rain fell on the hat of the cat. It's 3 o'clock! 料理 "


def letters(n: int) -> str:
    return "".join(random.Random(0).choices("ACGT", k=n))


@pytest.mark.parametrize("text", [letters(400_000), " " * 400_000 + "x", "ab" * 200_000])
def test_text_without_spaces_takes_no_time(text: str) -> None:
    """One word of 400,000 letters took a minute."""
    started = time.perf_counter()
    tokenizer = train_tokenizer([Piece(text, True)], 300)
    assert time.perf_counter() - started < 15
    assert tokenizer.decode(tokenizer.encode(text[-1000:])) == text[-1000:]
    assert len(tokenizer.encode(text[-1000:])) < 500


def test_words_of_an_ordinary_length_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = train_tokenizer([Piece(WORDS * 50 + "x" * 255, True)], 320)
    monkeypatch.setattr(tokenizer_training, "_LONG_WORD", r"\A\z.")
    assert train_tokenizer([Piece(WORDS * 50 + "x" * 255, True)], 320).definition() == bounded.definition()
    assert bounded.safe_cut == "words"


def test_it_tells_of_the_merging_once_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def in_this_thread(work: Callable[[], object], waiting: Callable[[], object]) -> None:
        waiting()
        assert told == []
        work()
        waiting()

    monkeypatch.setattr(tokenizer_training, "_in_thread", in_this_thread)
    train_tokenizer([Piece(WORDS, True)], 300, told.append)
    assert told == ["merging pairs"]


def test_an_interrupt_ends_it() -> None:
    """Ctrl-C while the library, which does not look for signals, is at work."""
    began, ended = threading.Event(), threading.Event()

    def pieces() -> Iterator[Piece]:
        began.set()
        try:
            while True:
                yield Piece(WORDS, True)
        finally:
            ended.set()

    def interrupt() -> None:
        began.wait()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(pieces(), 300)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.wait(30)


def test_errors_of_the_text_are_raised() -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece(WORDS, True)
        raise DataError("a.txt is damaged")

    with pytest.raises(DataError, match=r"a.txt is damaged"):
        train_tokenizer(pieces(), 300)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([], 300)

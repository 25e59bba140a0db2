"""The tokenizer of `create`: its size follows the amount of text."""

import pytest

from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.text import tokenizer_training
from fusedgpt.train.data.text.tokenizer_training import fitting_tokenizer


def texts_of(prompt: str, n: int) -> list[str]:
    return [text for text, _ in zip(generate_samples(prompt), range(n), strict=False)]


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)


@pytest.mark.parametrize(
    ("n_bytes", "size"),
    [(60_000, 512), (700_000, 1024), (1_700_000, 2048), (5_500_000, 8192), (40_000_000, 50_257)],
)
def test_the_size_follows_the_text(n_bytes: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tokenizer_training, "train_tokenizer", lambda pieces, size: asked.append(size))
    found = fitting_tokenizer(["x" * 1000] * (n_bytes // 1000))
    assert (asked or [found.vocab_size]) == [size]


@pytest.mark.parametrize(("prompt", "least"), [("recipes", 3.0), ("料理のレシピ", 4.0), ("詩を書くGPT", 2.5)])
def test_its_tokens_are_long_and_its_text_comes_back(
    prompt: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_training, "_BYTES_PER_ID", 200)  # as many ids as for all texts of create
    texts = texts_of(prompt, 800)
    tokenizer = fitting_tokenizer(texts)
    fresh = texts_of(prompt, 900)[800:]
    assert bytes_per_token(tokenizer, fresh) > least
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*fresh[:20], "🎉 é \n"])
    assert fitting_tokenizer(texts).definition() == tokenizer.definition()


def test_one_short_text_is_enough() -> None:
    assert fitting_tokenizer(["Hello."]).encode("Hello.")

"""The report of `create`: bits per byte of unseen text, the share of well-formed samples."""

from itertools import islice
from typing import Any

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import byte_tokenizer
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.synthetic.task import Task
from fusedgpt.train.tools import quality

TASK = Task(prompt="詩を書くGPT", domain="poetry")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GPT:
    monkeypatch.setattr(quality, "_SAMPLED", 9)
    monkeypatch.setattr(quality, "_FRESH", 20)
    config = GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16)
    return GPT(config, seed=0)


def test_an_untrained_model_is_judged_as_one(model: GPT) -> None:
    found = quality.judge(model, byte_tokenizer(), TASK, [])
    assert found.bits_per_byte == pytest.approx(8, abs=0.3)
    assert (found.well_formed, found.sampled, len(found.samples), len(found.faults)) == (0, 9, 8, 8)
    assert all(" is missing" in fault or " instead of " in fault for fault in found.faults)


def test_the_share_counts_texts_that_the_checker_passes(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(islice(generate_samples(TASK.prompt), 4))
    monkeypatch.setattr(quality, "sample_texts", lambda *_, **__: [*texts[:3], texts[3][:-3]])
    found = quality.judge(model, byte_tokenizer(), TASK, texts)
    assert (found.well_formed, len(found.faults)) == (0.75, 1)
    assert found.copied == 0.75
    assert quality.judge(model, byte_tokenizer(), TASK, texts[1:]).copied == 0.5


def test_unseen_text_is_unseen(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []

    def spy(model: GPT, tokenizer: Any, pieces: list[Any]) -> Any:
        scored.extend(piece.text for piece in pieces)
        return evaluate(model, tokenizer, pieces)

    evaluate = quality.evaluate_text
    monkeypatch.setattr(quality, "evaluate_text", spy)
    monkeypatch.setattr(quality, "sample_texts", lambda *_, **__: [""])
    quality.judge(model, byte_tokenizer(), TASK, [])
    seen = set(scored[::2])
    scored.clear()
    quality.judge(model, byte_tokenizer(), TASK, list(seen))
    assert scored
    assert not seen & set(scored)

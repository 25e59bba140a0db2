"""Evaluation: equal to transformers, every token scored once, with the context that the stride promises."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fusedgpt.model.folder import load_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer, byte_tokenizer
from fusedgpt.train.data.text.sources import DataError, Piece, Source
from fusedgpt.train.data.tokens.shards import Part, TokenStream
from fusedgpt.train.tools import evaluate as evaluation
from fusedgpt.train.tools.evaluate import TextEvaluation, evaluate_text, evaluate_tokens

W = 16  # the window
TEXTS = [
    "The cat sat on the mat, and it rained on 料理 all day long: 😀",
    "a",
    "x" * W,
    "y" * (W + 1),
    "z" * (W - 1),
]


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=W, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def loaded(theirs: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Tokenizer]:
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    byte_tokenizer().save(folder, max_length=W)
    return load_folder(folder)


def documents(texts: list[str]) -> Iterator[Piece]:
    return (Piece(text, True) for text in texts)


@torch.no_grad()
def by_transformers(theirs: GPT2LMHeadModel, texts: list[str], stride: int) -> tuple[float, int]:
    """(mean loss, tokens) by the recipe of transformers' documentation, each token weighed the same."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[256, *text.encode()]])
        begin, previous_end = 0, 1
        while previous_end < ids.shape[1]:
            end = min(begin + W + 1, ids.shape[1])  # W inputs, and the target of the last
            logits = theirs(ids[:, begin : end - 1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, begin + 1 : end], reduction="none")
            total += losses[previous_end - end :].double().sum().item()
            count += end - previous_end
            previous_end = end
            begin += stride
    return total / count, count


@pytest.mark.parametrize("stride", [1, 5, 8, W])
def test_it_equals_transformers(theirs: GPT2LMHeadModel, loaded: tuple[GPT, Tokenizer], stride: int) -> None:
    loss, count = by_transformers(theirs, TEXTS, stride)
    found = evaluate_text(*loaded, documents(TEXTS), stride=stride)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.tokens, found.bytes) == (count, count)  # a byte a token
    assert found.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert (found.documents, found.window, found.stride) == (5, W, stride)


def test_transformers_own_labels_give_the_same(
    theirs: GPT2LMHeadModel, loaded: tuple[GPT, Tokenizer]
) -> None:
    """One window without slides, through their own loss."""
    ids = torch.tensor([[256, *b"The cat sat on"]])
    found = evaluate_text(*loaded, documents(["The cat sat on"]))
    assert found.loss == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)


def test_more_context_changes_the_loss(loaded: tuple[GPT, Tokenizer]) -> None:
    """What the comparisons could not see if stride had no effect."""
    losses = {s: evaluate_text(*loaded, documents(TEXTS), stride=s).loss for s in (1, 8, 16)}
    assert len({round(loss, 5) for loss in losses.values()}) == 3


def test_pieces_of_a_document_are_one_document(loaded: tuple[GPT, Tokenizer]) -> None:
    text = TEXTS[0] * 5
    pieces = [Piece(text[i : i + 7], i + 7 >= len(text)) for i in range(0, len(text), 7)]
    one, many = (evaluate_text(*loaded, p) for p in (documents([text]), iter(pieces)))
    assert many.loss == pytest.approx(one.loss, rel=1e-7)
    assert (many.tokens, many.documents) == (one.tokens, 1)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_token_sets_give_what_their_text_gives(
    loaded: tuple[GPT, Tokenizer], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty document counts nothing; the last of a stream need not be ended."""
    monkeypatch.setattr(evaluation, "_CHUNK", chunk)
    ids = [[*text.encode(), 256] for text in (TEXTS[0], "", *TEXTS[1:])]
    halves = list(chain(*ids[:4])), list(chain(*ids[4:]))[:-1]
    streams = [TokenStream([Part(np.asarray(half, dtype=np.uint16))]) for half in halves]
    found = evaluate_tokens(*loaded, streams)
    expected = evaluate_text(*loaded, documents(TEXTS))
    assert found.loss == pytest.approx(expected.loss, rel=1e-7)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-7)
    assert (found.tokens, found.documents) == (expected.tokens, 5)


def test_the_window_may_be_shorter(loaded: tuple[GPT, Tokenizer]) -> None:
    found = evaluate_text(*loaded, documents(TEXTS), window=4)
    assert (found.window, found.stride) == (4, 2)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "there is no text to evaluate"),
        (["a"], {"stride": 0}, "--stride: expected 1 to the window of 16, got 0"),
        (["a"], {"stride": 17}, "--stride: expected 1 to the window of 16, got 17"),
        (["a"], {"window": 17}, "--window: expected 1 to the model's 16, got 17"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    loaded: tuple[GPT, Tokenizer], texts: list[str], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_text(*loaded, documents(texts), **settings)


def test_files_and_lines(loaded: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    source = Source(inputs=(tmp_path,), cut="anywhere")
    told: list[int] = []
    found: TextEvaluation = evaluate_text(*loaded, source, report=told.append)
    assert found.loss == pytest.approx(evaluate_text(*loaded, documents(TEXTS)).loss, rel=1e-7)
    assert told[-1] == found.tokens
    (tmp_path / "b.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl"):
        evaluate_text(*loaded, source)

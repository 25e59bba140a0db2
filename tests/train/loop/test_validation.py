"""Validation: weighed by tokens, capped, cancelled, compared."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from training_runs import counting

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import document_ids
from fusedgpt.train.loop.validation import Validation, ValidationState, capped, evaluate

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.5)


def test_evaluate_weighs_tokens_not_batches() -> None:
    model, dataset = GPT(CONFIG), counting()
    batches = list(dataset.val_batches(2))
    targets = torch.cat([t.flatten() for _, t in batches])
    losses = torch.cat([model.eval()(*batch, reduction="none") for batch in batches])
    expected = losses.sum() / (targets != -100).sum()
    model.train()
    result = evaluate(model, batches)
    assert result is not None
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.bits_per_byte is None
    assert model.training
    empty = evaluate(model, [])
    assert empty is not None
    assert math.isnan(empty.loss)


def test_bits_per_byte_counts_the_bytes_of_the_targets() -> None:
    """Ids stand for 0 to 60 bytes; end-of-text, the last id, costs bits and is no byte."""
    dataset = counting()
    lengths = torch.tensor([*range(60), 0])
    result = evaluate(GPT(CONFIG), dataset.val_batches(4), token_bytes=lengths)
    n_bytes = int(lengths[torch.from_numpy(dataset.val[1:].astype("int64"))].sum())
    assert result is not None
    assert result.bits_per_byte == pytest.approx(
        result.loss * (len(dataset.val) - 1) / n_bytes / math.log(2), rel=1e-9
    )


def test_validation_masks_documents_as_training_does() -> None:
    dataset = replace(counting(), eot_id=7, document_masks=True)
    model, config = GPT(CONFIG), TrainConfig(batch_size=2)
    result = Validation(dataset, config, 10, ValidationState()).run(model, 1, torch.float32)
    masked = evaluate(model, dataset.val_batches(2), document_ids=lambda x: document_ids(x, 7))
    plain = evaluate(model, dataset.val_batches(2))
    assert result is not None
    assert masked is not None
    assert plain is not None
    assert result.loss == pytest.approx(masked.loss, rel=1e-6)
    assert abs(masked.loss - plain.loss) > 1e-5


@pytest.mark.parametrize("n", [1, 16, 17, 50, 10**6])
def test_a_cap_counts_targets(n: int) -> None:
    dataset = counting()
    whole = torch.cat([y.flatten() for _, y in dataset.val_batches(2)])
    cut = [y.flatten() for _, y in capped(dataset.val_batches(2), n)]
    kept = torch.cat(cut)
    counted = kept[kept != -100]
    assert torch.equal(counted, whole[whole != -100][:n])
    assert len(cut) == -(-min(n, len(dataset.val) - 1) // 32)  # no batch more than it takes


def test_a_cancelled_evaluation_is_none() -> None:
    model = GPT(CONFIG).train()
    answers = iter([False, True])
    assert evaluate(model, counting().val_batches(1), cancelled=lambda: next(answers)) is None
    assert model.training


def following(losses: list[float], **changes: float) -> Validation:
    validation = Validation(counting(), TrainConfig(**changes), 100, ValidationState())
    for i, loss in enumerate(losses):
        validation._take_in(loss, 10 * (i + 1))
    return validation


@pytest.mark.parametrize(
    ("losses", "patience", "min_improvement", "stops"),
    [
        ([3.0, 2.0, 2.1, 2.2], 2, 0.0, True),
        ([3.0, 2.0, 2.1], 2, 0.0, False),
        ([3.0, 2.9, 2.8, 2.7], 2, 0.5, True),
        ([3.0, 2.0, math.nan, math.nan], 2, 0.0, True),
        ([3.0, 3.1, 2.0], 2, 0.0, False),
    ],
)
def test_patience(losses: list[float], patience: int, min_improvement: float, stops: bool) -> None:
    assert following(losses, patience=patience, min_improvement=min_improvement).out_of_patience == stops
    assert not following(losses).out_of_patience


def test_the_best_is_the_lowest_even_by_less_than_an_improvement() -> None:
    validation = following([3.0, 2.9, 2.95], patience=9, min_improvement=0.5)
    assert (validation.state.best_loss, validation.state.best_step) == (2.9, 20)
    assert not validation.improved
    assert following([3.0, 2.9]).improved


def test_it_is_due_once_at_its_interval_and_at_the_end() -> None:
    validation = Validation(counting(), TrainConfig(eval_every=40), 100, ValidationState())
    due = []
    for step in range(101):
        if validation.due(step):
            due.append(step)
            validation._take_in(1.0, step)
            assert not validation.due(step)
    assert due == [40, 80, 100]

"""The loop: equal to a plain PyTorch loop, deterministic, learning, and honest about failure."""

from __future__ import annotations

import copy
import gc
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from token_data import dataset_of

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.trainer import TrainingDiverged, train, train_model
from fusedgpt.train.loop.validation import evaluate
from fusedgpt.train.report.progress import Monitor, StepMetrics

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


@pytest.fixture
def counting() -> TokenDataset:
    """Documents that count upwards from anywhere: easy to learn."""
    rng = np.random.default_rng(0)
    documents = [[(int(start) + i) % 60 for i in range(24)] for start in rng.integers(60, size=60)]
    return dataset_of(documents, eot_id=60, max_length=16, val_fraction=0.1)


class Losses(Monitor):
    """Keeps every loss it is shown."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(stream=self.text)
        self.seen: list[float] = []
        self.evaluations: list[tuple[int, float, float | None, bool]] = []

    def update(self, metrics: StepMetrics) -> None:
        self.seen.append(metrics.loss)
        super().update(metrics)

    def evaluation(self, *, step: int, loss: float, bits_per_byte: float | None, improved: bool) -> None:
        self.evaluations.append((step, loss, bits_per_byte, improved))
        super().evaluation(step=step, loss=loss, bits_per_byte=bits_per_byte, improved=improved)


def settings(**changes: object) -> TrainConfig:
    defaults = {"steps": 40, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "device": "cpu"}
    return TrainConfig.model_validate({**defaults, **changes})


def plain_losses(dataset: TokenDataset, config: TrainConfig, steps: int) -> list[float]:
    """What one would write by hand: PyTorch's own ops, loss, AdamW, clipping and cosine schedule."""
    model = GPT(CONFIG, seed=1)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    warmup = round(config.warmup * steps)
    floor = config.learning_rate / 10
    losses, position = [], 0
    for step in range(steps):
        progress = (step - warmup) / (steps - 1 - warmup)
        lr = floor + (config.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        if step < warmup:
            lr = config.learning_rate * (step + 1) / (warmup + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = dataset.train_batch(
            seed=config.seed, epoch=0, position=position, batch_size=config.batch_size
        )
        position += config.batch_size
        loss = torch.nn.functional.cross_entropy(model(inputs).view(-1, 61), targets.view(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_a_plain_loop(counting: TokenDataset) -> None:
    config = settings(steps=100, grad_clip=0.5, weight_decay=0.1, learning_rate=1e-3, batch_size=7)
    monitor = Losses()
    train(GPT(CONFIG, seed=1), counting, config, monitor)
    expected = plain_losses(counting, config, 100)
    assert monitor.seen == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.8 * expected[0]


def test_it_learns(counting: TokenDataset) -> None:
    model = GPT(CONFIG)
    before = evaluate(model, counting.val_batches(8))
    summary = train(model, counting, settings(steps=150))
    after = evaluate(model, counting.val_batches(1))
    assert before is not None
    assert after is not None
    assert before.loss == pytest.approx(math.log(61), abs=0.2)
    assert summary.final_loss < 1.0
    assert summary.best_val_loss == pytest.approx(after.loss, rel=1e-5)
    assert after.loss < 1.0
    assert summary.val_loss is not None
    assert summary.val_loss >= after.loss
    assert summary.steps == 150
    assert summary.tokens == 150 * 4 * 16
    assert not model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits(counting: TokenDataset, precision: str) -> None:
    config = settings(steps=12, precision=precision)
    with_dropout = GPTConfig(**{**CONFIG.model_dump(), "dropout": 0.2})
    weights = []
    for seed in (3, 3, 4):
        model = GPT(with_dropout, seed=1)
        for _ in weights:  # whatever it did before
            model.train()(torch.zeros(1, 1, dtype=torch.int64))
        train(model, counting, config.model_copy(update={"seed": seed}))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_evaluation_does_not_change_the_training(counting: TokenDataset) -> None:
    with_dropout = GPTConfig(**{**CONFIG.model_dump(), "dropout": 0.2})
    rare, often = Losses(), Losses()
    train(GPT(with_dropout), counting, settings(steps=10, eval_every=10), rare)
    train(GPT(with_dropout), counting, settings(steps=10, eval_every=1), often)
    assert rare.seen == often.seen


def test_epochs_count_steps(counting: TokenDataset) -> None:
    summary = train(GPT(CONFIG), counting, settings(steps=None, epochs=2, batch_size=16))
    assert summary.steps == math.ceil(2 * counting.windows_per_epoch / 16)
    assert summary.steps < 2 * math.ceil(counting.windows_per_epoch / 16)  # one step has text of both
    assert summary.tokens == summary.steps * 16 * 16


def test_the_garbage_collector_runs_at_validations_only(
    counting: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(Losses, "update", lambda *_: events.append("on" if gc.isenabled() else "off"))
    monkeypatch.setattr("fusedgpt.train.report.step_log.gc.collect", lambda: events.append("collect"))
    train(GPT(CONFIG), counting, settings(steps=4, eval_every=2), Losses())
    assert events == ["collect", *["off", "off", "collect"] * 2]
    assert gc.isenabled()


def test_no_sum_of_a_step_is_in_half_precision(counting: TokenDataset) -> None:
    """Neither forward nor backward: cuBLAS would add the parts of a long one in bf16."""
    model, matmul, allowed = GPT(CONFIG), torch.backends.cuda.matmul, []
    model.register_forward_hook(lambda *_: allowed.append(matmul.allow_bf16_reduced_precision_reduction))
    model.wte.weight.register_hook(lambda _: allowed.append(matmul.allow_fp16_reduced_precision_reduction))
    train(model, counting, settings(steps=1, eval_every=1))
    assert set(allowed) == {False}
    assert matmul.allow_bf16_reduced_precision_reduction
    assert matmul.allow_fp16_reduced_precision_reduction


def test_train_model_returns_the_smoothed_loss(counting: TokenDataset) -> None:
    monitor = Losses()
    config = settings(steps=12)
    train(GPT(CONFIG, seed=1), counting, config, monitor)
    assert train_model(GPT(CONFIG, seed=1), counting, config) == pytest.approx(sum(monitor.seen[-10:]) / 10)


def test_nothing_held_out_is_none(counting: TokenDataset) -> None:
    without = TokenDataset(
        train=counting.train, val=counting.val[:0], max_length=16, train_documents=1, val_documents=0
    )
    assert train(GPT(CONFIG), without, settings(steps=2)).val_loss is None


def test_batches_larger_than_the_text_are_refused(counting: TokenDataset) -> None:
    with pytest.raises(
        ValueError, match=r"a step takes 999 windows of 16 tokens, the training text has only"
    ):
        train(GPT(CONFIG), counting, settings(batch_size=999))


def test_micro_batches_are_one_batch(counting: TokenDataset) -> None:
    """Row 13 of docs/dev/fault_tests.md: K micro-batches of B windows are one of K x B, the last smaller."""
    whole, parts = Losses(), Losses()
    train(GPT(CONFIG, seed=1), counting, settings(steps=20, batch_size=12, learning_rate=1e-3), whole)
    accumulated = settings(steps=20, batch_size=5, batch_tokens=12 * 16, learning_rate=1e-3)
    train(GPT(CONFIG, seed=1), counting, accumulated, parts)
    assert parts.seen == pytest.approx(whole.seen, rel=1e-5)  # fp32 sums in another order, 20 steps


def test_bits_per_byte_and_early_stopping(counting: TokenDataset) -> None:
    """Every token stands for two bytes; a rate this high stops improving soon."""
    dataset = replace(counting, token_bytes=torch.full((61,), 2))
    monitor = Losses()
    summary = train(
        GPT(CONFIG), dataset, settings(steps=400, eval_every=5, patience=3, learning_rate=0.3), monitor
    )
    assert summary.steps < 400
    assert summary.best_step == summary.steps - 3 * 5
    losses = [loss for _, loss, _, _ in monitor.evaluations]
    assert min(losses) == losses[-4] == summary.best_val_loss
    assert losses[-1] == summary.val_loss
    for _, loss, bits, _ in monitor.evaluations:
        assert bits == pytest.approx(loss / math.log(2) / 2)
    assert "no improvement in 3 validations: stopped early" in monitor.text.getvalue()


def test_patience_wants_a_real_improvement(counting: TokenDataset) -> None:
    patient = train(GPT(CONFIG), counting, settings(steps=40, eval_every=4, patience=2))
    hasty = train(GPT(CONFIG), counting, settings(steps=40, eval_every=4, patience=2, min_improvement=9.0))
    assert patient.steps == 40
    assert hasty.steps == 12  # the first validation improves on nothing, two more do not


def test_the_best_weights_are_kept(counting: TokenDataset) -> None:
    model = GPT(CONFIG)
    config = settings(steps=60, eval_every=10, learning_rate=0.3, schedule="constant", warmup=0.0)
    summary = train(model, counting, config)
    kept = evaluate(model, counting.val_batches(8))
    assert kept is not None
    assert summary.best_step is not None
    assert summary.best_step < 60
    assert kept.loss == pytest.approx(summary.best_val_loss, rel=1e-6)
    assert kept.loss < summary.val_loss  # type: ignore[operator]


@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_reading_losses_late_changes_nothing(counting: TokenDataset, log_every: int) -> None:
    monitor = Losses()
    summary = train(GPT(CONFIG, seed=1), counting, settings(steps=30, log_every=log_every), monitor)
    every = Losses()
    train(GPT(CONFIG, seed=1), counting, settings(steps=30), every)
    assert monitor.seen == every.seen
    assert summary.final_loss == pytest.approx(sum(every.seen[-10:]) / 10)


@pytest.mark.parametrize("log_every", [1, 4])
def test_gradients_that_stay_nan_end_the_run(counting: TokenDataset, log_every: int) -> None:
    """Row 8 of docs/dev/fault_tests.md: nothing is updated, it is shown, and it ends."""
    model = GPT(CONFIG)
    with torch.no_grad():
        model.wpe.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    monitor = Losses()
    with pytest.raises(TrainingDiverged, match=r"in a row .* --learning-rate"):
        train(model, counting, settings(max_skipped_steps=6, log_every=log_every), monitor)
    assert 6 <= len(monitor.seen) < 6 + log_every
    assert "step 1: loss or gradient not finite, update skipped" in monitor.text.getvalue()
    for name, p in model.state_dict().items():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    counting: TokenDataset, poison: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of infinity whose gradient is finite is skipped, too."""
    forward, calls = GPT.forward, []

    def planted(self: GPT, *args: Any, **options: Any) -> torch.Tensor:
        loss = forward(self, *args, **options)
        calls.append(self.training)
        if calls.count(True) != 3 or not self.training:
            return loss
        return loss + math.inf if poison == "loss" else loss * torch.tensor(math.inf).exp()

    monkeypatch.setattr(GPT, "forward", planted)
    moments: list[float] = []
    monkeypatch.setattr(Losses, "update", lambda _, m: moments.append(m.skipped))
    summary = train(GPT(CONFIG), counting, settings(steps=6, eval_every=6), Losses())
    assert moments == [False, False, True, False, False, False]
    assert summary.skipped_steps == 1
    assert summary.val_loss is not None
    assert math.isfinite(summary.val_loss)

"""The loop: equal to a plain PyTorch loop, deterministic, learning, and honest about failure."""

from __future__ import annotations

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train import trainer
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.dataset import TokenDataset, build_dataset
from fusedgpt.train.monitor import Monitor
from fusedgpt.train.step import evaluate
from fusedgpt.train.trainer import TrainingDiverged, train, train_model, training_batches

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


@pytest.fixture
def counting() -> TokenDataset:
    """Documents that count upwards from anywhere: easy to learn."""
    rng = np.random.default_rng(0)
    documents = [[(int(start) + i) % 60 for i in range(24)] for start in rng.integers(60, size=60)]
    return build_dataset(documents, eot_id=60, max_length=16, val_fraction=0.1, seed=0)


class Losses(Monitor):
    """Keeps every loss it is shown."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO())
        self.seen: list[float] = []

    def update(self, loss: float, *, tokens: int, seconds: float) -> None:
        self.seen.append(loss)
        super().update(loss, tokens=tokens, seconds=seconds)


def settings(**changes: object) -> TrainConfig:
    defaults = {"steps": 40, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "device": "cpu"}
    return TrainConfig.model_validate({**defaults, **changes})


def test_losses_are_those_of_a_plain_loop(counting: TokenDataset) -> None:
    config = settings(steps=30, schedule="constant", warmup=0, grad_clip=0.5, weight_decay=0.1)
    model, plain = GPT(CONFIG, seed=1), GPT(CONFIG, seed=1)
    monitor = Losses()
    train(model, counting, config, monitor)

    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=False, foreach=False)
    expected = []
    for _, (inputs, targets) in zip(range(30), training_batches(counting, config), strict=False):
        logits = plain(inputs)
        loss = torch.nn.functional.cross_entropy(logits.view(-1, 61), targets.view(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert monitor.seen == pytest.approx(expected, rel=1e-4)  # fp32 sums in another order, over 30 steps
    assert expected[-1] < 0.8 * expected[0]


def test_it_learns(counting: TokenDataset) -> None:
    model = GPT(CONFIG)
    before = evaluate(model, counting.val_batches(8))
    summary = train(model, counting, settings(steps=150))
    assert before == pytest.approx(math.log(61), abs=0.2)
    assert summary.final_loss < 1.0
    assert summary.val_loss is not None
    assert summary.val_loss < 1.0
    assert summary.val_loss == pytest.approx(evaluate(model, counting.val_batches(1)), rel=1e-5)
    assert summary.best_val_loss is not None
    assert summary.best_val_loss <= summary.val_loss
    assert summary.steps == 150
    assert summary.tokens == pytest.approx(150 * 4 * 16, rel=0.05)  # the last batch of an epoch is smaller
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


def test_evaluate_weighs_tokens_not_batches(counting: TokenDataset) -> None:
    model = GPT(CONFIG).eval()
    batches = list(counting.val_batches(2))
    targets = torch.cat([t.flatten() for _, t in batches])
    losses = torch.cat([model(*batch, reduction="none") for batch in batches])
    expected = losses.sum() / (targets != -100).sum()
    assert evaluate(model, batches) == pytest.approx(expected.item(), rel=1e-6)
    assert math.isnan(evaluate(model, []))


def test_epochs_count_steps(counting: TokenDataset) -> None:
    summary = train(GPT(CONFIG), counting, settings(steps=None, epochs=2, batch_size=16))
    assert summary.steps == 2 * math.ceil(counting.windows_per_epoch / 16)
    assert summary.tokens == 2 * counting.windows_per_epoch * 16


def test_every_epoch_has_an_order_of_its_own(counting: TokenDataset) -> None:
    config = settings(batch_size=7, seed=5)
    per_epoch = math.ceil(counting.windows_per_epoch / 7)
    batches = list(itertools.islice(training_batches(counting, config), 2 * per_epoch))
    for epoch in (0, 1):
        expected, _ = counting.train_batch(seed=5, epoch=epoch, position=7, batch_size=7)
        assert torch.equal(batches[epoch * per_epoch + 1][0], expected)
    assert not torch.equal(batches[1][0], batches[per_epoch + 1][0])


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


def test_gradients_that_stay_nan_end_the_run(counting: TokenDataset) -> None:
    model = GPT(CONFIG)
    with torch.no_grad():
        model.wpe.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    monitor = Losses()
    with pytest.raises(TrainingDiverged, match=r"10 steps in a row .* --learning-rate"):
        train(model, counting, settings(), monitor)
    assert len(monitor.seen) == 9
    assert "step 1: gradient not finite, update skipped" in monitor.stream.getvalue()  # type: ignore[attr-defined]
    for name, p in model.state_dict().items():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


def test_skipped_steps_count_only_in_a_row() -> None:
    guard, monitor = trainer._DivergenceGuard(1e-3), Losses()
    for step in range(30):
        guard.check(step % 10 != 9, step, monitor)
    for step in range(9):
        guard.check(True, step, monitor)
    with pytest.raises(TrainingDiverged):
        guard.check(True, 9, monitor)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense:x"])
def test_unusable_devices_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        trainer.resolve_device(device)


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(trainer, "cpu_has_bf16", lambda native=native: native)
        assert trainer.resolve_precision("auto", cpu) == dtype
    assert trainer.resolve_precision("bf16", cpu) == torch.bfloat16

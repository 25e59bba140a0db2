"""The whole step on Triton kernels against the whole step on the reference: the same loss curve."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from training_runs import outcome, train_tiny

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import cast_parameters
from fusedgpt.train.loop.step import GraphedStep, Step


def losses(backend: str, steps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The losses of a tiny GPT that learns to repeat a pattern, with dropout everywhere."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", backend)
    shape = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    model = GPT(shape, seed=1).to(device).train()
    config = TrainConfig(learning_rate=1e-2)
    step = Step(model, build_optimizer(model, config), config)
    tokens = (torch.arange(17) * torch.tensor([[3]]) % 61).to(device)
    batch = StepBatch.collect([(tokens[:, :-1], tokens[:, 1:])], Cursor())
    return torch.stack([step(batch, 1e-2)[0] for _ in range(steps)])


def test_twenty_steps_on_kernels_follow_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are the same bit by bit, so in fp32 only rounding may part the curves."""
    ours, reference = (losses(backend, 20, device, monkeypatch) for backend in ("triton", "reference"))
    assert reference[-1] < 0.5 * reference[0]  # it learns
    torch.testing.assert_close(ours[:10], reference[:10], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def byte_losses(
    backend: str, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """2,000 steps of a character-sized model in bf16 on this project's own documentation."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", backend)
    documents = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, documents))), dtype=torch.uint8).long()
    shape = GPTConfig(vocab_size=256, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2)
    model = GPT(shape, seed=1).to(device).train()
    model.seed_dropout(seed)
    cast_parameters(model, torch.bfloat16)
    config = TrainConfig(learning_rate=1e-3)
    forward = partial(model, dtype=torch.bfloat16)
    step = GraphedStep(
        Step(forward, build_optimizer(model, config), config), model, note=print
    )  # as in training
    generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(2000):
        starts = torch.randint(len(text) - 257, (32, 1), generator=generator)
        windows = text[starts + torch.arange(257)].to(device)
        batch = StepBatch.collect([(windows[:, :-1], windows[:, 1:])], Cursor())
        history.append(step(batch, 1e-3)[0].clone())
    return torch.stack(history)


@pytest.mark.gpu
def test_two_thousand_steps_in_bf16_do_not_drift(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 200 steps the mean losses lie as close as those of two dropout seeds on the reference."""
    runs = (("triton", 1), ("reference", 1), ("reference", 2))
    ours, reference, other = (
        byte_losses(backend, seed, device, monkeypatch).view(10, 200).mean(dim=1) for backend, seed in runs
    )
    noise = (other - reference).abs().max().clamp(min=0.005)
    assert (ours - reference).abs().max() <= 2 * noise


def test_the_trainer_on_kernels_is_the_trainer_on_the_reference(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches, dropout, clipping, AdamW, a save and a resume; without a GPU interpreted."""
    changes = {
        "n_layer": 1,
        "steps": 4,
        "save_every": "2",
        "keep_last": 9,
        "batch_tokens": 4 * 16,
        "eval_every": 3,
    }
    results = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FUSEDGPT_KERNELS", backend)
        train_tiny(tmp_path / backend, device=str(device), **changes)
        results[backend] = outcome(tmp_path / backend)
    ours, reference = ([row[0] for row in results[b][0].values()] for b in ("triton", "reference"))
    assert len(ours) == 4
    assert ours == pytest.approx(reference, rel=1e-5)  # fp32 sums in another order
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    middle = tmp_path / "triton" / "checkpoints" / "step-00000002"
    train_tiny(tmp_path / "triton", resume=middle, device=str(device), **changes)
    losses, tensors, state = outcome(tmp_path / "triton")
    assert losses == results["triton"][0]
    assert all(torch.equal(tensors[name], x) for name, x in results["triton"][1].items())
    assert state == results["triton"][2]

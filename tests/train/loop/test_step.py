"""One optimizer step: how micro-batches add up, loss scaling, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import Batch
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.optimizer import AdamW, build_optimizer
from fusedgpt.train.loop.precision import LossScale
from fusedgpt.train.loop.step import GraphedStep, Step

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
TRAIN = TrainConfig(learning_rate=1e-2, grad_clip=0.5)


def windows(rows: int, *, ignored: int = 0, seed: int = 0) -> Batch:
    """Inputs and targets (rows, 16); the last `ignored` targets of each row do not count."""
    ids = torch.randint(60, (rows, 17), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, 16 - ignored :] = -100
    return ids[:, :-1].contiguous(), targets


def make() -> tuple[GPT, AdamW]:
    model = GPT(CONFIG, seed=1).train()
    return model, build_optimizer(model, TRAIN)


def parameters(model: GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_uneven_micro_batches_weigh_by_their_targets() -> None:
    """The second has a tenth of the first's targets; a mean of means would be far off."""
    parts = [windows(4, seed=1), windows(3, ignored=14, seed=2)]
    whole = torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])
    weights, results = [], []
    for micro_batches in (parts, [whole]):
        model, optimizer = make()
        batch = StepBatch.collect(micro_batches, Cursor())
        results.append(Step(model, optimizer, TRAIN)(batch, 1e-2))
        weights.append(parameters(model))
    assert StepBatch.collect(parts, Cursor()).shares.tolist() == pytest.approx((64 / 70, 6 / 70))
    torch.testing.assert_close(results[0], results[1])
    # AdamW's first step is the sign of the gradient: where that is rounding, it may differ by 2 * lr.
    assert (weights[0] - weights[1]).abs().mean() < 1e-5


def test_documents_reach_the_loss_and_its_gradient() -> None:
    inputs, targets = windows(4)
    documents = (inputs % 3 == 0).cumsum(1).int()
    model, optimizer = make()
    step = Step(model, optimizer, TRAIN, document_ids=lambda x: (x % 3 == 0).cumsum(1).int())
    result = step(StepBatch.collect([(inputs, targets)], Cursor()), 1e-2)
    reference, _ = make()
    loss = reference(inputs, targets, documents=documents)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(result[:2], torch.stack([loss.detach(), norm]))
    assert abs(reference(inputs, targets).item() - loss.item()) > 1e-4


def test_the_learning_rate_is_that_of_the_call() -> None:
    model, optimizer = make()
    before = parameters(model)
    step = Step(model, optimizer, TrainConfig(weight_decay=0.0))
    step(StepBatch.collect([windows(4)], Cursor()), 0.0)
    assert torch.equal(parameters(model), before)
    step(StepBatch.collect([windows(4)], Cursor()), 0.5)
    assert (parameters(model) - before).abs().max() == pytest.approx(0.5, rel=0.5)


def test_label_smoothing_and_z_loss_reach_the_loss() -> None:
    batch = StepBatch.collect([windows(4)], Cursor())
    plain, smooth, z = (
        Step(*make(), TrainConfig(label_smoothing=s, z_loss=z))(batch, 1e-3)[0].item()
        for s, z in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.1))
    )
    logits = make()[0](batch.micro_batches[0][0])
    assert z - plain == pytest.approx(0.1 * logits.logsumexp(-1).square().mean().item(), rel=1e-4)
    assert smooth != pytest.approx(plain, rel=1e-4)


def test_fp16_is_scaled_and_unscaled() -> None:
    """Clipping, norm and update see true gradients; without the scale the small ones would be zero."""
    batch = StepBatch.collect([windows(4)], Cursor())
    model, optimizer = make()
    forward = partial(model, dtype=torch.float16)
    scaled = Step(forward, optimizer, TRAIN, LossScale(torch.device("cpu")))(batch, 1e-2)
    reference, reference_optimizer = make()
    expected = Step(reference, reference_optimizer, TRAIN)(batch, 1e-2)
    torch.testing.assert_close(scaled, expected, rtol=5e-3, atol=0.0)  # fp16 keeps 11 bits
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    wanted = [reference_optimizer.state[p]["exp_avg"] for p in reference.parameters()]
    for ours, theirs in zip(moments, wanted, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_loss_scale_halves_on_overflow_and_grows_again() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.update(torch.tensor(1.0))
    assert scale.scale == 32768.0
    for _ in range(1999):
        scale.update(torch.tensor(0.0))
    assert scale.scale == 32768.0
    saved = scale.state()
    scale.update(torch.tensor(0.0))
    assert (scale.scale, scale.good_steps) == (65536.0, 0.0)
    scale.load(saved)
    scale.update(torch.tensor(1.0))
    assert (scale.scale, scale.good_steps) == (16384.0, 0.0)


def test_an_overflow_costs_a_step_and_half_the_scale() -> None:
    batch = StepBatch.collect([windows(4)], Cursor())
    model, optimizer = make()
    scale = LossScale(torch.device("cpu"))
    scale.scale.fill_(2.0**40)
    step = Step(partial(model, dtype=torch.float16), optimizer, TRAIN, scale)
    before = parameters(model)
    assert step(batch, 1e-2)[2] == 1.0
    assert torch.equal(parameters(model), before)
    assert scale.scale == 2.0**39
    skipped = [step(batch, 0.0)[2].item() for _ in range(30)]
    assert skipped == sorted(skipped, reverse=True)  # until the scale fits
    assert skipped[-1] == 0.0
    step(batch, 1e-2)
    assert not torch.equal(parameters(model), before)


@pytest.mark.parametrize("where", [0, 1])
def test_a_loss_that_is_not_finite_skips_the_step_whatever_its_gradient(where: int) -> None:
    model, optimizer = make()
    calls: list[int] = []

    def forward(*args: Tensor, **options: float) -> Tensor:
        calls.append(len(calls))
        loss: Tensor = model(*args, **options)
        return loss + (math.inf if calls[-1] == where else 0.0)

    before = parameters(model)
    batch = StepBatch.collect([windows(2), windows(2)], Cursor())
    loss, _, skipped = Step(forward, optimizer, TRAIN)(batch, 1e-2)
    assert (loss, skipped) == (math.inf, 1.0)
    assert torch.equal(parameters(model), before)
    assert Step(forward, optimizer, TRAIN)(batch, 1e-2)[2] == 0.0


class Recorder:
    """In place of a Step: notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[float], float]] = []
        self.optimizer = Mock()
        self.model = nn.Dropout()

    def __call__(self, batch: StepBatch, lr: float) -> Tensor:
        self.set_learning_rate(lr)
        return self.run(batch)

    def set_learning_rate(self, lr: float) -> None:
        self.lr = lr

    def run(self, batch: StepBatch) -> Tensor:
        self.batch = batch
        seen = [*batch.shares.tolist(), batch.micro_batches[-1][0].sum().item(), self.model.training]
        self.seen.append((seen, self.lr))
        return torch.zeros(3)


class Graphs:
    """In place of torch.cuda's: what is captured computes when it is replayed."""

    def __init__(self, step: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.short_of_memory = step, False
        self.events: list[str] = []
        fakes = {"Stream": Mock(), "current_stream": Mock(), "stream": lambda _: nullcontext()}
        for name, fake in {**fakes, "CUDAGraph": Mock, "graph": self.capture}.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def capture(self, graph: Mock, *, stream: Mock, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # so that the loader's thread may pin memory meanwhile
        self.events.append("capture")
        yield
        self.step.seen.pop()  # a capture computes nothing
        if self.short_of_memory:
            raise torch.OutOfMemoryError
        batch, training = self.step.batch, self.step.model.training

        def replay() -> None:
            self.events.append("replay")
            mode = self.step.model.training
            self.step.model.train(training)  # as captured
            self.step.run(batch)
            self.step.model.train(mode)

        graph.replay = replay


def step_batches(*rows: int) -> list[StepBatch]:
    """Each of two micro-batches, the second of one packed window: they weigh differently in each step."""
    pairs = [(windows(n, ignored=i, seed=i), windows(1, seed=i + 9)) for i, n in enumerate(rows)]
    return [StepBatch.collect(pair, Cursor()) for pair in pairs]


@pytest.mark.parametrize("rows", [[2] * 7, [2, 3, 2, 3, 2, 3, 2, 2, 3, 3, 2, 2]], ids=["one", "two"])
def test_graphs_read_windows_shares_and_learning_rate_anew(
    rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of each shape run eagerly, one is captured, then all replay."""
    step, wanted = Recorder(), Recorder()
    graphs = Graphs(step, monkeypatch)
    graphed = GraphedStep(cast("Step", step), step.model, note=pytest.fail)
    for i, batch in enumerate(step_batches(*rows)):
        graphed(batch, lr=float(i))
        wanted(batch, lr=float(i))
    assert step.seen == wanted.seen
    assert graphs.events.count("capture") == len(set(rows))
    assert graphs.events.count("replay") == len(rows) - 3 * len(set(rows))


def test_a_graph_is_of_the_mode_it_was_captured_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in another mode runs other kernels: they are compiled in eager steps, never in a capture."""
    step, wanted = Recorder(), Recorder()
    graphs = Graphs(step, monkeypatch)
    graphed = GraphedStep(cast("Step", step), step.model, note=pytest.fail)
    for i, batch in enumerate(step_batches(*[2] * 10)):
        for recorder in (step, wanted):
            recorder.model.train(i >= 5)
        graphed(batch, lr=float(i))
        wanted(batch, lr=float(i))
    assert step.seen == wanted.seen
    assert graphs.events == 2 * ["capture", "replay", "replay"]


def test_too_little_memory_for_a_graph_leaves_the_steps_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the unfinished capture are dropped; no step is lost or repeated, and one line says it."""
    step, wanted, notes = Recorder(), Recorder(), list[str]()
    graphs = Graphs(step, monkeypatch)
    graphs.short_of_memory = True
    graphed = GraphedStep(cast("Step", step), step.model, notes.append)
    for i, batch in enumerate(step_batches(*[2] * 7)):
        graphed(batch, lr=float(i))
        wanted(batch, lr=float(i))
    assert step.seen == wanted.seen
    assert graphs.events == ["capture"]
    assert step.optimizer.zero_grad.call_count == 1
    assert notes == ["too little memory for a CUDA graph: each step launches its kernels one by one"]

"""The loss over held-out text: measured, compared with the best so far, and a reason to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import IGNORE_INDEX, Batch, TokenDataset
from fusedgpt.train.loop.batches import to_device
from fusedgpt.train.loop.step import DocumentIds
from fusedgpt.train.run.world import ALONE, World

_EVALUATIONS_PER_RUN = 10
_BATCH_TOKENS = 8192  # without gradients there is room for more than a training step's
_NEVER: Callable[[], bool] = lambda: False  # noqa: E731 - a default argument needs a value


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A validation: loss in nats per token; bits per byte where the tokens' lengths in bytes are known."""

    loss: float
    bits_per_byte: float | None


@dataclass(kw_only=True)
class ValidationState:
    """What a checkpoint keeps of it."""

    evaluated_step: int = 0
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    without_improvement: int = 0  # validations in a row


class Validation:
    """When to validate, on what, and what came of it."""

    def __init__(
        self, dataset: TokenDataset, config: TrainConfig, steps: int, state: ValidationState
    ) -> None:
        self.dataset, self.config, self.steps, self.state = dataset, config, steps, state
        self.batch_size = max(config.batch_size, _BATCH_TOKENS // dataset.max_length)
        self.every = config.eval_every or max(1, steps // _EVALUATIONS_PER_RUN)

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are to be validated, and have not been."""
        wanted = step > 0 and (step % self.every == 0 or step == self.steps)
        return wanted and len(self.dataset.val) > 1 and self.state.evaluated_step < step

    def run(
        self,
        model: GPT,
        step: int,
        dtype: torch.dtype,
        cancelled: Callable[[], bool] = _NEVER,
        world: World = ALONE,
    ) -> Evaluation | None:
        """Validate and take the result in; None where cancelled() turned true in between."""
        batches = capped(self.dataset.val_batches(self.batch_size), self.config.eval_tokens)
        evaluation = evaluate(
            model,
            batches,
            dtype=dtype,
            token_bytes=self.dataset.token_bytes,
            document_ids=self.dataset.document_ids,
            cancelled=cancelled,
            world=world,
        )
        if evaluation is not None:
            self._take_in(evaluation.loss, step)
        return evaluation

    def _take_in(self, loss: float, step: int) -> None:
        state = self.state
        state.evaluated_step, state.last_loss = step, loss
        to_beat = math.inf if state.best_loss is None else state.best_loss
        patient = loss < to_beat - self.config.min_improvement
        state.without_improvement = 0 if patient else state.without_improvement + 1
        if loss < to_beat:
            state.best_loss, state.best_step = loss, step

    @property
    def improved(self) -> bool:
        """Whether the last validation was the best."""
        return self.state.best_step == self.state.evaluated_step > 0

    @property
    def out_of_patience(self) -> bool:
        """Whether too many validations in a row brought no improvement worth the name."""
        return bool(self.config.patience) and self.state.without_improvement >= (self.config.patience or 0)


def capped(batches: Iterable[Batch], n_targets: int | None) -> Iterator[Batch]:
    """Batches up to their first n_targets targets, the rest ignored; all of them for None."""
    left = n_targets
    for inputs, targets in batches:
        if left is None:
            yield inputs, targets
            continue
        counted = (targets != IGNORE_INDEX).view(-1)
        too_many = (counted.cumsum(0) > left).view_as(targets)
        yield inputs, targets.masked_fill(too_many, IGNORE_INDEX)
        left -= int(counted.sum())
        if left <= 0:
            return


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype | None = None,  # of the activations
    token_bytes: Tensor | None = None,  # (V,) int64, on the CPU
    document_ids: DocumentIds = lambda _: None,
    cancelled: Callable[[], bool] = _NEVER,
    world: World = ALONE,
) -> Evaluation | None:
    """Mean loss over every target that is not ignored, NaN where there is none.

    model is put into eval mode for it. None where cancelled(), asked before each batch, turns true. Ranks
    take batches in turn, the same ones as one process; only the order of fp64 terms in their sum differs.
    """
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    total, count, n_bytes = torch.zeros((), device=device, dtype=torch.float64), 0, 0
    try:
        remaining = iter(batches)
        while turn := list(islice(remaining, world.size)):
            if cancelled():
                return None
            inputs, targets = turn[min(world.rank, len(turn) - 1)]
            idx, expected = to_device(inputs, device), to_device(targets, device)
            nats = model(idx, expected, documents=document_ids(idx), dtype=dtype, reduction="sum")
            if world.rank < len(turn):  # else the pass was only for a sharded model, which all ranks compute
                total += nats
            for _, targets in turn:
                counted = targets[targets != IGNORE_INDEX]
                count += len(counted)
                n_bytes += int(token_bytes[counted].sum()) if token_bytes is not None else 0
    finally:
        model.train(was_training)
    nats = world.sum(total).item()
    bits = nats / math.log(2.0)
    return Evaluation(
        loss=nats / count if count else math.nan, bits_per_byte=bits / n_bytes if n_bytes else None
    )

"""One optimizer step: micro-batches forward and backward, clip, AdamW. Nothing in it waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import StepBatch
from fusedgpt.train.loop.optimizer import AdamW
from fusedgpt.train.loop.precision import LossScale

Forward = Callable[..., Tensor]  # (idx, targets, documents=, label_smoothing=, z_loss=) -> mean loss
DocumentIds = Callable[[Tensor], Tensor | None]  # inputs (B, T) -> what the model takes as `documents`
_EAGER_STEPS = 3  # before a capture: autotuning, workspaces, the optimizer's tables


class Step:
    """A step, as a function of its batch and learning rate.

    The gradient is that of the mean over all targets of the step, however they are split: each micro-batch's
    mean counts by its share of the targets. Where a loss is not finite, its gradient is made NaN, so that the
    optimizer skips the update on the device.
    """

    def __init__(
        self,
        forward: Forward,
        optimizer: AdamW,
        config: TrainConfig,
        loss_scale: LossScale | None = None,
        document_ids: DocumentIds = lambda _: None,
    ) -> None:
        self.forward, self.optimizer, self.loss_scale = forward, optimizer, loss_scale
        self.document_ids = document_ids
        self.grad_clip = config.grad_clip
        self.loss_options = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}

    def __call__(self, batch: StepBatch, lr: float) -> Tensor:
        """(loss, gradient norm before clipping, 1.0 if the update was skipped), fp32 (3,) on the device."""
        self.set_learning_rate(lr)
        return self.run(batch)

    def set_learning_rate(self, lr: float) -> None:
        """On a GPU into a tensor there, which a CUDA graph reads anew at every replay."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def run(self, batch: StepBatch) -> Tensor:
        """The step at the learning rate that was set."""
        scale = self.loss_scale.scale if self.loss_scale else None
        total = None
        for (inputs, targets), share in zip(batch.micro_batches, batch.shares.unbind(), strict=True):
            loss = self.forward(inputs, targets, documents=self.document_ids(inputs), **self.loss_options)
            weight = torch.where(loss.detach().isfinite(), share, torch.nan)
            torch.autograd.backward(loss, weight if scale is None else weight * scale)
            part = loss.detach() * share
            total = part if total is None else total + part
        self.optimizer.step(max_norm=self.grad_clip, grad_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale:
            self.loss_scale.update(self.optimizer.skipped)
        assert total is not None  # a batch has a micro-batch
        return torch.stack([total.float(), self.optimizer.grad_norm, self.optimizer.skipped])


class GraphedStep:
    """A Step captured as one CUDA graph: one launch where there were hundreds.

    The first steps run eagerly. All steps must have the same shape. Learning rate, shares, loss scale,
    dropout offset and step counts are tensors that the graph reads and writes.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.eager_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: StepBatch, lr: float) -> Tensor:
        """As Step; the tensor returned is overwritten by the next call."""
        if self.graph is None and self.eager_steps < _EAGER_STEPS:
            return self._run_aside(batch, lr)
        if self.graph is None:
            self._capture(batch)
        assert self.graph is not None
        for x, y in zip(_tensors(self.batch), _tensors(batch), strict=True):
            x.copy_(y, non_blocking=True)
        self.step.set_learning_rate(lr)
        self.graph.replay()
        return self.result

    def _run_aside(self, batch: StepBatch, lr: float) -> Tensor:
        """An eager step on a side stream, as a capture wants it to have happened."""
        self.eager_steps += 1
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.step(batch, lr)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self, batch: StepBatch) -> None:
        copies = tuple((x.clone(), y.clone()) for x, y in batch.micro_batches)
        self.batch = replace(batch, micro_batches=copies, shares=batch.shares.clone())
        graph = torch.cuda.CUDAGraph()
        # "thread_local": meanwhile the loader's thread may pin memory, which "global" forbids to all threads.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.result = self.step.run(self.batch)
        self.graph = graph


def _tensors(batch: StepBatch) -> list[Tensor]:
    """What a step reads."""
    return [batch.shares, *chain.from_iterable(batch.micro_batches)]

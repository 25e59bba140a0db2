"""One optimizer step: micro-batches forward and backward, clip, AdamW. Nothing in it waits for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import StepBatch
from fusedgpt.train.loop.distributed import OneProcess
from fusedgpt.train.loop.optimizer import AdamW
from fusedgpt.train.loop.precision import LossScale

Forward = Callable[..., Tensor]  # (idx, targets, documents=, label_smoothing=, z_loss=) -> mean loss
DocumentIds = Callable[[Tensor], Tensor | None]  # inputs (B, T) -> what the model takes as `documents`
_Kind = tuple[bool, tuple[torch.Size, ...]]  # of step: train mode or not, the shapes of all that it reads
_EAGER_STEPS = 3  # before a capture: compiling, workspaces, the optimizer's tables


class Step:
    """A step, as a function of its batch and learning rate.

    The gradient is that of the mean over all targets of the step, however they are split: each micro-batch's
    mean counts by its share of the targets. Where a loss is not finite, its gradient is made NaN, so that the
    optimizer skips the update on the device, on all ranks. A rank's loss is its part of the sum.
    """

    def __init__(
        self,
        forward: Forward,
        optimizer: AdamW,
        config: TrainConfig,
        loss_scale: LossScale | None = None,
        document_ids: DocumentIds = lambda _: None,
        parallel: OneProcess | None = None,
    ) -> None:
        self.forward, self.optimizer, self.loss_scale = forward, optimizer, loss_scale
        self.document_ids, self.parallel = document_ids, parallel or OneProcess()
        self.grad_clip = config.grad_clip
        self.loss_options = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}

    def __call__(self, batch: StepBatch, lr: float) -> Tensor:
        """(loss, gradient norm before clipping, 1.0 if the update was skipped), fp32 (3,) on the device."""
        self.set_learning_rate(lr)
        return self.run(batch)

    def set_learning_rate(self, lr: float) -> None:
        """On a GPU into a tensor there, which a CUDA graph reads anew at every replay."""
        for group in self.optimizer.param_groups:
            rate = lr * group.get("lr_factor", 1.0)  # Muon's has a peak of its own
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def run(self, batch: StepBatch) -> Tensor:
        """The step at the learning rate that was set."""
        scale = self.loss_scale.scale if self.loss_scale else None
        total = None
        last = len(batch.micro_batches) - 1
        for i, ((inputs, targets), share) in enumerate(
            zip(batch.micro_batches, batch.shares.unbind(), strict=True)
        ):
            with self.parallel.micro_batch(last=i == last):
                loss = self.forward(inputs, targets, documents=self.document_ids(inputs), **self.loss_options)
                weight = torch.where(loss.detach().isfinite(), share, torch.nan)
                torch.autograd.backward(loss, weight if scale is None else weight * scale)
            part = loss.detach() * share
            total = part if total is None else total + part
        self.optimizer.step(max_norm=self.grad_clip, grad_scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale:
            self.loss_scale.update(self.optimizer.skipped)
        self.parallel.end_step()
        assert total is not None  # a batch has a micro-batch
        return torch.stack([total.float(), self.optimizer.grad_norm, self.optimizer.skipped])


class GraphedStep:
    """A Step that is replayed as a CUDA graph: one launch where there were hundreds.

    Each shape of batch, in each mode of the model, runs eagerly a few times and is captured then. Learning
    rate, shares, loss scale, dropout offset and step counts are tensors that a graph reads and writes. It
    keeps the memory of its step: where a capture finds too little, `note` is told, and such steps stay eager.
    """

    def __init__(self, step: Step, model: nn.Module, note: Callable[[str], None]) -> None:
        self.step, self.model, self.note = step, model, note
        self.eager_steps: Counter[_Kind] = Counter()
        self.graphs: dict[_Kind, _Graph] = {}
        # Of eager steps and captures: cuBLAS keeps a workspace (32 MB on Hopper) for each stream it has seen.
        self.stream = torch.cuda.Stream()

    def __call__(self, batch: StepBatch, lr: float) -> Tensor:
        """As Step; the tensor returned is overwritten by the next call."""
        self.step.set_learning_rate(lr)
        kind = self.model.training, tuple(x.shape for x in _tensors(batch))
        if self.eager_steps[kind] == _EAGER_STEPS:
            self._capture(kind, batch)
        if kind in self.graphs:
            return self.graphs[kind].replay(batch)
        self.eager_steps[kind] += 1
        return self._run_aside(batch)

    def _run_aside(self, batch: StepBatch) -> Tensor:
        """An eager step on the stream of captures, as a capture wants it to have happened."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step.run(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self, kind: _Kind, batch: StepBatch) -> None:
        self.eager_steps[kind] += 1  # whatever happens, only once
        try:
            self.graphs[kind] = _Graph(self.step, batch, self.stream)
        except torch.OutOfMemoryError:
            self.step.optimizer.zero_grad()  # those of the unfinished capture
            self.note("too little memory for a CUDA graph: each step launches its kernels one by one")


class _Graph:
    """A captured step; what it reads and returns stays where it is."""

    def __init__(self, step: Step, batch: StepBatch, stream: torch.cuda.Stream) -> None:
        copies = tuple((x.clone(), y.clone()) for x, y in batch.micro_batches)
        self.batch = replace(batch, micro_batches=copies, shares=batch.shares.clone())
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": meanwhile the loader's thread may pin memory, which "global" forbids to all threads.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.result = step.run(self.batch)

    def replay(self, batch: StepBatch) -> Tensor:
        """The step on `batch`: copied and replayed on one stream, so neither overtakes the other."""
        for x, y in zip(_tensors(self.batch), _tensors(batch), strict=True):
            x.copy_(y, non_blocking=True)
        self.graph.replay()
        return self.result


def _tensors(batch: StepBatch) -> list[Tensor]:
    """What a step reads."""
    return [batch.shares, *chain.from_iterable(batch.micro_batches)]

"""One optimizer step, and the loss over a validation stream."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedgpt.model.gpt import GPT
from fusedgpt.train.data.dataset import IGNORE_INDEX, Batch
from fusedgpt.train.optimizer import AdamW


def train_step(
    model: GPT, batch: Batch, optimizer: AdamW, *, lr: float, grad_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward, clip, AdamW. batch: inputs and targets (B, T) on the model's device.

    Returns (loss, gradient norm, 1.0 if the update was skipped because the gradient was not finite), scalars
    on the device, the last two overwritten by the next step: nothing here waits for a GPU.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(*batch)
    loss.backward()
    optimizer.step(max_norm=grad_clip)
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), optimizer.grad_norm, optimizer.skipped


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch]) -> float:
    """Mean loss in nats over every target that is not ignored; NaN where there is none."""
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    total, count = torch.zeros((), device=device, dtype=torch.float64), 0
    for inputs, targets in batches:
        total += model(inputs.to(device), targets.to(device), reduction="sum")
        count += int((targets != IGNORE_INDEX).sum())
    model.train(was_training)
    return total.item() / count if count else float("nan")

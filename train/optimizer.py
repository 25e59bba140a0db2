"""AdamW over a GPT's parameter groups, with clipping folded into its one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedgpt.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; weight decay on matrices only, never on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def clip_and_step(optimizer: torch.optim.AdamW, max_norm: float) -> tuple[Tensor, Tensor]:
    """One AdamW step with the gradient scaled to a norm of at most max_norm (0: not scaled).

    Returns (gradient norm before clipping, 1.0 if it was not finite else 0.0), fp32 scalars on the device; a
    non-finite gradient leaves parameters, moments and step counts as they were. The fused kernel divides by
    `grad_scale` and checks `found_inf` itself, as it does for torch.amp.GradScaler: no pass over the
    gradients just to scale them.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    skipped = (~norm.isfinite()).float()
    clip = (norm / max_norm).clamp(min=1.0) if max_norm > 0.0 else torch.ones_like(norm)
    optimizer.grad_scale, optimizer.found_inf = clip, skipped  # type: ignore[attr-defined]
    optimizer.step()
    return norm, skipped

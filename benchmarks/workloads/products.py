"""The matrix products of a training step on a CPU and AdamW's update, with nothing between them.

As ours makes them, of random numbers. A step of any contender that multiplies with PyTorch contains these, so
its time over theirs is the most by which another could beat it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ceilings import DTYPES
from fusedgpt.kernels.cpu.linear import matmul_nt, matmul_tn, product
from fusedgpt.kernels.cpu.linear_cross_entropy import ROWS
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT


def products(
    config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str
) -> tuple[Callable[[], None], GPT]:
    """(the step, the model whose parameters it updates)."""
    dtype, (B, T) = DTYPES[precision], batch[0].shape
    model = GPT(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    in_blocks = [p.detach().to(dtype) for p in model.h.parameters() if p.ndim == 2]
    head = model.wte.weight.detach().to(dtype)
    rows = {C: torch.randn(B * T, C).to(dtype) for weight in in_blocks for C in weight.shape}
    values = torch.randn(B * config.n_head, T, config.n_embd // config.n_head).to(dtype)
    scores = torch.randn(B * config.n_head, T, T).to(dtype)

    @torch.no_grad()
    def step() -> None:
        for weight in in_blocks:
            dy, x = (rows[width] for width in weight.shape)
            product(x, weight)
            product(dy, weight.T)
            matmul_tn(dy, x)
        for x in rows[config.n_embd].split(ROWS):
            logits = matmul_nt(head, x)
            matmul_tn(logits, head)
            matmul_nt(logits, x.T)
        for _ in range(2 * config.n_layer):  # two attention products forward, four backward
            values @ values.transpose(1, 2)
            scores @ values
            scores @ values
        optimizer.step()

    return step, model

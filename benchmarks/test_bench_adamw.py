"""Clip and AdamW over all parameters of a GPT, fp32 as the trainer keeps them.

28 bytes a parameter: parameter, both moments read and written, the gradient read. Whatever reads the gradient
once more for its norm moves more, at the same figure of merit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_bench import DEVICE, Bench, choose
from torch import nn

from fusedgpt.kernels import check
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.optimizer import AdamW

CASE = check.adamw_case(*choose((1000, 768), (9, 200)))
TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0


def parameters(config: GPTConfig) -> list[nn.Parameter]:
    """A new GPT's, with gradients."""
    made = list(GPT(config, seed=0).to(DEVICE).parameters())
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def ours(made: list[nn.Parameter]) -> Callable[[], object]:
    optimizer = AdamW(made, **OPTIONS)
    return lambda: optimizer.step(max_norm=MAX_NORM)


def torchs(made: list[nn.Parameter], **kind: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(made, **OPTIONS, **kind)

    def step() -> None:
        nn.utils.clip_grad_norm_(made, MAX_NORM)
        optimizer.step()

    return step


@pytest.mark.parametrize("contender", ["ours", "torch_fused", "torch_foreach"])
@pytest.mark.parametrize("size", choose(["gpt2", "gpt2-medium"], ["tiny"]))
def test_adamw(contender: str, size: str, bench: Bench) -> None:
    made = parameters(PRESETS.get(size, TINY))
    if contender == "ours":
        step = bench.contender("ours", "adamw", ours=ours)(made)
    else:
        step = torchs(made, **{contender.removeprefix("torch_"): True})
    traffic = 28 * sum(p.numel() for p in made)
    bench.run(CASE, contender, "step", size, lambda: None, lambda _: step(), bytes_=traffic)

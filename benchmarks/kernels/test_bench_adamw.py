"""Clip and AdamW over all parameters of a GPT: fp32, as the trainer keeps them, and bf16 with fp32 masters.

Bytes per parameter: fp32 reads and writes parameter and both moments (24); bf16 the same of master and
moments, and writes the parameter (26). The gradient is read twice, once for its norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.clock import nothing
from benchmarks.kernels.harness import DEVICE, Bench, choose
from fusedgpt.kernels.tools import cases
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.loop.optimizer import AdamW

CASE = cases.adamw_case(*choose((1000, 768), (9, 200)))
TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0
FLOPS = 17  # per parameter, roughly; 2 of them for the norm
BYTES = {torch.float32: 24 + 2 * 4, torch.bfloat16: 26 + 2 * 2}


def parameters(config: GPTConfig, dtype: torch.dtype) -> list[nn.Parameter]:
    """Random ones in the shapes of a GPT's, with gradients."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(config, seed=0).parameters()]
    made = [nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def flat(made: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same parameters in one tensor; the difference is the cost of many small ones."""
    one = nn.Parameter(torch.cat([p.detach().flatten() for p in made]))
    one.grad = torch.randn_like(one)
    return [one]


def ours(made: list[nn.Parameter]) -> Callable[[], object]:
    optimizer = AdamW(made, **OPTIONS)
    return lambda: optimizer.step(max_norm=MAX_NORM)


def torchs(made: list[nn.Parameter], **kind: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(made, **OPTIONS, **kind, capturable=DEVICE.type == "cuda")

    def step() -> None:
        nn.utils.clip_grad_norm_(made, MAX_NORM)
        optimizer.step()

    return step


@pytest.mark.parametrize("contender", ["ours", "ours_flat", "torch_fused", "torch_foreach"])
@pytest.mark.parametrize("dtype", choose([torch.float32, torch.bfloat16], [torch.float32]), ids=str)
@pytest.mark.parametrize("size", choose(["gpt2", "gpt2-medium", "gpt2-xl"], ["tiny", "12M"]))
def test_adamw(contender: str, size: str, dtype: torch.dtype, bench: Bench) -> None:
    made = parameters(PRESETS.get(size, TINY), dtype)
    if contender.startswith("ours"):
        step = ours(flat(made) if contender == "ours_flat" else made)
    else:
        step = torchs(made, **{contender.removeprefix("torch_"): True})
    n = sum(p.numel() for p in made)
    label = f"{size} {str(dtype).removeprefix('torch.')}"
    work = {"flops": FLOPS * n, "bytes_": BYTES[dtype] * n}
    bench.run(CASE, contender, "step", label, [(nothing, lambda _: step())], [], **work)

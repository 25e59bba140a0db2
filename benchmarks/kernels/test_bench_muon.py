"""Muon over the matrices of a GPT's blocks, beside torch.optim.Muon, which takes one matrix at a time.

bf16 parameters have fp32 masters. FLOPs are those of five Newton-Schulz iterations without symmetry, as
torch.optim.Muon makes them: so fractions of a ceiling compare, and what ours saves shows as speed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.clock import nothing
from benchmarks.kernels.harness import DEVICE, Bench, choose
from fusedgpt.kernels.tools import cases
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.train.loop.optimizer import AdamW

CASE = cases.muon_case(*choose((12, 768, 768), (2, 40, 97)))
TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16)
OPTIONS = {"lr": 1e-5, "momentum": 0.95, "weight_decay": 0.1}
ITERATIONS = 5


def matrices(config: GPTConfig, dtype: torch.dtype) -> list[nn.Parameter]:
    """Random ones in the shapes of all blocks, q, k and v apart, with gradients."""
    C = config.n_embd
    shapes = [*[(C, C)] * 4, (4 * C, C), (C, 4 * C)] * config.n_layer
    made = [nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def ours(made: list[nn.Parameter]) -> Callable[[], object]:
    vector = nn.Parameter(torch.zeros(1, device=DEVICE))  # AdamW has to have something
    vector.grad = torch.zeros_like(vector)
    optimizer = AdamW([{"params": [vector]}, {"params": made, **OPTIONS}])
    return optimizer.step


def torchs(made: list[nn.Parameter]) -> Callable[[], object]:
    return torch.optim.Muon(made, **OPTIONS, ns_steps=ITERATIONS).step


def flops(p: nn.Parameter) -> float:
    M, N = sorted(p.shape)
    return ITERATIONS * (4.0 * M * M * N + 2.0 * M**3)


@pytest.mark.parametrize("contender", ["ours", "torch"])
@pytest.mark.parametrize("dtype", choose([torch.float32, torch.bfloat16], [torch.float32]), ids=str)
@pytest.mark.parametrize("size", choose(["gpt2", "gpt2-medium", "gpt2-xl"], ["tiny"]))
def test_muon(contender: str, size: str, dtype: torch.dtype, bench: Bench) -> None:
    made = matrices(PRESETS.get(size, TINY), dtype)
    step = (ours if contender == "ours" else torchs)(made)
    label = f"{size} {str(dtype).removeprefix('torch.')}"
    work = {"flops": sum(map(flops, made)), "bytes_": (26 + 2 * 2) * sum(p.numel() for p in made)}
    bench.run(CASE, contender, "step", label, [(nothing, lambda _: step())], [], **work)

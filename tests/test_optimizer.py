"""AdamW: groups, clipping folded into the step, non-finite gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.optimizer import build_optimizer, clip_and_step

IDS = torch.arange(24).view(2, 12)


def test_only_matrices_decay(tiny_gpt: GPT) -> None:
    decaying, free = build_optimizer(tiny_gpt, TrainConfig(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in tiny_gpt.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {n for n in names.values() if is_matrix(n)}
    assert len(decaying["params"]) + len(free["params"]) == len(names)


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "ln_" not in name


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e6])
def test_a_step_is_torchs_clip_and_adamw(tiny_gpt: GPT, max_norm: float) -> None:
    plain = copy.deepcopy(tiny_gpt)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(tiny_gpt, config)
    theirs = build_optimizer(plain, config)
    for group in theirs.param_groups:
        group["fused"] = False
    for _ in range(3):
        tiny_gpt(IDS, IDS.flip(1)).backward()
        for ours, expected in zip(tiny_gpt.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            expected.grad = ours.grad.clone()
        norm, skipped = clip_and_step(optimizer, max_norm)
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm or 1e9)
        theirs.step()
        torch.testing.assert_close(norm, expected_norm)
        assert skipped.item() == 0
        optimizer.zero_grad()
        theirs.zero_grad()
    for ours, expected in zip(tiny_gpt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)  # 1e-5 of a step of 1e-2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny_gpt: GPT, poison: float) -> None:
    optimizer = build_optimizer(tiny_gpt, TrainConfig())
    for step in range(3):
        tiny_gpt(IDS, IDS).backward()
        if step == 1:
            before = copy.deepcopy((tiny_gpt.state_dict(), optimizer.state_dict()))
            assert tiny_gpt.wpe.weight.grad is not None
            tiny_gpt.wpe.weight.grad[3, 3] = poison
        norm, skipped = clip_and_step(optimizer, 1.0)
        assert skipped.item() == (step == 1)
        assert norm.isfinite().item() == (step != 1)
        if step == 1:
            after = (tiny_gpt.state_dict(), optimizer.state_dict())
            for old, new in zip(flat(before), flat(after), strict=True):
                assert torch.equal(old, new)
        optimizer.zero_grad()


def flat(value: object) -> list[torch.Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flat(item)] if isinstance(value, list | tuple) else []

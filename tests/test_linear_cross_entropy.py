"""The chunked linear + cross-entropy against the reference that holds all logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import linear_cross_entropy as lce
from fusedgpt.kernels import ops, reference


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Any:
    """torch.empty gives NaN, so that an output nobody wrote fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(N: int, C: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, C), weight padded to a multiple of 128 (P, C), targets (N,) with every seventh ignored."""
    generator = torch.Generator().manual_seed(N + V)
    P = -(-V // 128) * 128
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(P, C, generator=generator, dtype=torch.float64) / C**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradients(function: Any, hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """[loss, dhidden, dweight] for an upstream gradient that is not 1."""
    loss = function(hidden, weight, *args, **kwargs)
    upstream = torch.linspace(-2.0, 3.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)]


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.1, "z_loss": 1e-2}]


@pytest.mark.parametrize("N", [1, 2, 17, 97])
@pytest.mark.parametrize("V", [65, 257])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_reference_in_float64(
    N: int, V: int, reduction: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lce, "_ROWS_PER_MATMUL", 32)
    monkeypatch.setattr(lce, "_SOFTMAX_LOGITS", 5 * V)
    args = problem(N, 24, V, torch.float64)
    kwargs: dict[str, Any] = {"vocab_size": V, "reduction": reduction, **options}
    for ours, truth in zip(
        gradients(ops.linear_cross_entropy, *args, **kwargs),
        gradients(reference.linear_cross_entropy, *args, **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    ("dtype", "V", "allowed"),
    [  # times the error of the unfused op in the same dtype: the standard's 1.5 for the loss, 2 for gradients
        (torch.float32, 50257, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 50257, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 50304, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 65, (1.5, 2.0, 2.0)),
    ],
)
def test_error_is_no_larger_than_pytorchs(
    dtype: torch.dtype, V: int, allowed: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lce, "_ROWS_PER_MATMUL", 64)
    args = problem(200, 64, V, dtype)
    exact = [args[0].detach().double().requires_grad_(), args[1].detach().double().requires_grad_(), args[2]]
    truth = gradients(reference.linear_cross_entropy, *exact, vocab_size=V)
    ours = gradients(ops.linear_cross_entropy, *args, vocab_size=V)
    theirs = gradients(reference.linear_cross_entropy, *args, vocab_size=V)
    for x, y, true, factor in zip(ours, theirs, truth, allowed, strict=True):
        floor = torch.finfo(torch.float32).eps  # of one scalar: a lucky zero is no bar
        assert relative_error(x, true) <= factor * relative_error(y, true) + floor
        assert abs((x.double() - true).mean()) <= 1e-3 * true.abs().mean()  # no bias


def test_gradient_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(1024, 32, 300, torch.float32)
    truth = gradients(reference.linear_cross_entropy, *args, vocab_size=300)
    for rows in (1024, 64, 4, 1):
        monkeypatch.setattr(lce, "_ROWS_PER_MATMUL", rows)
        for ours, true in zip(gradients(ops.linear_cross_entropy, *args, vocab_size=300), truth, strict=True):
            assert relative_error(ours, true.double()) < 1e-6  # fp32 sums of 1024 rows in another order


def test_same_call_twice_gives_the_same_bits() -> None:
    args = problem(300, 64, 1000, torch.bfloat16)
    first, second = (gradients(ops.linear_cross_entropy, *args, vocab_size=1000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fp32_weight_with_bf16_hidden_gets_an_fp32_gradient() -> None:
    hidden, weight, targets = problem(64, 32, 300, torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = ops.linear_cross_entropy(low, weight, targets, vocab_size=300)
    dhidden, dweight = torch.autograd.grad(loss, (low, weight))
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    true = torch.autograd.grad(
        reference.linear_cross_entropy(hidden, weight, targets, vocab_size=300), weight
    )
    assert relative_error(dweight, true[0].double()) < 2e-2  # bf16 has 8 bits


def test_padding_gets_no_gradient() -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32)
    (dweight,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets, vocab_size=65), weight)
    assert dweight[:65].abs().min() > 0
    assert dweight[65:].abs().max() == 0


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = problem(8, 16, 65, torch.float32)
    loss, dhidden, dweight = gradients(
        ops.linear_cross_entropy, hidden.detach().mul(1e4).requires_grad_(), weight, targets, vocab_size=65
    )
    assert loss > 1e3
    assert all(x.isfinite().all() for x in (loss, dhidden, dweight))


@pytest.mark.parametrize("targets", [torch.empty(0, dtype=torch.int64), torch.full((5,), -100)])
def test_nothing_to_count_is_zero(targets: Tensor) -> None:
    hidden = torch.randn(len(targets), 16, requires_grad=True)
    weight = torch.randn(128, 16, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


def test_without_grad_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(9, 16, 65, torch.float32)
    with_grad = ops.linear_cross_entropy(*args, vocab_size=65)
    monkeypatch.setattr(ops.lce, "linear_cross_entropy_sum", None)  # would make them
    with torch.no_grad():
        assert torch.allclose(ops.linear_cross_entropy(*args, vocab_size=65), with_grad)


def test_opcheck() -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32)
    options = (65, -100, 0.1, 1e-3)
    torch.library.opcheck(lce.linear_cross_entropy_rows, (hidden, weight, targets, *options))
    scale = torch.rand(9)
    torch.library.opcheck(lce.linear_cross_entropy_sum, (hidden, weight, targets, scale, *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "hidden: expected"),
        ({"hidden": torch.zeros(4, 16, dtype=torch.int64)}, "hidden: expected a floating-point"),
        ({"weight": torch.zeros(128, 15)}, r"weight: expected \(P, 16\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \(4,\)"),
        ({"targets": torch.zeros(4)}, "targets: expected torch.int64|targets: expected int64"),
        ({"targets": torch.tensor([0, 1, 65, 2])}, "targets holds 65, expected 0 to 64"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, "targets holds -1"),
        ({"vocab_size": 129}, "vocab_size: expected 1 to 128"),
        ({"reduction": "average"}, "reduction: expected mean, sum or none"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(4, 16),
        "weight": torch.zeros(128, 16),
        "targets": torch.zeros(4, dtype=torch.int64),
        "vocab_size": 65,
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**{**good, **change})

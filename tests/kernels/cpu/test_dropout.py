"""Dropout on a CPU: NumPy's masks, and the two ops with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.cpu import dropout as plain

SEED, OFFSET = torch.tensor(-7), torch.tensor((1 << 40) + 3)
P = 0.3


@pytest.mark.parametrize("C", [8, 17, 384])
@pytest.mark.parametrize("first", range(1, 5))
def test_a_row_has_the_same_mask_in_any_batch(first: int, C: int) -> None:
    whole = plain.dropout_mask(torch.Size((9, C)), P, SEED, OFFSET)
    rest = plain.dropout_mask(torch.Size((9 - first, C)), P, SEED, OFFSET + first * ops.dropout_blocks(C))
    assert torch.equal(rest, whole[first:])


@pytest.mark.parametrize("T", [1, 7, 40])
@pytest.mark.parametrize("first", range(1, 4))
def test_a_head_has_the_same_mask_in_any_batch(first: int, T: int) -> None:
    whole = plain.attention_dropout_mask(torch.Size((2, 3, T, T)), P, SEED, OFFSET).flatten(end_dim=1)
    offset = OFFSET + first * ops.attention_dropout_blocks(T)
    rest = plain.attention_dropout_mask(torch.Size((1, 6 - first, T, T)), P, SEED, offset)
    assert torch.equal(rest[0], whole[first:])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_masks_keep_their_share_independently(p: float) -> None:
    kept = plain.dropout_mask(torch.Size((1 << 10, 1 << 10)), p, SEED, OFFSET)
    in_attention = plain.attention_dropout_mask(torch.Size((2, 2, 500, 500)), p, SEED, OFFSET)
    for mask, share in (kept, 1 - p), (in_attention, 1 - reference.dropout_threshold(p) / 256):
        centred, deviation = mask.double() - share, math.sqrt(share * (1 - share))
        assert (
            abs(centred.mean()) < 5 * deviation / math.sqrt(mask.numel()) + 2**-17
        )  # half a step of 1/65536
        for a, b in (centred[..., 1:], centred[..., :-1]), (centred[..., 1:, :], centred[..., :-1, :]):
            assert abs((a * b).mean()) <= 5 * deviation**2 / math.sqrt(a.numel())


@pytest.mark.parametrize("draw", [plain.dropout_mask, plain.attention_dropout_mask])
def test_other_seeds_and_offsets_give_other_masks(draw: Callable[..., Tensor]) -> None:
    shape = torch.Size((2, 2, 300, 300))
    base = draw(shape, 0.5, SEED, OFFSET)
    assert torch.equal(draw(shape, 0.5, SEED, OFFSET), base)
    for seed, offset in (
        (-SEED, OFFSET),
        (SEED + (1 << 32), OFFSET),
        (SEED, OFFSET + (1 << 20)),
        (SEED, -OFFSET),
    ):
        agreement = (base == draw(shape, 0.5, seed, offset)).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(base.numel())


def test_the_reference_on_request_has_the_kernels_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = torch.Size((2, 2, 20, 20))
    pairs = (
        (plain.dropout_mask, reference.dropout_mask),
        (
            plain.attention_dropout_mask,
            reference.attention_dropout_mask,
        ),
    )
    for ours, kernels in pairs:
        assert not torch.equal(ours(shape, P, SEED, OFFSET), kernels(shape, P, SEED, OFFSET))
    monkeypatch.setenv("FUSEDGPT_KERNELS", "reference")
    for ours, kernels in pairs:
        assert torch.equal(ours(shape, P, SEED, OFFSET), kernels(shape, P, SEED, OFFSET))


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """bf16 bit by bit; fp32 but for the rounding of the scale and of what it is multiplied by."""
    torch.testing.assert_close(
        found,
        exact.to(found.dtype),
        rtol=0 if found.dtype == torch.bfloat16 else 3e-7,
        atol=1e-6 * (found.dtype == torch.float32),
    )


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (2, 3, 5), (40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    y = ops.dropout(x, P, SEED, OFFSET)
    y.backward(dy)
    factor = plain.dropout_mask(x.shape, P, SEED, OFFSET).double() / (1 - P)
    assert_rounded_once(y, x * factor)
    assert_rounded_once(x.grad, dy * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_dropout_and_its_gradients(dtype: torch.dtype) -> None:
    residual, x, dz = (torch.randn(40, 17).to(dtype) for _ in range(3))
    residual.requires_grad_()
    x.requires_grad_()
    z = plain.add_dropout(residual, x, P, SEED, OFFSET)
    z.backward(dz)
    factor = plain.dropout_mask(x.shape, P, SEED, OFFSET).double() / (1 - P)
    assert_rounded_once(z, residual + x * factor)
    assert torch.equal(residual.grad, dz)
    assert_rounded_once(x.grad, dz * factor)

"""The forms of attention that are faster on a CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.cpu.dropout import attention_dropout_mask


@pytest.mark.parametrize("T", [1, 2, 17, 130])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("packs", [False, True])
def test_attention_is_the_references(T: int, p: float, packs: bool) -> None:
    """Of q, k and v, and of the fused projection, whose gradient is made by hand."""
    exact = torch.randn(2, T, 3, 2, 8, dtype=torch.float64)
    dy = torch.randn(2, T, 2, 8, dtype=torch.float64)
    dropout = {"dropout_p": p, "seed": torch.tensor(5), "offset": torch.tensor(3), "scale": 0.7}
    for documents in (None, batch_documents(2, T)):
        results = []
        for attention in (ops.qkv_attention if packs else separate(ops.attention), separate(by_weights)):
            qkv = exact.clone().requires_grad_()
            y = attention(qkv, **dropout, documents=documents)
            results.append((y, *torch.autograd.grad(y, qkv, dy)))
        torch.testing.assert_close(*results)


def batch_documents(B: int, T: int) -> Tensor:
    """(B, T): two documents a row, of other lengths in each."""
    return (torch.arange(T) >= torch.arange(1, B + 1)[:, None] * T // 3).long()


def separate(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attention` of q, k and v as a function of (B, T, 3, H, D)."""
    return lambda qkv, **options: attention(*qkv.unbind(2), **options)


def by_weights(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return reference.attention_by_weights(q, k, v, **options, mask=attention_dropout_mask)


@pytest.mark.parametrize("T", [17, 128, 255, 256])
@pytest.mark.parametrize("packs", [False, True])
def test_attention_in_bf16_is_as_exact_as_sdpa(T: int, packs: bool) -> None:
    generator = torch.Generator().manual_seed(T)
    exact = torch.randn(1, T, 3, 2, 64, dtype=torch.float64, generator=generator).bfloat16().double()
    errors = []
    for attention in (ops.qkv_attention if packs else separate(ops.attention), separate(sdpa)):
        inputs = exact.bfloat16().requires_grad_()
        wide = exact.clone().requires_grad_()
        out, truth = attention(inputs), separate(sdpa)(wide)
        out.float().square().sum().backward()
        truth.square().sum().backward()
        assert inputs.grad is not None
        assert wide.grad is not None
        errors.append(((out - truth).norm(), (inputs.grad - wide.grad).norm(), (out - truth).mean().abs()))
    (ours, our_grad, our_bias), (theirs, their_grad, _) = errors
    assert ours <= 1.5 * theirs  # the standard's factors
    assert our_grad <= 2 * their_grad
    assert our_bias <= 1e-3 * exact.std()  # no rounding bias


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own causal attention on (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize(("T", "dtype"), [(255, torch.bfloat16), (256, torch.bfloat16), (17, torch.float32)])
def test_short_sequences_in_bf16_avoid_sdpa(
    T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(1, T, 2, 8).to(dtype)
    called = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x, **y: called.append(1) or sdpa(*x, **y)
    )
    ops.attention(q, q, q)
    ops.qkv_attention(torch.stack((q, q, q), dim=2))
    assert len(called) == (0 if T == 255 else 2)


@pytest.mark.parametrize("lengths", [torch.tensor([6, 6]), torch.tensor([3, 6]), torch.tensor([1, 40])])
def test_rows_that_no_sequence_has_filled_are_not_read(lengths: Tensor) -> None:
    q, k, v = torch.randn(2, 2, 8), *torch.randn(2, 2, 9, 2, 8)
    expected = reference.decode_attention(q, k, v, lengths)
    longest = int(lengths.max())
    k[:, longest:], v[:, longest:] = float("nan"), float("nan")
    torch.testing.assert_close(ops.decode_attention(q, k, v, lengths), expected)

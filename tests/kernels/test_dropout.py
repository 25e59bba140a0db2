"""The dropout kernel: the reference's mask bit by bit, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")

P = 0.3
SHAPES = [(1, 1), (3, 8), (5, 17), (2, 1023), (3, 1024), (2, 3000)]


def state(device: torch.device, step: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(7, device=device), torch.tensor(step << 40, device=device)


@pytest.mark.parametrize(("N", "C"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout_against_float64(N: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    for finding in check.measure(cases.dropout_case(N, C), dtype, device):
        assert finding.ok, finding


@pytest.mark.gpu
def test_dropout_against_float64_in_bf16(device: torch.device) -> None:
    for finding in check.measure(cases.dropout_case(512, 1023), torch.bfloat16, device):
        assert finding.ok, finding


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (2, 3, 5), (40, 17)])
def test_the_mask_is_the_references_forward_and_backward(
    shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.ones(shape, device=device, requires_grad=True)
    out = ops.dropout(x, P, *state(device))
    out.sum().backward()
    keep = reference.dropout_mask(x.shape, P, *state(device))
    assert torch.equal(out != 0, keep)
    assert torch.equal(x.grad, out.detach())
    torch.testing.assert_close(out.detach(), keep / (1 - P))


def test_every_step_has_its_own_mask(device: torch.device) -> None:
    x = torch.ones(64, 64, device=device)
    first, again, next_step = (ops.dropout(x, P, *state(device, step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert abs((first != 0).float().mean().item() - (1 - P)) < 5 * (P * (1 - P)) ** 0.5 / 64


def test_views_are_read_in_their_own_order(device: torch.device) -> None:
    x = torch.randn(16, 24, device=device).t()
    assert torch.equal(ops.dropout(x, P, *state(device)), ops.dropout(x.clone(), P, *state(device)))


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(3, 10, device=device)
    torch.library.opcheck(torch.ops.fusedgpt.dropout, (x, P, *state(device)))

"""The linear layer where matrices are narrower than vectors: what is computed in which dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedgpt.kernels import linear, ops, reference

BF16 = torch.bfloat16


class Launches(TorchDispatchMode):
    """Counts the ops that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view and "empty" not in op.name() and "_unsafe_view" not in op.name():
            self.names.append(op.name())
        return op(*args, **kwargs or {})


def test_a_wide_bias_costs_one_cast_and_one_sum() -> None:
    x, weight, dy = (torch.empty(s, dtype=BF16, device="meta") for s in ((8, 16), (24, 16), (8, 24)))
    bias = torch.empty(24, device="meta", requires_grad=True)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with Launches() as forward:
        y = ops.linear(x, weight, bias)
    with Launches() as backward:
        gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    assert forward.names == ["aten::_to_copy", "aten::addmm"]
    assert sorted(backward.names) == ["aten::mm", "aten::mm", "aten::sum.dim_IntList"]
    assert [g.dtype for g in gradients] == [BF16, BF16, torch.float32]


def test_the_gradient_of_a_wide_bias_is_not_rounded() -> None:
    x, weight = torch.randn(300, 16).to(BF16), torch.randn(24, 16).to(BF16)
    dy, bias = torch.randn(300, 24).to(BF16), torch.randn(24)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = linear._Linear.apply(*inputs)
    assert torch.equal(y, reference.linear(*inputs))
    dbias = torch.autograd.grad(y, bias, dy)[0]
    torch.testing.assert_close(dbias, dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)

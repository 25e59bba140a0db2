"""The embedding tied to a head: the gradient of both uses, and that it is made where the head's stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.cpu.embedding import tied_embedding

IDS = torch.tensor([[3, 5, 3, 0], [3, 4, 1, 5]])  # one of them three times, one never


def gradient(embedding: object, dtype: torch.dtype, *, head: bool = True, rows: bool = True) -> Tensor:
    """That of the weight of `embedding`, of which the head, the rows or both are used."""
    weight = torch.linspace(-1, 1, 6 * 3, dtype=dtype).view(6, 3).requires_grad_()
    found, tied = embedding(IDS, weight)  # type: ignore[operator]
    loss = torch.zeros((), dtype=dtype)
    if rows:
        loss = loss + (found * torch.linspace(0, 1, found.numel(), dtype=dtype).view(found.shape)).sum()
    if head:
        loss = loss + (torch.linspace(1, 2, 2 * 3, dtype=dtype).view(2, 3) @ tied.T).square().sum()
    (dweight,) = torch.autograd.grad(loss, weight)
    return dweight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uses", [{}, {"head": False}, {"rows": False}])
def test_gradient_is_that_of_two_plain_uses(dtype: torch.dtype, uses: dict[str, bool]) -> None:
    torch.testing.assert_close(
        gradient(tied_embedding, dtype, **uses), gradient(reference.embedding, dtype, **uses)
    )


def test_the_heads_gradient_becomes_the_weights() -> None:
    """Neither copied nor added to another."""
    made: list[int] = []

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: object, dloss: Tensor) -> Tensor:
            dweight = torch.ones(6, 3)
            made.append(dweight.data_ptr())
            return dweight

    weight = torch.zeros(6, 3, requires_grad=True)
    rows, tied = ops.embedding(IDS, weight)
    (rows.sum() + Head.apply(tied)).backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [2.0, 2.0, 1.0, 4.0, 2.0, 3.0]
    assert made == [weight.grad.data_ptr()]


def test_a_compiler_sees_a_plain_embedding() -> None:
    """Which it can fuse; opaque to it, ours would be a copy."""
    called: list[object] = []

    def backend(traced: torch.fx.GraphModule, _: object) -> object:
        called.extend(node.target for node in traced.graph.nodes if node.op == "call_function")
        return traced.forward

    weight = torch.zeros(6, 3, requires_grad=True)
    torch.compile(ops.embedding, backend=backend, fullgraph=True)(IDS, weight)
    assert called == [F.embedding]

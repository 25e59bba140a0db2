"""An embedding whose weight is also the head's: one gradient for both uses, where autograd makes three.

Autograd would make the rows' gradient as large as the weight, the head's as well, and their sum out of place.
Here the head's comes back through the embedding, which adds the rows' to it where it stands: 5% of a
12M model's step on two windows (docs/experiments.md, "Tied embedding").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dweight: Tensor) -> tuple[None, Tensor]:
        """None and dweight (P, C), to which drows (..., C) are added; zeros come for an output not used."""
        (idx,) = ctx.saved_tensors
        return None, dweight.index_add_(0, idx.flatten(), drows.flatten(end_dim=-2))


tied_embedding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _TiedEmbedding.apply

"""Custom ops: opaque to torch.compile, with a fake kernel, without a gradient.

Gradients are torch.autograd.Functions around these ops. torch.library's custom_op and register_autograd would
do the same with several layers of Python around each call: 2 to 3 times the time of the host for a small op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fusedgpt", "FRAGMENT")


def register_op(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op fusedgpt::name: calls `body`, or `fake` where only shapes, strides and dtypes count.

    body: mutates no argument and returns none; its annotations are the op's schema.
    """
    qualified = f"fusedgpt::{name}"
    _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.fusedgpt, name).default
    return op

"""Checks of the arguments of ops. Each raises a ValueError that names the argument and what was expected.

They run for each layer and token: an error's text is made only where one is raised.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def unexpected(argument: str, expected: object, got: object) -> ValueError:
    expected, got = (tuple(x) if isinstance(x, torch.Size) else x for x in (expected, got))
    return ValueError(f"{argument}: expected {expected}, got {got}")


def check_floating(**tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise unexpected(name, "a floating-point tensor", x.dtype)
        check_device(name, x, device)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise unexpected(name, f"device {device}", x.device)


def check_shape(name: str, x: Tensor, shape: torch.Size) -> None:
    if x.shape != shape:
        raise unexpected(name, shape, x.shape)


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if x.shape != other.shape:
        raise unexpected(name, f"the shape of {other_name}, {tuple(other.shape)}", x.shape)
    if dtype and x.dtype != other.dtype:
        raise unexpected(name, f"the dtype of {other_name}, {other.dtype}", x.dtype)


def check_integers(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_shape(name, x, shape)
    if x.dtype not in _INTEGERS:
        raise unexpected(name, "an integer tensor", x.dtype)
    check_device(name, x, device)


def check_size(name: str, what: str, size: int, most: int) -> None:
    if size > most:
        remedy = "for the Triton kernel (FUSEDGPT_KERNELS=reference takes any)"
        raise unexpected(name, f"{what} of at most {most} {remedy}", size)


def check_dropout(x: Tensor, p: float, seed: Tensor | None, offset: Tensor | None) -> None:
    """p within [0, 1); seed and offset int64 scalars on x's device where p > 0."""
    if not 0.0 <= p < 1.0:
        raise unexpected("dropout_p", "0 <= p < 1", p)
    for name, scalar in (("seed", seed), ("offset", offset)) if p > 0.0 else ():
        if scalar is None:
            raise unexpected(name, "an int64 scalar tensor when dropout_p > 0", scalar)
        if scalar.dtype != torch.int64 or scalar.ndim != 0:
            raise unexpected(name, "an int64 scalar tensor", (scalar.dtype, scalar.shape))
        check_device(name, scalar, x.device)

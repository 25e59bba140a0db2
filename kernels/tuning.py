"""Which GPU a launch is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SAFE_DEFAULT = (8, 0)  # also of the interpreter
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}  # A100, H100, B200
_assumed: list[tuple[int, int]] = []


@contextmanager
def assume_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Launch within the block as on a GPU of `capability`, e.g. (9, 0): for compiling without that GPU."""
    _assumed.append(capability)
    try:
        yield
    finally:
        _assumed.pop()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability to choose block sizes for."""
    if _assumed:
        return _assumed[-1]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _SAFE_DEFAULT


def multiprocessor_count(device: torch.device) -> int:
    """How many streaming multiprocessors `device` has; of the assumed GPU, or of an A100 on a CPU."""
    if device.type == "cuda" and not _assumed:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS.get(capability(device), 108)

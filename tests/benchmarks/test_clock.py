"""Timing by CUDA graphs: what can be captured is, what cannot is launched, and both leave PyTorch usable."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.clock import CUDA, DEVICE, Timed, choose, nothing


def test_the_backward_alone_can_be_timed() -> None:
    x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    timed = Timed((lambda: x.sin(), lambda y: torch.autograd.grad(y, x, torch.ones_like(y))))
    assert timed.captured is CUDA
    torch.testing.assert_close(timed.results(), [(x.cos(),)])
    assert min(timed.samples()) > 0
    with torch.no_grad():
        x.copy_(x.roll(1, 0))
    torch.testing.assert_close(timed.results(), [(x.cos(),)])


def test_calls_take_turns_on_their_inputs() -> None:
    x, seen = torch.randn(3, 64, 64, device=DEVICE), list[int]()
    timed = Timed(*((partial(seen.append, i), lambda _, i=i: x[i] @ x[i]) for i in range(3)))
    assert timed.captured is CUDA
    timed.samples()
    assert seen == choose(4, 2) * [0, 1, 2]  # on a GPU the last ones are captured
    torch.testing.assert_close(timed.results(), [y @ y for y in x])


@pytest.mark.gpu
def test_what_waits_for_the_device_is_timed_as_it_is_launched() -> None:
    x = torch.randn(4, 3, device=DEVICE)
    timed = Timed((nothing, lambda _: x * x.sum().item()))
    assert not timed.captured
    assert len(timed.samples()) >= 10
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device=DEVICE)  # a failed capture must not leave the generator in one
    assert Timed((nothing, lambda _: x @ x.T)).captured

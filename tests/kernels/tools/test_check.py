"""The check itself: what is wrong, biased, unwritten or raises is a failure, and hides no other."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from typer.testing import CliRunner

from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases, check
from fusedgpt.train.cli.main import app


def squares(ours: Callable[[torch.Tensor], torch.Tensor]) -> cases.Case:
    """x -> x^2 at (4096, 64), computed by `ours`."""
    return cases.Case(
        op="square",
        shape="(4096, 64)",
        inputs=lambda g: {"x": torch.randn(4096, 64, dtype=torch.float64, generator=g)},
        ours=ours,
        reference=lambda x: x * x,
    )


def with_gradient_of_square(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    square = x * x
    return value.detach() + (square - square.detach())


def truncated(x: torch.Tensor) -> torch.Tensor:
    """x^2, in every fourth column rounded towards zero: a small error that never averages out."""
    exact, near = x.double() ** 2, x * x
    towards_zero = torch.nextafter(near, torch.zeros_like(near))
    value = torch.where((near.double() > exact) & (torch.arange(64) % 4 == 0), towards_zero, near)
    return with_gradient_of_square(value, x)


def one_column_unwritten(x: torch.Tensor) -> torch.Tensor:
    return with_gradient_of_square((x * x).index_fill(1, torch.tensor([63]), float("nan")), x)


def half_the_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.detach() * x


def raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(f"no square\nfor {x.dtype}")


@pytest.fixture
def dropout_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "dropout", lambda x, p, seed, offset: x * 1.001)


@pytest.mark.parametrize(
    ("ours", "directions", "fault"),
    [
        (lambda x: x * x, [], ""),
        (lambda x: (x * x) * 1.01, ["forward", "backward"], "error"),
        (half_the_gradient, ["backward"], "error"),
        (one_column_unwritten, ["forward"], "error nan"),
        (truncated, ["forward"], "bias -"),
    ],
)
def test_what_fails(ours: Callable[..., torch.Tensor], directions: list[str], fault: str) -> None:
    findings = check.measure(squares(ours), torch.float16, torch.device("cpu"))
    assert [f.direction for f in findings] == ["forward", "backward"]
    failed = [f for f in findings if not f.ok]
    assert [f.direction for f in failed] == directions
    assert all(f"square (4096, 64) fp16 {f.direction}" in f.fault for f in failed)
    assert not failed or fault in failed[0].fault
    assert all(f.fault == "" for f in findings if f.ok)


def test_an_exception_fails_its_own_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = [squares(raises), squares(lambda x: x * x)]
    monkeypatch.setattr(check, "cases", lambda device: planted)
    broken, *others = check.check(torch.device("cpu"), dtypes=["fp16"])
    assert broken.fault == "square (4096, 64) fp16: RuntimeError: no square for torch.float16"
    assert broken.as_dict()["error"] is None
    assert [f.ok for f in others] == [True, True]


def test_every_op_with_a_kernel_has_cases(device: torch.device) -> None:
    assert {case.op for case in cases.cases(device)} == set(ops.OPS)


@pytest.mark.usefixtures("dropout_is_wrong")
def test_a_wrong_op_is_a_failed_command() -> None:
    done = CliRunner().invoke(app, ["kernels", "check", "--op", "dropout"])
    assert done.exit_code == 1
    assert "FAIL" in done.stdout
    assert "fusedgpt: dropout (3, 1024), p 0.3 fp32 forward out 0: error " in done.stderr
    done = CliRunner().invoke(app, ["kernels", "check", "--op", "dropout", "--json"])
    assert done.exit_code == 1
    assert not any(finding["ok"] for finding in json.loads(done.stdout))

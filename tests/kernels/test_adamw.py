"""The AdamW kernels against float64 and torch: options, dtypes, sizes, alignment, rounding, bad gradients."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from fusedgpt.kernels import adamw, reference, tensor_table
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")

PLAIN: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
DECAYING: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@dataclass
class Model:
    """Tensors and state of the launchers; tensor i belongs to group i % 2."""

    params: list[Tensor]
    step0: float = 0.0
    hyper: tuple[dict[str, Any], ...] = (PLAIN, DECAYING)
    exp_avgs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        device = self.params[0].device
        self.exp_avgs, self.exp_avg_sqs = (
            [torch.zeros_like(p, dtype=torch.float32) for p in self.params] for _ in range(2)
        )
        self.masters = [p.float() for p in self.params]  # fp32 parameters are their own
        self.steps = [torch.tensor(self.step0, device=device) for _ in self.params]
        self.norm, self.skipped = (torch.full((), math.nan, device=device) for _ in range(2))
        self.skipped_steps = torch.tensor(5, device=device)
        self.partials = torch.full((adamw.PARTIALS,), math.nan, device=device)
        rows = [adamw.hyper_row(**h) for h in self.hyper]
        self.rows = torch.tensor(rows, dtype=torch.float64, device=device)

    def batch(self, grads: list[Tensor]) -> tensor_table.Batch:
        lists = (self.params, grads, self.masters, self.exp_avgs, self.exp_avg_sqs, self.steps)
        return tensor_table.make_batch(*lists, [i % 2 for i in range(len(grads))])

    def step(self, grads: list[Tensor], max_norm: float = 0.0) -> None:
        batch = self.batch(grads)
        adamw.grad_norm(batch, self.rows, self.partials)
        results = (self.norm, self.skipped, self.skipped_steps)
        adamw.adamw(batch, self.partials, *results, max_norm=max_norm)

    @property
    def tensors(self) -> list[Tensor]:
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, self.masters, self.steps)
        return [x for tensors in lists for x in tensors]


class Truth:
    """The same in float64."""

    def __init__(self, params: list[Tensor], hyper: tuple[dict[str, Any], ...] = (PLAIN, DECAYING)) -> None:
        zeros = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        self.state = [(p.double(), zero, zero) for p, zero in zip(params, zeros, strict=True)]
        self.hyper, self.t = hyper, 0

    def step(self, grads: list[Tensor], max_norm: float = 0.0) -> None:
        self.t += 1
        wide = [g.double() for g in grads]
        clip = max(1.0, reference.grad_norm(wide).item() / max_norm) if max_norm else 1.0
        self.state = [
            reference.adamw(*self.with_grad(s, g / clip), self.t, **self.hyper[i % 2])
            for i, (s, g) in enumerate(zip(self.state, wide, strict=True))
        ]

    @staticmethod
    def with_grad(state: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return state[0], grad, state[1], state[2]


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item() if truth.numel() else 0.0


def theirs(params: list[Tensor], hyper: tuple[dict[str, Any], ...]) -> tuple[list[Tensor], torch.optim.AdamW]:
    copies = [p.clone().requires_grad_() for p in params]
    groups = [{"params": copies[i::2], **h} for i, h in enumerate(hyper)]
    return copies, torch.optim.AdamW(groups, fused=True)


def their_step(
    copies: list[Tensor], optimizer: torch.optim.Optimizer, grads: list[Tensor], clip: float
) -> None:
    for p, g in zip(copies, grads, strict=True):
        p.grad = g.to(p.dtype, copy=True)
    if clip:
        torch.nn.utils.clip_grad_norm_(copies, clip)
    optimizer.step()


@pytest.fixture
def no_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter a quarter faster: it follows each int32 operation by two in int64 that look for an
    overflow; other tests let it."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STABLE, DECAY = (PLAIN, DECAYING), (DECAYING, PLAIN)  # of tensors 0 and 1


@pytest.mark.parametrize(
    ("dtype", "clip", "hyper", "sizes", "steps"),
    [
        (
            F32,
            1.0,
            STABLE,
            (287,),
            300,
        ),  # two chunks; 7 ms per step, 4 more per chunk
        (F32, 0.0, DECAY, (256,), 300),
        (F16, 1.0, STABLE, (31,), 500),
        (F16, 0.0, DECAY, (256,), 300),
        *(
            pytest.param(dtype, clip, STABLE, (20_000, 31), 1000, marks=pytest.mark.gpu)
            for dtype in (F32, F16, BF16)
            for clip in (0.0, 1.0)
        ),
    ],
)
@pytest.mark.usefixtures("no_overflow_checks")
def test_many_steps_against_float64(
    dtype: torch.dtype,
    clip: float,
    hyper: tuple[dict[str, Any], ...],
    sizes: tuple[int, ...],
    steps: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type == "cpu":  # the interpreter's cost is that of blocks, not of elements
        monkeypatch.setattr(tensor_table, "CHUNK_SIZE", 256)
        for name in ("_NORM_BLOCK", "_BLOCK"):
            monkeypatch.setattr(adamw, name, 256)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]
    model = Model([p.clone() for p in params], hyper=hyper)
    truth = Truth(params, hyper)
    copies, optimizer = theirs([p.float() for p in params], hyper)
    drift = [torch.randn(n, generator=generator) for n in sizes]
    for _ in range(steps):
        noise = [torch.randn(n, generator=generator) for n in sizes]
        grads = [(d + 2.0 * x).to(device, dtype) for d, x in zip(drift, noise, strict=True)]
        model.step(grads, clip)
        truth.step(grads, clip)
        their_step(copies, optimizer, grads, clip)
    for i, (expected, *moments) in enumerate(truth.state):
        limit = 1.5 * error(copies[i].detach(), expected)
        assert error(model.masters[i], expected) <= limit
        assert torch.equal(model.params[i], model.masters[i].to(dtype))
        for name, mine, moment in zip(
            ("exp_avg", "exp_avg_sq"), (model.exp_avgs[i], model.exp_avg_sqs[i]), moments, strict=True
        ):
            assert error(mine, moment) <= max(1.5 * error(optimizer.state[copies[i]][name], moment), 2e-7)
        assert model.steps[i].item() == steps


def test_trajectories_are_torchs_in_fp32(device: torch.device) -> None:
    """With 1 - lr * weight_decay an fp32 number; torch rounds it, alone up to 3e-6 in 100 steps."""
    params = [torch.randn(200, device=device)]
    hyper = PLAIN | {"lr": 2.0**-10, "weight_decay": 2.0**-3}
    model, expected = Model([p.clone() for p in params], hyper=(hyper,)), params[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([expected], **hyper, fused=True)
    for _ in range(100):
        grads = [torch.randn_like(p) for p in params]
        model.step(grads, 2.0)
        their_step([expected], optimizer, grads, 2.0)
        assert error(model.params[0], expected.detach().double()) <= 1e-6


def test_same_bits_twice(device: torch.device) -> None:
    params = [torch.randn(n, device=device) for n in (9000, 33)]
    models = [Model([p.clone() for p in params]) for _ in range(2)]
    for seed in range(3):
        for model in models:
            torch.manual_seed(seed)
            model.step([torch.randn_like(p) for p in params], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(models[0].tensors, models[1].tensors, strict=True))
    assert torch.equal(models[0].norm, models[1].norm)


SIZES = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 1023, 1024, 1025, 3000, 8191, 8192, 8193])),
    min_size=1,
    max_size=3,
)
EXAMPLE: dict[str, Any] = {
    "sizes": [10**6, 3],
    "half": False,
    "shift": 0,
    "betas": (0.9, 0.95),
    "decay": 0.1,
    "max_norm": 1.0,
    "poison": None,
    "seed": 0,
}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=SIZES,
    half=st.booleans(),
    shift=st.integers(0, 3),
    betas=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.5, 0.95, 0.999])),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    max_norm=st.sampled_from([0.0, 1e-3, 1.0, 1e9]),
    poison=st.sampled_from([None, None, math.inf, -math.inf, math.nan]),
    seed=st.integers(0, 99),
)
@example(**EXAMPLE)
@example(**EXAMPLE | {"half": True, "shift": 1, "poison": math.nan, "seed": 1})
@example(**EXAMPLE | {"sizes": [0]})
def test_any_sizes_and_options(
    sizes: list[int],
    half: bool,
    shift: int,
    betas: tuple[float, float],
    decay: float,
    max_norm: float,
    poison: float | None,
    seed: int,
    device: torch.device,
) -> None:
    """`shift` elements into a buffer: odd ones cannot be read 16 bytes at a time."""
    torch.manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    params, grads = ([torch.randn(n + shift).to(device, dtype)[shift:] for n in sizes] for _ in range(2))
    hyper = (PLAIN | {"betas": betas, "eps": 1e-3}, DECAYING | {"weight_decay": decay})
    model, truth = Model(params, hyper=hyper), Truth(params, hyper)
    if poison is not None and sum(sizes):
        place = seed * 7919 % sum(sizes)
        for g in grads:
            if 0 <= place < len(g):
                g[place] = poison
            place -= len(g)
        before = [x.clone() for x in model.tensors]
        model.step(grads, max_norm)
        assert all(torch.equal(a, b) for a, b in zip(model.tensors, before, strict=True))
        assert (model.skipped.item(), model.skipped_steps.item()) == (1.0, 6)
        assert not model.norm.isfinite()
        return
    model.step(grads, max_norm)
    truth.step(grads, max_norm)
    assert (model.skipped.item(), model.skipped_steps.item()) == (0.0, 5)
    expected_norm = reference.grad_norm([g.double() for g in grads]).item()
    assert model.norm.item() == pytest.approx(expected_norm, rel=1e-6)
    for i, (p, *moments) in enumerate(truth.state):
        wide, eps = model.masters[i], 1e-6  # some roundings, and clip squared
        assert error(wide, p) <= eps
        assert all(
            error(x, m) <= eps
            for x, m in zip((model.exp_avgs[i], model.exp_avg_sqs[i]), moments, strict=True)
        )
        assert torch.equal(model.params[i], wide.to(dtype))
        assert model.steps[i].item() == 1


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 65_537, 1_000_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99999)])
def test_bias_corrections_at_any_step(step: int, betas: tuple[float, float], device: torch.device) -> None:
    hyper = (PLAIN | {"betas": betas},)
    model = Model([torch.zeros(1, device=device)], step0=step - 1.0, hyper=hyper)
    batch = model.batch([torch.zeros(1, device=device)])
    adamw.grad_norm(batch, model.rows, model.partials)
    step_size, decay, scale, eps, weight1, weight2, new_step, _ = batch.scalars[0].tolist()
    assert step_size == pytest.approx(PLAIN["lr"] / (1 - betas[0] ** step), rel=1e-7)
    assert scale == pytest.approx((1 - betas[1] ** step) ** -0.5, rel=1e-7)
    assert (weight1, weight2) == pytest.approx((1 - betas[0], 1 - betas[1]), rel=1e-7)
    assert (decay, eps, new_step) == (0.0, pytest.approx(1e-8), step)


def test_a_small_beta_keeps_small_gradients_after_large_ones(device: torch.device) -> None:
    hyper = (PLAIN | {"betas": (0.0, 0.25)},)
    model, truth = Model([torch.ones(9, device=device)], hyper=hyper), Truth([torch.ones(9)], hyper * 2)
    for size in (1e4, 1e-4):
        model.step([torch.full((9,), size, device=device)])
        truth.step([torch.full((9,), size)])
    assert torch.equal(model.exp_avgs[0], torch.full((9,), 1e-4, device=device))
    assert error(model.exp_avg_sqs[0].cpu(), truth.state[0][2]) <= 1e-6


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e4, 1e30])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_gradients_of_any_finite_size(size: float, max_norm: float, device: torch.device) -> None:
    """Where a square leaves fp32's range, the norm does too: the step is skipped, or the moment is 0."""
    hyper = (PLAIN,)
    params = [torch.linspace(-1.0, 1.0, 300, device=device)]
    model, before = Model([p.clone() for p in params], hyper=hyper), params[0].clone()
    model.step([torch.full_like(before, size)], max_norm)
    if size == 1e30:
        assert model.skipped.item() == 1.0
        assert torch.equal(model.params[0], before)
        return
    assert model.skipped.item() == 0.0
    truth = Truth(params, hyper)
    truth.step([torch.full_like(before, size)], max_norm)
    assert error(model.params[0], truth.state[0][0]) <= 1e-6
    assert all(x.isfinite().all() for x in model.tensors)


def test_an_update_does_not_depend_on_the_other_tensors(device: torch.device) -> None:
    """But for the clip factor: without one, the same bits in any batch and at any place in it."""
    sizes = (33, 5000, 300)
    params = [torch.linspace(-1.0, 1.0, n, device=device) for n in sizes]
    grads = [torch.linspace(-3.0, 2.0, n, device=device) for n in sizes]
    together = Model([p.clone() for p in params], hyper=(PLAIN, PLAIN))
    together.step(grads)
    for order in ([1], [2, 1], [1, 0, 2]):
        model = Model([params[i].clone() for i in order], hyper=(PLAIN, PLAIN))
        model.step([grads[i] for i in order])
        for place, i in enumerate(order):
            for mine, theirs in zip(
                (model.params, model.exp_avgs, model.exp_avg_sqs),
                (together.params, together.exp_avgs, together.exp_avg_sqs),
                strict=True,
            ):
                assert torch.equal(mine[place], theirs[i])


def test_all_batches_share_one_norm(device: torch.device) -> None:
    """Two dtypes are two batches: clipped together, skipped together, reported once."""
    models = [Model([torch.ones(3000, device=device, dtype=d)]) for d in (torch.float32, torch.float16)]
    grads = [torch.full_like(m.params[0], value) for m, value in zip(models, (3.0, 4.0), strict=True)]
    results = (models[0].norm, models[0].skipped, models[0].skipped_steps)
    partials = torch.full((2, adamw.PARTIALS), math.nan, device=device)
    for bad in (False, True):
        grads[1][-1] = math.inf if bad else 4.0
        batches = [m.batch([g]) for m, g in zip(models, grads, strict=True)]
        for batch, part in zip(batches, partials, strict=True):
            adamw.grad_norm(batch, models[0].rows, part)
        for i, batch in enumerate(batches):
            adamw.adamw(batch, partials, *results, max_norm=1.0, report=i == 1)
        assert [m.steps[0].item() for m in models] == [1.0, 1.0]
        assert models[0].skipped_steps.item() == 5 + bad
        if not bad:
            assert models[0].norm.item() == pytest.approx(5.0 * math.sqrt(3000))
            clipped = 0.1 * 3.0 / (5.0 * math.sqrt(3000))
            assert models[0].exp_avgs[0][0].item() == pytest.approx(clipped, rel=1e-6)


def test_addresses_beyond_2_to_the_31(device: torch.device) -> None:
    """A tensor of which only the last chunk, behind 2^31 elements, really exists."""
    ahead, n = (2**31 // tensor_table.CHUNK_SIZE + 1) * tensor_table.CHUNK_SIZE, 1500
    model, plain = (Model([torch.ones(n, device=device)]) for _ in range(2))
    grads = [torch.randn(n, device=device)]
    batch = model.batch(grads)
    batch.table[:, :5] -= 4 * ahead
    batch.table[:, 6] += ahead
    batch.chunks[:, 1] += ahead // tensor_table.CHUNK_SIZE
    adamw.grad_norm(batch, model.rows, model.partials)
    adamw.adamw(batch, model.partials, model.norm, model.skipped, model.skipped_steps)
    plain.step(grads)
    assert all(torch.equal(a, b) for a, b in zip(model.tensors, plain.tensors, strict=True))
    assert torch.equal(model.norm, plain.norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_one_step_against_float64(max_norm: float, dtype: torch.dtype, device: torch.device) -> None:
    (finding,) = check.measure(cases.adamw_case(301, 47, max_norm=max_norm), dtype, device)
    assert finding.ok, finding


@pytest.mark.gpu
def test_one_step_against_float64_in_bf16(device: torch.device) -> None:
    for finding in check.measure(cases.adamw_case(512, 1023, max_norm=1.0), torch.bfloat16, device):
        assert finding.ok, finding

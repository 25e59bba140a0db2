"""The Muon kernels against float64: shapes, alignment, scales, ranks; no matrix sees another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import adamw, muon, reference, tensor_table
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}
SHAPES = [(1, 1), (1, 40), (40, 1), (5, 3), (16, 16), (33, 64), (64, 20), (65, 70), (300, 17)]
PRESETS = [(384, 384), (1536, 384), (512, 2048), (64, 768), (768, 768), (768, 3072), (64, 1600), (6400, 1600)]
ON_A_GPU = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # where small matrices shall have several
        monkeypatch.setattr(muon, "_TILE", 32)
        monkeypatch.setattr(muon, "_TILE_K", 32)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double().cpu() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    ("shape", "dtype", "limit"),
    [
        *((shape, torch.float32, 1e-5) for shape in SHAPES),
        ((129, 40), torch.float16, 0.01),
        *(pytest.param(shape, torch.bfloat16, 0.06, marks=ON_A_GPU) for shape in (*SHAPES, *PRESETS)),
    ],
)
def test_orthogonalise_against_float64(
    shape: tuple[int, int], dtype: torch.dtype, limit: float, device: torch.device
) -> None:
    x = randn(3, *shape)
    before = x.to(device, dtype)
    ours = muon.orthogonalise(before.clone())
    assert ours.dtype == dtype
    assert error(ours, reference.orthogonalise(before.double().cpu())) < limit


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4, 1e9])
def test_the_scale_of_a_gradient_does_not_count(scale: float, device: torch.device) -> None:
    x = randn(2, 20, 50).to(device).float()
    torch.testing.assert_close(muon.orthogonalise(scale * x), muon.orthogonalise(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-25, 1e-38])
def test_next_to_no_gradient_is_next_to_no_step(value: float, device: torch.device) -> None:
    step = muon.orthogonalise(torch.full((2, 20, 50), value, device=device))
    assert (step.abs() < 1e-5).all()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_what_has_no_direction_gets_none(shape: tuple[int, int], device: torch.device) -> None:
    """Rank 3 with an outlier of 1e4: the singular values of 0 stay small, the others come near 1."""
    x = randn(shape[0], 3) @ randn(3, shape[1], seed=1)
    x[0, 0] += 1e4  # a fourth direction, far larger than the others
    values = torch.linalg.svdvals(muon.orthogonalise(x[None].to(device).float())[0].cpu())
    assert 0.7 < values[0] < 1.3
    assert values[4:].max() < 1e-2
    expected = torch.linalg.svdvals(reference.orthogonalise(x))
    torch.testing.assert_close(values.double(), expected, rtol=0.0, atol=1e-2)


def test_a_matrix_gets_the_same_bits_in_any_batch(device: torch.device) -> None:
    x = randn(3, 40, 50).to(device).float()
    alone = torch.cat([muon.orthogonalise(matrix[None]) for matrix in x])
    assert torch.equal(muon.orthogonalise(x), alone)
    assert torch.equal(muon.orthogonalise(x.flip(0)).flip(0), alone)


class Model:
    """n parameters (R, C) with the state that a step reads and writes."""

    def __init__(
        self, n: int, R: int, C: int, dtype: torch.dtype, device: torch.device, *, ahead: int = 0
    ) -> None:
        """ahead: elements by which every tensor misses the start of its memory, and so its alignment."""

        def place(x: Tensor, kind: torch.dtype) -> Tensor:
            memory = torch.empty(ahead + x.numel(), dtype=kind, device=device)
            return memory[ahead:].copy_(x.flatten()).view(x.shape)

        made = [randn(4, R, C, seed=i) for i in range(n)]
        self.params = [place(p, dtype) for p, *_ in made]
        self.grads = [place(g, dtype) for _, g, *_ in made]
        self.momenta = [place(m, torch.float32) for *_, m, _ in made]
        self.masters = [place(p, torch.float32) for p in self.params] if dtype.itemsize == 2 else self.params
        self.shape, self.n = (R, C), n

    def step(self, *, max_norm: float = 0.0, grad_scale: float = 1.0) -> None:
        device = self.params[0].device
        steps = [torch.zeros((), device=device)] * self.n
        tensors = (self.params, self.grads, self.masters, self.momenta, self.momenta, steps)
        batch = tensor_table.make_batch(*tensors, [0] * self.n)
        hyper = torch.tensor([muon.hyper_row(momentum=0.9, **OPTIONS)], dtype=torch.float64, device=device)
        partials = torch.empty(adamw.PARTIALS, device=device)
        adamw.grad_norm(batch, hyper, partials)
        norm = partials.double().sum().sqrt().float() / grad_scale
        scale = None if grad_scale == 1.0 else torch.tensor(grad_scale, device=device)
        muon.muon(batch, self.shape, norm, max_norm=max_norm, grad_scale=scale, dtype=torch.float32)

    def truth(self, factor: float) -> list[tuple[Tensor, ...]]:
        """Of the masters and momenta after a step whose gradients are multiplied by `factor`."""
        lists = zip(self.masters, self.grads, self.momenta, strict=True)
        wide = ([x.double().cpu() for x in tensors] for tensors in lists)
        return [reference.muon(p, g * factor, m, beta=0.9, **OPTIONS) for p, g, m in wide]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("max_norm", "grad_scale"), [(0.0, 1.0), (0.5, 1.0), (0.5, 8.0), (1e9, 8.0)])
def test_a_step_against_float64(
    dtype: torch.dtype, ahead: int, max_norm: float, grad_scale: float, device: torch.device
) -> None:
    model = Model(2, 45, 23, dtype, device, ahead=ahead)  # 1035 elements: a block, and part of one
    norm = math.sqrt(sum(g.double().square().sum().item() for g in model.grads)) / grad_scale
    clip = max_norm / norm if 0 < max_norm < norm else 1.0
    truth = model.truth(clip / grad_scale)
    model.step(max_norm=max_norm, grad_scale=grad_scale)
    for i, (expected, momentum) in enumerate(truth):
        assert error(model.masters[i], expected) < 1e-6
        assert error(model.momenta[i], momentum) < 1e-6
        assert torch.equal(model.params[i], model.masters[i].to(dtype))


def test_several_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_table, "CHUNK_SIZE", 256)
    monkeypatch.setattr(muon, "_BLOCK", 256)
    model = Model(3, 30, 40, torch.float32, device)
    truth = model.truth(1.0)
    model.step()
    assert all(error(p, expected) < 1e-6 for p, (expected, _) in zip(model.params, truth, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, device: torch.device) -> None:
    model = Model(2, 20, 30, torch.float16, device)
    model.grads[1][3, 3] = poison
    state = [*model.params, *model.masters, *model.momenta]
    before = [x.clone() for x in state]
    model.step(max_norm=1.0)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@ON_A_GPU
@pytest.mark.parametrize("shape", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cases_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    for finding in check.measure(cases.muon_case(3, *shape), dtype, device):
        assert finding.ok, finding

"""Chunked linear + cross-entropy, in Triton and in plain PyTorch, against all logits at once in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import cross_entropy, ops, reference
from fusedgpt.kernels import linear_cross_entropy as lce
from fusedgpt.kernels.cpu import linear
from fusedgpt.kernels.cpu import linear_cross_entropy as plain
from fusedgpt.kernels.tools import cases, check

# Of columns beyond the vocabulary, whose exponentials are thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.1, "z_loss": 1e-2}]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output nobody wrote fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")


@pytest.fixture(params=["reference", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths: plain PyTorch and Triton."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", request.param)
    return str(request.param)


def problem(
    N: int, C: int, V: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, C), weight padded to a multiple of 128 (P, C), targets (N,) with every seventh ignored."""
    generator = torch.Generator().manual_seed(N + V)
    P = -(-V // 128) * 128
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = (torch.randn(P, C, generator=generator, dtype=torch.float64) / C**0.5).to(device, dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[3::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device)


def gradients(function: Any, hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """[loss, dhidden, dweight] for an upstream gradient that is not 1."""
    loss = function(hidden, weight, *args, **kwargs)
    upstream = torch.linspace(-2.0, 3.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)]


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def loss_options(V: int) -> lce.LossOptions:
    return lce.LossOptions(vocab_size=V, ignore_index=-100, label_smoothing=0.0, z_loss=0.0)


def launched(hidden: Tensor, weight: Tensor, targets: Tensor, V: int, rows: int) -> list[Tensor]:
    """[losses, dhidden, dweight] of the sum, in chunks of `rows`."""
    counted = (targets != -100).float()
    exact = hidden.detach(), weight.detach(), targets, counted
    return list(lce.linear_cross_entropy_fwd(*exact, loss_options(V), rows))


# --- against float64


@pytest.mark.parametrize("N", [1, 2, 17, 97])
@pytest.mark.parametrize("V", [65, 257])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_plain_equals_the_reference_in_float64(
    N: int, V: int, reduction: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "ROWS", 32)
    monkeypatch.setattr(plain, "_SOFTMAX_LOGITS", 5 * V)
    args = problem(N, 24, V, torch.float64)
    kwargs: dict[str, Any] = {"vocab_size": V, "reduction": reduction, **options}
    for ours, truth in zip(
        gradients(ops.linear_cross_entropy, *args, **kwargs),
        gradients(reference.linear_cross_entropy, *args, **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    ("dtype", "V", "allowed"),
    [  # times the error of the unfused op in the same dtype: the standard's 1.5 for the loss, 2 for gradients
        (torch.float32, 50257, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 50257, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 50304, (1.5, 2.0, 2.0)),
        (torch.bfloat16, 65, (1.5, 2.0, 2.0)),
        (torch.float16, 50257, (1.5, 2.0, 2.0)),
    ],
)
@pytest.mark.parametrize("onednn", [False, True])
def test_plain_error_is_no_larger_than_pytorchs(
    dtype: torch.dtype, V: int, allowed: tuple[float, ...], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "USES_ONEDNN", onednn and linear.HAS_ONEDNN)
    monkeypatch.setattr(plain, "ROWS", 64)
    args = problem(200, 64, V, dtype)
    exact = [args[0].detach().double().requires_grad_(), args[1].detach().double().requires_grad_(), args[2]]
    truth = gradients(reference.linear_cross_entropy, *exact, vocab_size=V)
    ours = gradients(ops.linear_cross_entropy, *args, vocab_size=V)
    theirs = gradients(reference.linear_cross_entropy, *args, vocab_size=V)
    for x, y, true, factor in zip(ours, theirs, truth, allowed, strict=True):
        floor = torch.finfo(torch.float32).eps  # of one scalar: a lucky zero is no bar
        assert relative_error(x, true) <= factor * relative_error(y, true) + floor
        assert abs((x.double() - true).mean()) <= 1e-3 * true.abs().mean()  # no bias


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [1.0, 30.0])  # from even to certain: p - 1 of the target is then small
def test_plain_error_with_options_and_certain_rows(options: dict[str, float], scale: float) -> None:
    hidden, weight, _ = problem(64, 32, 300, torch.bfloat16)
    hidden = (hidden.detach() * scale).requires_grad_()
    targets = (hidden @ weight[:300].T).argmax(1).where(torch.arange(64) % 3 > 0, torch.arange(64))
    kwargs: dict[str, Any] = {"vocab_size": 300, **options}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference.linear_cross_entropy, *exact, targets, **kwargs)
    ours = gradients(ops.linear_cross_entropy, hidden, weight, targets, **kwargs)
    theirs = gradients(reference.linear_cross_entropy, hidden, weight, targets, **kwargs)
    for x, y, true, factor in zip(ours, theirs, truth, (1.5, 2.0, 2.0), strict=True):  # the standard's
        assert relative_error(x, true) <= factor * relative_error(y, true) + torch.finfo(torch.float32).eps


def test_a_vocabulary_larger_than_fp16s_numbers() -> None:
    """A sum of 70,000 equal exponentials is infinite there."""
    hidden, weight, targets = problem(8, 16, 70000, torch.float16)
    weight = weight.detach().zero_().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference.linear_cross_entropy, *exact, targets, vocab_size=70000, reduction="sum")
    ours = gradients(ops.linear_cross_entropy, hidden, weight, targets, vocab_size=70000, reduction="sum")
    assert relative_error(ours[0], truth[0]) < 1e-6
    assert ours[1].abs().max() == 0
    assert relative_error(ours[2], truth[2]) < 1e-3  # fp16 has 11 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_above_57_is_made_again_from_the_largest_logit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    origins = []
    losses = plain._losses
    monkeypatch.setattr(plain, "_losses", lambda *a, **k: origins.append(a[3]) or losses(*a, **k))
    hidden, weight, targets = problem(8, 16, 300, dtype)
    gradients(ops.linear_cross_entropy, hidden, weight, targets, vocab_size=300)
    assert origins == ["target"]
    row = int((targets != -100).nonzero()[0])
    with torch.no_grad():
        weight[targets[row]] = -70 * hidden[row] / hidden[row].square().sum()  # a logit of -70
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference.linear_cross_entropy, *exact, targets, vocab_size=300, reduction="sum")
    ours = gradients(ops.linear_cross_entropy, hidden, weight, targets, vocab_size=300, reduction="sum")
    assert origins == ["target", "target", "largest"]
    assert truth[0] > 70
    for found, expected in zip(ours, truth, strict=True):
        assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("N", "C", "V", "reduction", "options"),
    [
        (1, 24, 65, "none", {}),
        (2, 24, 65, "mean", {}),
        (48, 40, 65, "none", {"label_smoothing": 0.1, "z_loss": 1e-2}),
        (5, 40, 65, "sum", {"label_smoothing": 0.1}),
        (17, 64, 257, "none", {"z_loss": 1e-2}),
        (5, 40, 257, "mean", {"label_smoothing": 0.1, "z_loss": 1e-2}),
        (9, 48, 8192, "none", {"label_smoothing": 0.1}),  # exactly one block of columns
        (9, 64, 50257, "none", {}),
        (9, 64, 50304, "none", {"label_smoothing": 0.1, "z_loss": 1e-2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_float64(
    N: int,
    C: int,
    V: int,
    reduction: str,
    options: dict[str, float],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = cases.linear_cross_entropy_case(N, C, V, reduction=reduction, **options)
    for finding in check.measure(case, dtype, device):
        assert finding.ok, finding.fault


@pytest.mark.gpu
@pytest.mark.parametrize("V", [50257, 50304, 65])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("fp32_weight", [False, True])
def test_against_float64_in_bf16(V: int, reduction: str, fp32_weight: bool, device: torch.device) -> None:
    case = cases.linear_cross_entropy_case(1024, 768, V, reduction=reduction, fp32_weight=fp32_weight)
    for finding in check.measure(case, torch.bfloat16, device):
        assert finding.ok, finding.fault


# --- chunks and their memory


def test_the_plain_gradient_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(1024, 32, 300, torch.float32)
    truth = gradients(reference.linear_cross_entropy, *args, vocab_size=300)
    for rows in (1024, 64, 4, 1):
        monkeypatch.setattr(plain, "ROWS", rows)
        for ours, true in zip(gradients(ops.linear_cross_entropy, *args, vocab_size=300), truth, strict=True):
            assert relative_error(ours, true.double()) < 1e-6  # fp32 sums of 1024 rows in another order


@pytest.mark.parametrize(("N", "chunks"), [(125, 16), (256, 256), (1024, 1024)])
def test_the_gradient_does_not_depend_on_the_chunks(N: int, chunks: int, device: torch.device) -> None:
    args = problem(N, 32, 300, torch.float32, device)
    if N > 256 and device.type == "cpu":  # ignored rows cost the interpreter little
        args[2][torch.arange(N) % 4 > 0] = -100
    truth = gradients(reference.linear_cross_entropy, *args, vocab_size=300, reduction="sum")
    losses, dhidden, dweight = launched(*args, V=300, rows=-(-N // chunks))
    upstream = -2.0  # what `gradients` gives a scalar
    for ours, true in zip((losses.sum(), upstream * dhidden, upstream * dweight), truth, strict=True):
        assert relative_error(ours, true.double()) < 1e-6  # fp32 sums of up to 1024 rows in another order


def test_the_weight_gradient_is_summed_in_fp32(device: torch.device) -> None:
    """192 parts of one sign: a half-precision sum of them is wrong by more than the standard allows."""
    N, C, V = 192, 32, 65
    hidden, weight, targets = problem(N, C, V, torch.float16, device)
    hidden = hidden.detach().abs().requires_grad_()
    targets[targets >= 0] = 3
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    sum_of = {"vocab_size": V, "reduction": "sum"}
    truth, theirs = (
        torch.autograd.grad(reference.linear_cross_entropy(h, w, targets, **sum_of), w)[0].double()
        for h, w in (exact, (hidden, weight))
    )
    ours = launched(hidden, weight, targets, V, rows=1)[2].to(torch.float16)
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)  # the standard, backward


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func of meta tensors."""
    try:
        return func(*args, **kwargs)
    except TypeError:  # in torch 2.11's meta kernel
        if func is not torch.ops.aten.addmm.dtype_out:
            raise
        return kwargs["out"]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: `peak` is the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = call(func, args, kwargs or {})
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in before | self.alive.keys():
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def reduced_precision() -> tuple[bool, bool]:
    """Whether cuBLAS may add up (bf16, fp16) products in their own dtype."""
    matmul = torch.backends.cuda.matmul
    return matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction


class Settings(TorchDispatchMode):
    """Keeps what cuBLAS may do in half precision while matrices are multiplied, and each product's dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: list[tuple[bool, bool]] = []
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []  # of a factor and the product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(func, args, kwargs or {})
        if func._opname in ("mm", "addmm"):
            self.reduced.append(reduced_precision())
            self.dtypes.append((args[1].dtype, out.dtype))
        return out


class NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def peak_of_a_step(
    N: int, C: int, P: int, dtype: torch.dtype, weight_dtype: torch.dtype, rows: int | None = None
) -> int:
    """What one forward and backward allocate at the worst moment, on the meta device."""
    hidden = torch.empty(N, C, dtype=dtype, device="meta")
    weight = torch.empty(P, C, dtype=weight_dtype, device="meta")
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    row_scale, dtotal = torch.empty(N, device="meta"), torch.empty((), device="meta")
    with PeakMemory() as memory:
        args = hidden, weight, targets, row_scale, loss_options(P), rows
        dhidden, dweight = lce.linear_cross_entropy_fwd(*args)[1:]
        outputs = lce._scaled(dhidden, dtotal, dtype)
        outputs = outputs, lce._scaled(dweight, dtotal, weight_dtype)
    return memory.peak


@pytest.mark.parametrize(
    ("N", "C", "P", "rows"),
    [
        (20, 8, 300, None),  # one chunk, rows of the buffer are padded
        (20, 8, 256, 3),
        (200, 64, 128, 8),  # the backward takes more than the forward
    ],
)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_memory_is_what_the_shapes_say(
    N: int, C: int, P: int, rows: int | None, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_cross_entropy_kernel", NoKernel())
    expected = lce.extra_bytes(N, C, P, torch.bfloat16, weight_dtype, rows)
    assert peak_of_a_step(N, C, P, torch.bfloat16, weight_dtype, rows) == expected


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_memory_bound(weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_cross_entropy_kernel", NoKernel())
    shape = 65536, 768, 50304, torch.bfloat16, weight_dtype
    assert peak_of_a_step(*shape) == lce.extra_bytes(*shape) < 2e9


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_memory_bound_on_a_gpu(weight_dtype: torch.dtype, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    hidden = torch.randn(65536, 768, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50304, 768, device=device, dtype=weight_dtype, requires_grad=True)
    targets = torch.randint(50304, (65536,), device=device)
    peaks = []
    for _ in range(2):  # the first call makes cuBLAS's workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 2e9
    assert peaks[1] == pytest.approx(
        lce.extra_bytes(*hidden.shape, 50304, hidden.dtype, weight_dtype), rel=0.02
    )


def test_sums_of_half_precision_products_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """dhidden's have V terms; dweight does not pass through a product rounded to bf16."""
    monkeypatch.setattr(cross_entropy, "_cross_entropy_kernel", NoKernel())
    with Settings() as settings:
        peak_of_a_step(20, 8, 300, torch.bfloat16, torch.float32, rows=16)
    assert settings.reduced == [(False, False)] * 6  # of two chunks: logits, dhidden, dweight
    bf16, fp32 = torch.bfloat16, torch.float32
    assert settings.dtypes == [(bf16, bf16), (bf16, bf16), (bf16, fp32)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dhidden_is_as_exact_as_a_sum_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    """50,304 terms of one sign for each element, whatever the caller lets cuBLAS do."""
    V = 50304
    hidden, weight, targets = problem(1024, 768, V, dtype, device)
    weight = (weight.detach().abs() / 8).requires_grad_()
    dhidden = launched(hidden.detach() / 8, weight, targets, V, rows=1024)[1]
    dlogits = (hidden.detach() / 8) @ weight.detach().T
    counted, losses = (targets != -100).float(), torch.empty(1024, device=device)
    cross_entropy.cross_entropy(dlogits, targets, counted, losses, loss_options(V))
    truth = dlogits.double() @ weight.detach().double()
    exact = relative_error((dlogits.float() @ weight.detach().float()).to(dtype), truth)
    assert relative_error(dhidden, truth) <= 1.01 * exact
    bias = ((dhidden.double() - truth) * truth.sign()).mean() / (
        dhidden.double() - truth
    ).square().mean().sqrt()
    assert abs(bias) < 0.02 + 5 / 1024**0.5  # the standard's


def test_chunks_depend_on_the_vocabulary() -> None:
    assert lce.rows_per_chunk(50304, torch.bfloat16) == 8192
    assert lce.rows_per_chunk(50257, torch.float32) == 4096
    assert lce.rows_per_chunk(65, torch.bfloat16) == 1 << 22
    assert lce.rows_per_chunk(1 << 31, torch.float32) == 1


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_in_one_chunk(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    hidden, weight, targets = problem(45000, 64, 50304, torch.bfloat16, device)
    one, many = (launched(hidden, weight, targets, 50304, rows) for rows in (45000, 4096))
    for x, y in zip(one, many, strict=True):
        assert relative_error(x, y.double()) < 1e-3  # bf16 sums in another order


# --- what goes in and comes out


@pytest.mark.parametrize(("V", "P"), [(65, 65), (65, 129), (65, 1000), (8192, 8320), (300, 300)])
def test_any_padding_is_left_out(V: int, P: int, triton: None, device: torch.device) -> None:
    """Also where the weight's rows do not fill the buffer's, or where whole blocks of columns are padding."""
    hidden, _, targets = problem(5, 16, V, torch.float32, device)
    weight = torch.randn(P, 16, device=device, generator=torch.Generator(device).manual_seed(1))
    weight[V:] = 100.0  # would dominate every softmax
    weight.requires_grad_()
    truth = gradients(reference.linear_cross_entropy, hidden, weight, targets, vocab_size=V)
    ours = gradients(ops.linear_cross_entropy, hidden, weight, targets, vocab_size=V)
    for x, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, true)
    assert weight[V:].numel() == 0 or ours[2][V:].abs().max() == 0


def test_padding_gets_no_gradient(path: str, device: torch.device) -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32, device)
    (dweight,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets, vocab_size=65), weight)
    assert dweight[:65].abs().min() > 0
    assert dweight[65:].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_counts_nowhere(reduction: str, path: str, device: torch.device) -> None:
    hidden, weight, _ = problem(6, 16, 65, torch.float32, device)
    targets = torch.tensor([7, 3, 7, 64, 0, 7], device=device)  # 7 is a token, but ignored here
    kept = torch.tensor([1, 3, 4])
    options = {"vocab_size": 65, "ignore_index": 7, "reduction": reduction, "label_smoothing": 0.1}
    losses = ops.linear_cross_entropy(hidden, weight, targets, **options)
    alone = ops.linear_cross_entropy(hidden[kept], weight, targets[kept], **options)
    if reduction == "none":
        assert losses[[0, 2, 5]].abs().max() == 0
        losses = losses[kept]
    torch.testing.assert_close(losses, alone)
    dhidden = torch.autograd.grad(losses.sum(), hidden)[0]
    torch.testing.assert_close(dhidden[kept], torch.autograd.grad(alone.sum(), hidden)[0][kept])
    assert dhidden[[0, 2, 5]].abs().max() == 0


@pytest.mark.parametrize("targets", [torch.empty(0, dtype=torch.int64), torch.full((5,), -100)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_count_is_zero(targets: Tensor, reduction: str, path: str, device: torch.device) -> None:
    hidden = torch.randn(len(targets), 16, device=device, requires_grad=True)
    weight = torch.randn(128, 16, device=device, requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, weight, targets.to(device), reduction=reduction).sum()
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_huge_logits_stay_finite(path: str, device: torch.device) -> None:
    hidden, weight, targets = problem(8, 16, 65, torch.float32, device)
    loss, dhidden, dweight = gradients(
        ops.linear_cross_entropy, hidden.detach().mul(1e4).requires_grad_(), weight, targets, vocab_size=65
    )
    assert loss > 1e3
    assert all(x.isfinite().all() for x in (loss, dhidden, dweight))


@pytest.mark.parametrize(
    ("scale", "z_loss"),
    [
        (-100.0, 0.0),  # lse below -88.7, where exp is denormal
        (-100.0, 1e4),
        (0.0, 0.0),  # all logits tie for the maximum
        (1e4, 0.0),
    ],
)
def test_adversarial_logits(scale: float, z_loss: float, path: str, device: torch.device) -> None:
    weight = torch.full((65, 1), scale, device=device)
    weight[3::4] *= 1.0 if scale <= 0 else -1.0  # outliers of both signs, tied
    weight.requires_grad_()
    hidden = torch.linspace(1.0, 1.5, 4, device=device)[:, None].requires_grad_()
    targets = torch.tensor([0, 3, 64, -100], device=device)
    options: dict[str, Any] = {"z_loss": z_loss, "reduction": "sum"}
    ours = gradients(ops.linear_cross_entropy, hidden, weight, targets, **options)
    theirs = gradients(reference.linear_cross_entropy, hidden, weight, targets, **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference.linear_cross_entropy, *exact, targets, **options)
    for x, y, true, factor in zip(ours, theirs, truth, (1.5, 2.0, 2.0), strict=True):  # the standard's
        size = max(true.norm().item(), abs(scale), 1.0)  # where terms cancel, of what they were made
        floor = 4 * torch.finfo(torch.float32).eps * size * max(1.0, abs(z_loss * scale))
        assert (x - true).norm() <= factor * (y - true).norm() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, device: torch.device) -> None:
    """Of the row kernel; cuBLAS's products depend on the number of rows."""
    logits = torch.randn(7, 384, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    targets, scale = torch.tensor([3, -100, 0, 299, 5, 7, 7], device=device), torch.rand(7, device=device)
    results = []
    for rows in (torch.arange(7), torch.arange(6, -1, -1), torch.tensor([4])):
        part, losses = logits[rows], torch.empty(len(rows), device=device)
        cross_entropy.cross_entropy(part, targets[rows], scale[rows], losses, loss_options(300))
        results.append((losses, part))
    together, reversed_, alone = results
    for x, y, z in zip(together, reversed_, alone, strict=True):
        assert torch.equal(x, y.flip(0))
        assert torch.equal(x[4:5], z)


def test_a_small_loss_keeps_its_digits_beside_large_logits(triton: None, device: torch.device) -> None:
    """lse and the target's logit are ~1000.5 and ~1000, each with an error of 3e-5; the loss is 0.01."""
    weight = torch.tensor([[1000.0], [995.5], [-3.0]], device=device)
    hidden, target = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    loss = ops.linear_cross_entropy(hidden, weight, target)
    true = reference.linear_cross_entropy(hidden.double(), weight.double(), target)
    assert relative_error(loss, true) < 1e-6


def test_the_mean_of_many_rows_has_an_fp16_gradient(path: str, device: torch.device) -> None:
    """softmax / rows is among fp16's denormals, so the division has to come after the matrix products."""
    hidden, weight, _ = problem(8, 16, 50257, torch.float16, device)
    weight = weight.detach().zero_().requires_grad_()  # every probability is 2e-5
    targets = torch.zeros(8, dtype=torch.int64, device=device)
    loss = ops.linear_cross_entropy(hidden, weight, targets, vocab_size=50257)
    (dweight,) = torch.autograd.grad(loss, weight, torch.full_like(loss, 2.0**14))  # as a loss scaler's
    truth = hidden.detach().double().mean(0) * 2.0**14 / 50257
    assert relative_error(dweight[1], truth) < 2e-3  # 2e-5 has 9 bits in fp16, 2e-5 / 8 has 6


def test_fp32_weight_with_half_hidden_gets_an_fp32_gradient(path: str, device: torch.device) -> None:
    dtype = torch.float16 if path == "triton" else torch.bfloat16
    hidden, weight, targets = problem(64, 32, 300, torch.float32, device)
    low = hidden.detach().to(dtype).requires_grad_()
    loss = ops.linear_cross_entropy(low, weight, targets, vocab_size=300)
    dhidden, dweight = torch.autograd.grad(loss, (low, weight))
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, dtype, torch.float32)
    true = torch.autograd.grad(
        reference.linear_cross_entropy(hidden, weight, targets, vocab_size=300), weight
    )
    assert relative_error(dweight, true[0].double()) < 2e-2  # bf16 has 8 bits


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_upstream_gradient_is_not_rounded_to_half(
    reduction: str, path: str, device: torch.device
) -> None:
    dtype = torch.float16 if path == "triton" else torch.bfloat16
    args = problem(32, 16, 65, dtype, device)
    loss = ops.linear_cross_entropy(*args, vocab_size=65, reduction=reduction)
    third, one = (
        torch.autograd.grad(loss, args[1], torch.full_like(loss, x), retain_graph=True)[0]
        for x in (1 / 3, 1.0)
    )
    ratio = third.double().norm() / one.double().norm()
    # Of 1/3 itself fp16 makes 0.33325 and bf16 0.33398, -2.4e-4 and 2e-3 off; errors of many elements cancel.
    assert ratio == pytest.approx(1 / 3, rel=1e-4 if path == "triton" else 4e-4)


def test_any_strides(path: str, device: torch.device) -> None:
    hidden, weight, targets = problem(12, 16, 65, torch.float32, device)
    views = [x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight)]
    spread = torch.stack((targets, targets), dim=1)[:, 0]
    for reduction in ("mean", "none"):
        straight = gradients(
            ops.linear_cross_entropy, hidden, weight, targets, vocab_size=65, reduction=reduction
        )
        strided = gradients(ops.linear_cross_entropy, *views, spread, vocab_size=65, reduction=reduction)
        for x, y in zip(strided, straight, strict=True):
            torch.testing.assert_close(x, y)


# --- the ops


def test_same_call_twice_gives_the_same_bits(path: str, device: torch.device) -> None:
    dtype = torch.float16 if path == "triton" else torch.bfloat16
    args = problem(30, 64, 1000, dtype, device)
    first, second = (gradients(ops.linear_cross_entropy, *args, vocab_size=1000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_second_backward_gives_the_same(path: str, scale: float, device: torch.device) -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32, device)
    loss = ops.linear_cross_entropy(hidden, weight, targets, vocab_size=65) * scale
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.zero_()  # they are the caller's
    assert all(map(torch.equal, torch.autograd.grad(loss, (hidden, weight)), copies))


def test_without_grad_no_gradient_is_made(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = problem(9, 16, 65, torch.float32, device)
    with_grad = ops.linear_cross_entropy(*args, vocab_size=65)
    gradients_made = []
    module = lce if path == "triton" else plain
    forward = module.linear_cross_entropy_fwd

    def spy(*args: Any) -> tuple[Tensor, ...]:
        found = forward(*args)
        gradients_made.append(found[1].numel() > 0)
        return found

    monkeypatch.setattr(module, "linear_cross_entropy_fwd", spy)
    with torch.no_grad():
        assert torch.allclose(ops.linear_cross_entropy(*args, vocab_size=65), with_grad)
    detached = [x.detach() for x in args]
    assert torch.allclose(ops.linear_cross_entropy(*detached, vocab_size=65), with_grad)
    assert gradients_made == [False, False]


def test_losses_alone_write_no_gradient(device: torch.device) -> None:
    hidden, weight, targets = (x.detach() for x in problem(9, 16, 65, torch.float32, device))
    args = hidden, weight, targets, None, loss_options(65)
    losses, dhidden, dweight = lce.linear_cross_entropy_fwd(*args)
    assert dhidden.numel() == dweight.numel() == 0
    logits = hidden @ weight.T
    kept = logits.clone()
    cross_entropy.cross_entropy(logits, targets, None, losses, loss_options(65))
    assert torch.equal(logits, kept)


def test_opcheck(path: str, device: torch.device) -> None:
    args = [x.detach() for x in problem(9, 16, 65, torch.float32, device)]
    for row_scale in (None, torch.rand(9, device=device)):
        everything = (*args, row_scale, path, 65, -100, 0.1, 1e-3)
        torch.library.opcheck(torch.ops.fusedgpt.linear_cross_entropy, everything)
    scaled = args[0], torch.tensor(2.0, device=device), torch.float16
    torch.library.opcheck(torch.ops.fusedgpt.linear_cross_entropy_scaled, scaled)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction: str, path: str, device: torch.device) -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32, device)
    call = torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    options = {"vocab_size": 65, "reduction": reduction, "z_loss": 1e-3}
    eager = gradients(ops.linear_cross_entropy, hidden, weight, targets, **options)
    for x, y in zip(gradients(call, hidden, weight, targets, **options), eager, strict=True):
        torch.testing.assert_close(x, y)


def test_under_checkpoint(path: str, device: torch.device) -> None:
    hidden, weight, targets = problem(9, 16, 65, torch.float32, device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(torch.tanh(hidden), weight, targets, vocab_size=65)

    def again(hidden: Tensor, weight: Tensor) -> Tensor:
        recomputed: Tensor = checkpoint(loss, hidden, weight, use_reentrant=False)
        return recomputed

    assert all(map(torch.equal, gradients(again, hidden, weight), gradients(loss, hidden, weight)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, 5)}, "hidden: expected"),
        ({"hidden": torch.zeros(4, 16, dtype=torch.int64)}, "hidden: expected a floating-point"),
        ({"weight": torch.zeros(128, 15)}, r"weight: expected \(P, 16\)"),
        ({"weight": torch.zeros(128, 16, device="meta")}, "weight: expected device cpu"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \(4,\)"),
        ({"targets": torch.zeros(4)}, "targets: expected an integer tensor, got torch.float32"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets: expected device cpu"),
        ({"targets": torch.tensor([0, 1, 65, 2])}, "targets holds 65, expected 0 to 64"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, "targets holds -1"),
        ({"targets": torch.tensor([0, 65]).repeat(2), "reduction": "none"}, "targets holds 65"),
        ({"vocab_size": 129}, "vocab_size: expected 1 to 128"),
        ({"vocab_size": 0}, "vocab_size: expected 1 to 128"),
        ({"reduction": "average"}, "reduction: expected mean, sum or none"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= label_smoothing < 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected"),
        ({"z_loss": -1e-3}, "z_loss: expected a number >= 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, path: str, device: torch.device) -> None:
    if path == "triton" and device.type != "cpu":
        pytest.skip("CPU tensors take the Triton path in the interpreter only")
    good: dict[str, Any] = {
        "hidden": torch.zeros(4, 16),
        "weight": torch.zeros(128, 16),
        "targets": torch.zeros(4, dtype=torch.int64),
        "vocab_size": 65,
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**{**good, **change})


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [65, -1, 1 << 40])
def test_a_target_out_of_range_asserts_on_the_device(bad: int) -> None:
    script = f"""
import torch
from fusedgpt.kernels import ops
hidden, weight = torch.randn(4, 64, device="cuda"), torch.randn(128, 64, device="cuda")
targets = torch.tensor([1, 2, {bad}, 3], device="cuda")
ops.linear_cross_entropy(hidden, weight, targets, vocab_size=65)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "targets: expected 0 to V-1 or ignore_index" in done.stderr + done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_gpu(reduction: str, device: torch.device) -> None:
    args = problem(256, 64, 1000, torch.bfloat16, device)
    expected = gradients(ops.linear_cross_entropy, *args, vocab_size=1000, reduction=reduction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients(ops.linear_cross_entropy, *args, vocab_size=1000, reduction=reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, expected))


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    hidden, weight, targets = problem(256, 64, 1000, torch.bfloat16, device)

    def step() -> list[Tensor]:
        loss = ops.linear_cross_entropy(hidden, weight, targets, vocab_size=1000)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up off the default stream, as capture demands
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(0.5)
        targets.copy_(targets.roll(1))
    graph.replay()
    assert all(map(torch.equal, captured, step()))

"""The linear layer: oneDNN's fp32 product and its gradients against float64, and the plain path elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.cpu import linear as kernel


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 goes to oneDNN, as on an AMD CPU."""
    if not kernel.HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(kernel, "USES_ONEDNN", True)


def results(x: Tensor, weight: Tensor, bias: Tensor | None, linear: object) -> list[Tensor]:
    """[y, dx, dweight, dbias] for an upstream gradient that differs everywhere."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = linear(*inputs)  # type: ignore[operator]
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, inputs, upstream)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 97), (256, 64)])
@pytest.mark.parametrize("K", [1, 65, 300])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [  # times the error of F.linear in the same dtype: 1.5 forward and 2 backward in the standard
        (torch.float32, 2.0),
        (torch.bfloat16, 1.0 + 1e-6),  # the same code
    ],
)
@pytest.mark.usefixtures("onednn")
def test_error_is_no_larger_than_pytorchs(
    shape: tuple[int, ...], K: int, with_bias: bool, dtype: torch.dtype, factor: float
) -> None:
    generator = torch.Generator().manual_seed(K)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in (shape, (K, shape[-1]), (K,))
    )
    args = (x, weight, bias if with_bias else None)
    truth = results(*(a if a is None else a.double() for a in args), reference.linear)
    ours, theirs = results(*args, ops.linear), results(*args, reference.linear)
    for mine, plain, true in zip(ours, theirs, truth, strict=True):
        floor = 4 * torch.finfo(dtype).eps * true.norm()  # of a few numbers: a lucky zero is no bar
        assert (mine.double() - true).norm() <= factor * (plain.double() - true).norm() + floor
        assert mine.shape == true.shape
        assert mine.is_contiguous()


@pytest.mark.usefixtures("onednn")
def test_fp32_on_an_amd_cpu_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "linear", None)
    ops.linear(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(TypeError):
        ops.linear(torch.ones(2, 3).double(), torch.ones(4, 3))


@pytest.mark.parametrize(("by_onednn", "avx512"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_and_their_sums(
    dtype: torch.dtype, by_onednn: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "USES_ONEDNN", by_onednn and kernel.HAS_ONEDNN)
    monkeypatch.setattr(kernel, "_HAS_AVX512", avx512)
    a, b = torch.randn(2, 130, 40, dtype=dtype), torch.randn(2, 130, 24, dtype=dtype)
    total = kernel.matmul_tn(a[0], b[0]).to(torch.promote_types(dtype, torch.float32))
    added = kernel.matmul_nt(a[1].T, b[1].T, add_to=total)
    assert added is total
    tolerance = {"rtol": 1e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    exact = torch.einsum("inm,ink->mk", a.double(), b.double())
    torch.testing.assert_close(total.double(), exact, **tolerance)  # type: ignore[arg-type]


def test_fp32_elsewhere_is_the_plain_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "USES_ONEDNN", False)
    args = torch.randn(256, 64), torch.randn(300, 64), torch.randn(300)
    for mine, plain in zip(results(*args, ops.linear), results(*args, reference.linear), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.usefixtures("onednn")
def test_strides_do_not_matter() -> None:
    x, weight = torch.randn(7, 12, 5).transpose(1, 2), torch.randn(12, 9).T
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)


def test_same_call_twice_gives_the_same_bits() -> None:
    x, weight = torch.randn(256, 384), torch.randn(1536, 384)
    first, again = (results(x, weight, None, ops.linear) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty_batches() -> None:
    y, dx, dweight = results(torch.empty(0, 3), torch.ones(4, 3), None, ops.linear)
    assert (y.shape, dx.shape) == ((0, 4), (0, 3))
    assert torch.equal(dweight, torch.zeros(4, 3))


def test_weights_are_cast_to_the_input() -> None:
    weight, bias = torch.randn(4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    y = ops.linear(torch.randn(2, 3).bfloat16(), weight, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_traces_into_one_graph_of_the_plain_op() -> None:
    targets: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight, bias = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3), torch.randn(4)
    compiled = torch.compile(ops.linear, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), ops.linear(x, weight, bias))
    assert any("linear" in target for target in targets)
    assert not any("mkldnn" in target or "autograd" in target for target in targets)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(4, 2), None, r"weight: expected \(K, 3\)"),
        (torch.ones(3), None, r"weight: expected \(K, 3\)"),
        (torch.ones(4, 3, dtype=torch.int64), None, "weight: expected a floating-point"),
        (torch.ones(4, 3), torch.ones(3), r"bias: expected \(4,\)"),
    ],
)
def test_bad_input_is_named(weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear(torch.ones(2, 3), weight, bias)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("K", "threads", "bags"), [(4, 4, 4), (301, 2, 1), (300, 7, 6)])
def test_inference_linear_of_one_row(
    K: int, threads: int, bags: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(K)
    x, plain, bias = (torch.randn(s, generator=generator) for s in ((97,), (K, 97), (K,)))
    weight, used = kernel.transposed_storage(plain), bias.clone() if with_bias else None
    assert torch.equal(weight, plain)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    product = kernel.inference_linear(weight, used)
    assert kernel._bags(K, 97, threads)[0] == bags
    for times in (1.0, 2.0):
        expected = plain.double() @ (x * times).double() + (bias if with_bias else 0.0)
        torch.testing.assert_close(product(x * times).double(), expected, atol=1e-4, rtol=1e-5)
        rows = torch.stack([x, x * times])  # more than one row takes another way
        torch.testing.assert_close(product(rows)[1], expected.float(), atol=1e-4, rtol=1e-5)
    assert product(x.view(1, 1, 97)).shape == (1, 1, K)
    assert used is None or torch.equal(used, bias)
    weight.zero_()
    assert torch.equal(product(x), torch.zeros(K) if used is None else used)  # a view, no copy


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_fp32_is_stored_transposed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    real = torch.embedding_bag
    monkeypatch.setattr(torch, "embedding_bag", lambda *a: used.append("bag") or real(*a))
    plain, x = torch.randn(16, 8).to(dtype), torch.randn(8).to(dtype)
    for weight, bags in ((plain, 0), (kernel.transposed_storage(plain), int(dtype == torch.float32))):
        used.clear()
        torch.testing.assert_close(kernel.inference_linear(weight)(x), x @ plain.T)
        assert len(used) == bags


@pytest.mark.usefixtures("onednn")
def test_transposed_storage_can_be_trained() -> None:
    weight, x = kernel.transposed_storage(torch.randn(16, 8)).requires_grad_(), torch.randn(1, 8)
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.expand(16, 8))

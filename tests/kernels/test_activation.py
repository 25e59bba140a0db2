"""bias_gelu: error, extremes, determinism, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import activation, ops, reference, tuning
from fusedgpt.kernels.common import row_blocks
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")

HALF, SINGLE = torch.float16, torch.float32
SHAPES = [(1, 16), (2, 64), (5, 97), (17, 384), (97, 768), (5, 1023), (17, 1500), (5, 3072), (2, 8191)]
BIG = [(16384, 3072), (4096, 6400), (3001, 1500)]


def leaves(device: torch.device, *shape: int, dtype: torch.dtype = SINGLE) -> dict[str, Tensor]:
    """x and bias that want gradients."""
    generator = torch.Generator().manual_seed(2)
    made = {"x": torch.randn(shape, generator=generator), "bias": torch.randn(shape[-1], generator=generator)}
    return {name: x.to(device, dtype).requires_grad_() for name, x in made.items()}


def results(function: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradients, under an upstream gradient that differs from element to element."""
    out = function(**inputs)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(inputs.values()), upstream)]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def assert_ok(case: cases.Case, dtype: torch.dtype, device: torch.device) -> None:
    for finding in check.measure(case, dtype, device):
        assert finding.ok, finding


@pytest.mark.parametrize(("N", "C"), SHAPES)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_against_float64(N: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_ok(cases.bias_gelu_case(N, C), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "C"), [*SHAPES, *BIG])
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE])
def test_against_float64_on_a_gpu(N: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    for fp32_bias in (False, True):
        assert_ok(cases.bias_gelu_case(N, C, fp32_bias=fp32_bias), dtype, device)


def test_an_fp32_bias(device: torch.device) -> None:
    assert_ok(cases.bias_gelu_case(17, 97, fp32_bias=True), HALF, device)
    inputs = {"x": leaves(device, 3, 16, dtype=HALF)["x"], "bias": leaves(device, 3, 16)["bias"]}
    assert [x.dtype for x in results(ops.bias_gelu, inputs)] == [HALF, HALF, SINGLE]


def test_an_fp32_bias_gets_its_gradient_in_fp32(device: torch.device) -> None:
    inputs = {"x": leaves(device, 41, 97, dtype=HALF)["x"], "bias": leaves(device, 41, 97)["bias"]}
    _, _, dbias = results(ops.bias_gelu, inputs)
    upstream = torch.linspace(-1, 1, 41 * 97, device=device).view(41, 97).half().double()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    reference.bias_gelu(**wide).backward(upstream)
    error = (dbias - wide["bias"].grad).norm() / wide["bias"].grad.norm()
    assert error < 1e-6  # a few roundings of fp32; one of fp16 is 3e-4


@pytest.mark.parametrize("C", [40, 3072])
def test_programs_that_walk_over_many_rows(
    C: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "multiprocessor_count", lambda device: 1)
    N = 9 * row_blocks(C, activation._MAX_BLOCK_C)["ROWS"] + 1  # the last tile is partial
    assert_ok(cases.bias_gelu_case(N, C), SINGLE, device)


def test_every_value_is_exact_to_fp32(device: torch.device) -> None:
    x = torch.linspace(-14, 14, 20001, device=device)
    zero = torch.zeros_like(x)
    truth = reference.bias_gelu(x.double(), zero)
    functions = (ops.bias_gelu, reference.bias_gelu)
    error, torch_error = ((gelu(x, zero).double() - truth).abs() for gelu in functions)
    assert error.max() <= 1.5 * torch_error.max()
    tail = (x > -5) & (x < -1)  # where PyTorch's 1 + tanh loses digits, in fp32; below -5 in float64 too
    assert (error / truth.abs())[tail].max() < 5e-6


EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 12.0, -12.0, 1e6, -1e6, 1e18, -1e18]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
def test_extremes_are_pytorchs(device: torch.device) -> None:
    odd = [float("inf"), float("-inf"), float("nan")]
    x = torch.tensor([*EXTREMES, *odd], device=device, requires_grad=True)
    inputs = {"x": x, "bias": torch.zeros(len(x), device=device, requires_grad=True)}
    ours, theirs = (results(gelu, inputs) for gelu in (ops.bias_gelu, reference.bias_gelu))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-6, atol=1e-20)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
def test_no_finite_value_has_an_infinite_slope(device: torch.device) -> None:
    x = torch.tensor([1e20, -1e20, 3e38, -3e38], device=device, requires_grad=True)
    out = ops.bias_gelu(x, torch.zeros(4, device=device))  # PyTorch's slope is NaN here: its x^2 overflows
    assert out.tolist() == [x[0].item(), 0.0, x[2].item(), 0.0]
    out.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 17), (3, 0)])
def test_no_elements(shape: tuple[int, ...], device: torch.device) -> None:
    out, dx, dbias = results(ops.bias_gelu, leaves(device, *shape))
    assert out.shape == dx.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[-1], device=device))


def test_views_are_read_in_their_own_order(device: torch.device) -> None:
    inputs = leaves(device, 6, 5, 24)
    views = {
        "x": inputs["x"].detach().mT.contiguous().mT.requires_grad_(),
        "bias": torch.stack([inputs["bias"].detach()] * 2, dim=1)[:, 0].requires_grad_(),
    }
    assert not views["x"].is_contiguous()
    assert_same_bits(results(ops.bias_gelu, views), results(ops.bias_gelu, inputs))


def test_an_expanded_upstream_gradient(device: torch.device) -> None:
    gradients = []
    for function in (ops.bias_gelu, reference.bias_gelu):
        inputs = leaves(device, 5, 97)
        function(**inputs).sum().backward()
        gradients.append([x.grad for x in inputs.values()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_row_has_the_same_bits_in_any_batch(device: torch.device) -> None:
    x, bias = torch.randn(7, 97, device=device), torch.randn(97, device=device)
    together = ops.bias_gelu(x, bias)
    assert torch.equal(ops.bias_gelu(x.flip(0), bias).flip(0), together)
    assert torch.equal(ops.bias_gelu(x[4:5], bias), together[4:5])


@pytest.mark.parametrize("C", [40, 1025])
def test_the_same_bits_twice(C: int, device: torch.device) -> None:
    first, again = (results(ops.bias_gelu, leaves(device, 33, C)) for _ in range(2))
    assert_same_bits(first, again)


@pytest.mark.gpu
def test_the_same_bits_under_load(device: torch.device) -> None:
    inputs = leaves(device, 8192, 3072, dtype=torch.bfloat16)
    first = results(ops.bias_gelu, inputs)
    load = torch.randn(4096, 4096, device=device)
    other = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(other):
            load = torch.tanh(load @ load)
        assert_same_bits(results(ops.bias_gelu, inputs), first)


@pytest.mark.gpu
def test_a_cuda_graph_replays_both_directions(device: torch.device) -> None:
    inputs = leaves(device, 512, 3072, dtype=torch.bfloat16)
    eager = results(ops.bias_gelu, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ops.bias_gelu, inputs)
    graph.replay()
    assert_same_bits(captured, eager)


def test_opcheck(device: torch.device) -> None:
    x, bias = (x.detach() for x in leaves(device, 3, 2, 24).values())
    namespace = torch.ops.fusedgpt
    torch.library.opcheck(namespace.bias_gelu, (x, bias))
    torch.library.opcheck(namespace.bias_gelu_bwd, (x, x, bias))


def chain(x: Tensor, bias: Tensor) -> Tensor:
    return ops.bias_gelu(ops.bias_gelu(x, bias) + 1.0, bias)


def test_it_compiles_into_one_graph(device: torch.device) -> None:
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    inputs = leaves(device, 5, 40)
    assert_same_bits(results(compiled, inputs), results(chain, inputs))


def test_checkpointing_changes_nothing_and_saves_nothing_wide(device: torch.device) -> None:
    inputs = leaves(device, 5, 40)
    saved: list[Tensor] = []

    def recomputed(x: Tensor, bias: Tensor) -> Tensor:
        return checkpoint(chain, x, bias, use_reentrant=False)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ours = results(ops.bias_gelu, inputs)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs.values()}
    assert len(ours) == 3
    assert_same_bits(results(recomputed, inputs), results(chain, inputs))


X, W = torch.zeros(2, 16), torch.zeros(16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bias_gelu(X.long(), W), "x: expected a floating-point tensor"),
        (lambda: ops.bias_gelu(X.double(), W), "bias_gelu has no Triton kernel for torch.float64"),
        (lambda: ops.bias_gelu(torch.zeros(()), torch.zeros(())), r"x: expected \(..., C\)"),
        (lambda: ops.bias_gelu(X, W[:8]), r"bias: expected \(16,\), got \(8,\)"),
        (lambda: ops.bias_gelu(X, W.double()), "bias_gelu has no Triton kernel for torch.float64"),
        (lambda: ops.bias_gelu(X, W.to("meta")), "bias: expected device cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors")
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_offsets_beyond_32_bits(begins: Callable[..., set[int]]) -> None:
    program, C = 2**26, 3072
    a, b, c = (torch.zeros(C, dtype=HALF) for _ in range(3))
    blocks = row_blocks(C, activation._MAX_BLOCK_C)
    N = (program + 1) * blocks["ROWS"]
    far = program * blocks["ROWS"] * C * a.element_size()
    assert far > 2**32
    del blocks["num_warps"]
    bias, partial = torch.zeros(C), torch.zeros(C)
    forward = (a, bias, b, N)
    found = begins(activation._bias_gelu_fwd_kernel, program, *forward, **blocks)
    assert found == {bias.data_ptr(), *(x.data_ptr() + far for x in (a, b))}
    backward = (a, b, bias, c, partial, N)
    found = begins(activation._bias_gelu_bwd_kernel, program, *backward, STAGES=1, **blocks)
    assert {x.data_ptr() + far for x in (a, b, c)} <= found


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    C = 3072
    N = 2**31 // C + 5
    last = slice(N - 4, N)
    x = torch.randn(N, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(C, device=device)
    out = ops.bias_gelu(x, bias)
    out[last].float().square().sum().backward()
    tail = x.detach()[last].requires_grad_()
    expected = reference.bias_gelu(tail, bias)
    expected.float().square().sum().backward()
    torch.testing.assert_close(out[last], expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(x.grad[last], tail.grad, rtol=0.05, atol=0.05)
    assert not x.grad[: N - 4].any()

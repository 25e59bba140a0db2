"""LayerNorm and dropout + add + LayerNorm: error, masks, determinism, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import layer_norm, ops, reference, tuning
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")

EPS, P = 1e-5, 0.3
HALF, SINGLE = torch.float16, torch.float32
SHAPES = [
    (97, 16),  # 5 rows would leave the error of a column's sum to chance
    *((5, C) for C in (64, 97, 384, 1023, 1500, 4096)),
    *((17, C) for C in (65, 1024, 3000)),
    (97, 768),
    (5, 8191),
]
FEW_ROWS = [(1, 16), (2, 1023)]
BIG = [(16384, 768), (4096, 4096), (1000, 8192), (3001, 1500)]
WEIGHTS = frozenset({"weight", "bias"})


def counter(device: torch.device, step: int = 3) -> dict[str, Any]:
    """A dropout state by name."""
    seed, offset = torch.tensor(7, device=device), torch.tensor(step << 40, device=device)
    return {"dropout_p": P, "seed": seed, "offset": offset}


def leaves(device: torch.device, *shape: int, dtype: torch.dtype = SINGLE) -> dict[str, Tensor]:
    """Inputs of dropout_add_layer_norm that want gradients."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    made = {name: torch.randn(s, generator=generator).to(device, dtype) for name, s in shapes.items()}
    return {name: x.requires_grad_() for name, x in made.items()}


def results(function: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Outputs and gradients under upstream gradients that differ from element to element."""
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    return [y.detach() for y in outputs] + list(gradients)


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def assert_ok(case: cases.Case, dtype: torch.dtype, device: torch.device) -> None:
    for finding in check.measure(case, dtype, device):
        assert finding.ok, finding


@pytest.mark.parametrize(
    ("N", "C", "dtype"),
    [
        *((N, C, SINGLE) for N, C in SHAPES),
        *((N, C, HALF) for N, C in SHAPES[::3]),
        (70, 8191, HALF),  # the parts of dweight outnumber a block of the kernel that sums them
    ],
)
def test_layer_norm_against_float64(N: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_ok(cases.layer_norm_case(N, C), dtype, device)


@pytest.mark.parametrize(("N", "C"), SHAPES)
@pytest.mark.parametrize(("dtype", "p"), [(SINGLE, 0.0), (HALF, P)])
def test_dropout_add_layer_norm_against_float64(
    N: int, C: int, dtype: torch.dtype, p: float, device: torch.device
) -> None:
    assert_ok(cases.dropout_add_layer_norm_case(N, C, p), dtype, device)


@pytest.mark.parametrize(("N", "C"), FEW_ROWS)
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (HALF, None),
        # One rstd scales a whole row: with a row or two, whose last bit is luckier is chance. Absolute, then:
        (SINGLE, 4 * 2**-24),  # y takes the roundings of z, centred, rstd and three products
    ],
)
def test_few_rows(N: int, C: int, dtype: torch.dtype, limit: float | None, device: torch.device) -> None:
    for case in (cases.layer_norm_case(N, C), cases.dropout_add_layer_norm_case(N, C)):
        for finding in check.measure(case, dtype, device):
            assert (finding if limit is None else replace(finding, limit=limit)).ok, finding


@pytest.mark.parametrize("fp32_inputs", [WEIGHTS, {"residual", "bias"}, {"x", "weight"}], ids=sorted)
@pytest.mark.parametrize("p", [0.0, P])
def test_mixed_dtypes(fp32_inputs: frozenset[str], p: float, device: torch.device) -> None:
    assert_ok(cases.dropout_add_layer_norm_case(17, 97, p, fp32_inputs=fp32_inputs), HALF, device)
    inputs = leaves(device, 3, 16, dtype=HALF)
    inputs = {n: (x.detach().float() if n in fp32_inputs else x.detach()) for n, x in inputs.items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y, new_residual, *gradients = results(ops.dropout_add_layer_norm, inputs, **counter(device))
    assert y.dtype == new_residual.dtype == inputs["residual"].dtype
    assert [d.dtype for d in gradients] == [x.dtype for x in inputs.values()]


def test_layer_norm_with_fp32_weights(device: torch.device) -> None:
    assert_ok(cases.layer_norm_case(17, 97, fp32_weights=True), HALF, device)


def test_fp32_weights_get_their_gradients_in_fp32(device: torch.device) -> None:
    inputs = leaves(device, 41, 97)
    inputs["x"] = inputs["x"].detach().half().requires_grad_()
    inputs.pop("residual")
    *_, dweight, dbias = results(ops.layer_norm, inputs)
    upstream = torch.linspace(-1, 1, 41 * 97, device=device).view(41, 97).half().double()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    reference.layer_norm(**wide).backward(upstream)
    for ours, name in ((dweight, "weight"), (dbias, "bias")):
        error = (ours - wide[name].grad).norm() / wide[name].grad.norm()
        assert error < 1e-6, name  # a few roundings of fp32; one of fp16 is 3e-4


@pytest.mark.parametrize("C", [40, 768])
def test_programs_that_walk_over_many_rows(
    C: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "multiprocessor_count", lambda device: 1)
    N = 9 * layer_norm.row_blocks(C, SINGLE.itemsize)["ROWS"] + 1  # the last tile is partial
    assert_ok(cases.dropout_add_layer_norm_case(N, C), SINGLE, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "C"), [*SHAPES, *BIG])
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE])
def test_against_float64_on_a_gpu(N: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_ok(cases.layer_norm_case(N, C, fp32_weights=True), dtype, device)
    assert_ok(cases.layer_norm_case(N, C), dtype, device)
    for p in (0.0, P):
        assert_ok(cases.dropout_add_layer_norm_case(N, C, p), dtype, device)
        assert_ok(cases.dropout_add_layer_norm_case(N, C, p, fp32_inputs=WEIGHTS), dtype, device)


@pytest.mark.parametrize("offset", [100.0, 3000.0])
def test_a_mean_far_from_zero_costs_no_more_than_it_costs_pytorch(
    offset: float, device: torch.device
) -> None:
    case = cases.layer_norm_case(17, 384)
    shifted = replace(case, inputs=lambda g: {**(made := case.inputs(g)), "x": made["x"] + offset})
    assert_ok(shifted, SINGLE, device)


def test_the_norm_is_of_the_rounded_residual(device: torch.device) -> None:
    inputs = leaves(device, 5, 97, dtype=HALF)
    inputs["residual"] = inputs["residual"] * 1000.0  # rounding keeps few bits of x
    y, new_residual = ops.dropout_add_layer_norm(**inputs)
    assert torch.equal(new_residual, reference.dropout_add_layer_norm(**inputs)[1])
    assert torch.equal(y, ops.layer_norm(new_residual, inputs["weight"], inputs["bias"], EPS))


def test_eps_is_inside_the_root(device: torch.device) -> None:
    x, one = torch.full((3, 20), 7.0, device=device), torch.ones(20, device=device)
    x[:, 0] = 7.0 + 2e-3  # variance 1.9e-7, of the order of eps
    for eps in (1e-7, 1e-3):
        expected = reference.layer_norm(x.double(), one, one, eps).float()
        torch.testing.assert_close(ops.layer_norm(x, one, one, eps), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 65), (40, 17), (3, 1023), (2, 4096)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_the_mask_is_the_references_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.ones(shape, device=device, dtype=dtype, requires_grad=True)
    residual = torch.zeros_like(x, requires_grad=True)
    weight = torch.ones(shape[-1], device=device)
    y, new_residual = ops.dropout_add_layer_norm(x, residual, weight, weight, EPS, **counter(device))
    keep = reference.dropout_mask(x.shape, P, *list(counter(device).values())[1:])
    assert torch.equal(new_residual, (keep / (1 - P)).to(dtype))
    (new_residual.sum() + 0.0 * y.sum()).backward()
    assert torch.equal(x.grad, (keep / (1 - P)).to(dtype))
    assert torch.equal(residual.grad, torch.ones_like(x))


def test_every_step_has_its_own_mask(device: torch.device) -> None:
    inputs = {name: x.detach() for name, x in leaves(device, 64, 64).items()}
    first, again, next_step = (
        ops.dropout_add_layer_norm(**inputs, **counter(device, step))[1] for step in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    kept = (first != inputs["residual"]).float().mean().item()
    assert abs(kept - (1 - P)) < 5 * (P * (1 - P)) ** 0.5 / 64


@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
@pytest.mark.parametrize("p", [0.0, P])
def test_outputs_that_nothing_reads(used: list[int], p: float, device: torch.device) -> None:
    inputs = leaves(device, 5, 97)
    options = counter(device) | {"dropout_p": p}
    gradients = []
    for function in (ops.dropout_add_layer_norm, reference.dropout_add_layer_norm):
        loss = sum((out * out).sum() for i, out in enumerate(function(**inputs, **options)) if i in used)
        gradients.append(torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 17)])
def test_no_rows(shape: tuple[int, ...], device: torch.device) -> None:
    for options in ({}, counter(device)):
        ours = results(ops.dropout_add_layer_norm, leaves(device, *shape), **options)
        assert [tuple(x.shape) for x in ours] == [shape] * 4 + [shape[-1:]] * 2
        assert not ours[-1].any()
        assert not ours[-2].any()


def test_views_are_read_in_their_own_order(device: torch.device) -> None:
    inputs = leaves(device, 6, 5, 24)
    views = {
        "x": inputs["x"].detach().mT.contiguous().mT,
        "residual": inputs["residual"].detach().transpose(0, 1).contiguous().transpose(0, 1),
        "weight": torch.stack([inputs["weight"].detach()] * 2, dim=1)[:, 0],
        "bias": inputs["bias"].detach(),
    }
    views = {name: x.requires_grad_() for name, x in views.items()}
    assert not views["x"].is_contiguous()
    plain, strided = (
        results(ops.dropout_add_layer_norm, given, **counter(device)) for given in (inputs, views)
    )
    assert_same_bits(strided, plain)
    assert all(x.is_contiguous() for x in strided[:2])


def test_an_expanded_upstream_gradient(device: torch.device) -> None:
    gradients = []
    for function in (ops.layer_norm, reference.layer_norm):
        inputs = {name: x for name, x in leaves(device, 5, 97).items() if name != "residual"}
        function(**inputs).sum().backward()
        gradients.append([x.grad for x in inputs.values()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("C", [97, 1025])
def test_a_row_has_the_same_bits_in_any_batch(C: int, device: torch.device) -> None:
    """Alone, first or last: no result of a row depends on its neighbours. Of one mask: without dropout."""
    generator = torch.Generator().manual_seed(3)
    rows, others = torch.randn(2, 4, 3, C, generator=generator).to(device)  # x, residual, dy, dnew_residual
    vectors = torch.randn(3, C, generator=generator).to(device)

    def run(x: Tensor, residual: Tensor, *upstream: Tensor) -> list[Tensor]:
        x, residual = x.requires_grad_(), residual.requires_grad_()
        outputs = ops.dropout_add_layer_norm(x, residual, *vectors[:2], x_bias=vectors[2])
        return [*outputs, *torch.autograd.grad(outputs, (x, residual), upstream)]

    alone = run(*rows[:, :1].clone().unbind())
    for place, batch in (
        (0, [rows, others]),
        (40, [*[others] * 13, others[:, :1], rows]),
        (2, [others[:, :2], rows]),
    ):
        together = run(*torch.cat(batch, dim=1).unbind())
        assert_same_bits([x[place : place + 1] for x in together], alone)


def test_outliers(device: torch.device) -> None:
    """Channels of 1e4 among those of 1, as trained models have them."""
    case = cases.dropout_add_layer_norm_case(9, 97)

    def inputs(generator: torch.Generator) -> cases.Inputs:
        made = case.inputs(generator)
        made["residual"][:, 5] = 1e4
        made["x"][:, 50] = -1e4
        return made

    for dtype in (SINGLE, HALF):
        assert_ok(replace(case, inputs=inputs), dtype, device)


@pytest.mark.parametrize("C", [40, 1025])
def test_the_same_bits_twice(C: int, device: torch.device) -> None:
    first, again = (
        results(ops.dropout_add_layer_norm, leaves(device, 33, C), **counter(device)) for _ in range(2)
    )
    assert_same_bits(first, again)


@pytest.mark.gpu
def test_the_same_bits_under_load(device: torch.device) -> None:
    inputs = leaves(device, 8192, 768, dtype=torch.bfloat16)
    first = results(ops.dropout_add_layer_norm, inputs, **counter(device))
    load = torch.randn(4096, 4096, device=device)
    other = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(other):
            load = torch.tanh(load @ load)
        assert_same_bits(results(ops.dropout_add_layer_norm, inputs, **counter(device)), first)


@pytest.mark.gpu
def test_a_cuda_graph_replays_both_directions(device: torch.device) -> None:
    inputs = leaves(device, 512, 768, dtype=torch.bfloat16)
    state = counter(device)
    eager = results(ops.dropout_add_layer_norm, inputs, **state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ops.dropout_add_layer_norm, inputs, **state)
    graph.replay()
    assert_same_bits(captured, eager)


@pytest.mark.parametrize("p", [0.0, P])
def test_opcheck(p: float, device: torch.device) -> None:
    inputs = [x.detach() for x in leaves(device, 3, 2, 24).values()]
    _, seed, offset = counter(device).values()
    namespace = torch.ops.fusedgpt
    torch.library.opcheck(namespace.layer_norm, (inputs[0], None, None, *inputs[2:], EPS))
    state = (p, seed, offset) if p else (p, None, None)
    x_bias = inputs[3] if p else None
    torch.library.opcheck(namespace.layer_norm, (inputs[0], x_bias, *inputs[1:], EPS, *state))
    z, _, weight, _ = inputs
    statistics = torch.randn(2, 3, 2, device=device).abs().unbind()
    torch.library.opcheck(
        namespace.layer_norm_bwd,
        (z, z + 1, z, weight, *statistics, torch.float32, HALF, None if x_bias is None else HALF, *state),
    )


@pytest.mark.parametrize("p", [0.0, P])
def test_it_compiles_into_one_graph(p: float, device: torch.device) -> None:
    options = counter(device) | {"dropout_p": p}

    def chain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, residual = ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, **options)
        return ops.layer_norm(y * y, weight, bias) + residual

    inputs = leaves(device, 5, 40)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, inputs), results(chain, inputs))


def test_checkpointing_changes_nothing(device: torch.device) -> None:
    def chain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, residual = ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, **counter(device))
        return ops.layer_norm(y * y, weight, bias) + residual

    def recomputed(**inputs: Tensor) -> Tensor:
        return checkpoint(chain, *inputs.values(), use_reentrant=False)

    inputs = leaves(device, 5, 40)
    assert_same_bits(results(recomputed, inputs), results(chain, inputs))


X, W = torch.zeros(2, 16), torch.zeros(16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.layer_norm(torch.zeros(()), W, W), r"x: expected \(..., C\) with C > 0, got \(\)"),
        (lambda: ops.layer_norm(torch.zeros(2, 0), W[:0], W[:0]), r"x: .* C > 0, got \(2, 0\)"),
        (
            lambda: ops.layer_norm(torch.zeros(1, 8193), *torch.zeros(2, 8193)),
            "x: .* at most 8192 .*, got 8193",
        ),
        (lambda: ops.layer_norm(X, W[:8], W), r"weight: expected \(16,\), got \(8,\)"),
        (lambda: ops.layer_norm(X, W, W[None]), r"bias: expected \(16,\), got \(1, 16\)"),
        (lambda: ops.layer_norm(X, W, W, eps=-1.0), "eps: expected a positive number"),
        (lambda: ops.layer_norm(X.long(), W, W), "x: expected a floating-point tensor"),
        (lambda: ops.layer_norm(X.double(), W, W), "layer_norm has no Triton kernel for torch.float64"),
        (lambda: ops.layer_norm(X, W.double(), W), "layer_norm has no Triton kernel for torch.float64"),
        (lambda: ops.dropout_add_layer_norm(X, X[:1], W, W), "residual: expected the shape of x"),
        (lambda: ops.dropout_add_layer_norm(X, X, W, W, x_bias=W[:8]), r"x_bias: expected \(16,\)"),
        (lambda: ops.dropout_add_layer_norm(X, X.double(), W, W), "no Triton kernel for torch.float64"),
        (lambda: ops.dropout_add_layer_norm(X, X.to("meta"), W, W), "residual: expected device cpu"),
        (lambda: ops.dropout_add_layer_norm(X, X, W, W, dropout_p=1.0), "dropout_p: expected 0 <= p < 1"),
        (lambda: ops.dropout_add_layer_norm(X, X, W, W, dropout_p=0.1), "seed: expected an int64 scalar"),
        (
            lambda: ops.dropout_add_layer_norm(*torch.zeros(2, 1, 8193), *torch.zeros(2, 8193)),
            "x: .* at most 8192",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors")
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_offsets_beyond_32_bits(device: torch.device, begins: Callable[..., set[int]]) -> None:
    C, program = 100, 2**22
    row = torch.zeros(C, dtype=HALF)
    blocks = layer_norm.row_blocks(C, HALF.itemsize)
    N = (program + 1) * blocks["ROWS"]
    far = program * blocks["ROWS"] * C * row.element_size()
    assert far > 2**32
    del blocks["num_warps"]
    _, seed, offset = counter(device).values()
    read = [row.clone() for _ in range(4)]
    written = [row.clone() for _ in range(2)]
    fp32 = [row.float() for _ in range(5)]
    state = (seed, offset, N)
    forward = (read[0], None, *read[1:], *written, fp32[0], fp32[1], *state, EPS, 0, 1.0)
    found = begins(layer_norm._layer_norm_fwd_kernel, program, *forward, **blocks)
    assert {x.data_ptr() + far for x in (read[0], read[1], *written)} <= found
    backward = (*read, fp32[0], fp32[1], *written, *fp32[2:], *state, 0, 1.0)
    kernel = layer_norm._layer_norm_bwd_kernel
    found = begins(kernel, program, *backward, **blocks)
    assert {x.data_ptr() + far for x in (*read[:3], *written)} <= found


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    C = 8192
    N = 2**31 // C + 3
    last = slice(N - 5, N)
    x = torch.randn(N, C, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(C, device=device, requires_grad=True)
    y, new_residual = ops.dropout_add_layer_norm(x, x, weight, weight, EPS)
    y[last].float().square().sum().backward()
    tail = x.detach()[last].requires_grad_()
    expected, expected_residual = reference.dropout_add_layer_norm(
        tail, tail, weight.detach(), weight.detach()
    )
    expected.float().square().sum().backward()
    torch.testing.assert_close(new_residual[last], expected_residual, rtol=0, atol=0)
    torch.testing.assert_close(y[last], expected)
    torch.testing.assert_close(x.grad[last], tail.grad, rtol=0.02, atol=0.02)
    assert not x.grad[: N - 5].any()

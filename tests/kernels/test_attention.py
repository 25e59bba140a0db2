"""The attention kernels against float64, and what may break them: strides, documents, dropout, compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import attention as kernels
from fusedgpt.kernels import ops, reference, tuning
from fusedgpt.kernels.tools import cases, check
from fusedgpt.kernels.tuning import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")

GPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def qkv(B: int, T: int, H: int, D: int, device: torch.device, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, 3, H, D, generator=generator).to(device, **options).requires_grad_()


def dropout(device: torch.device, p: float = 0.3, step: int = 3) -> dict[str, Any]:
    return {
        "dropout_p": p,
        "seed": torch.tensor(7, device=device),
        "offset": torch.tensor(step << 40, device=device),
    }


def assert_standard(case: cases.Case, dtype: torch.dtype, device: torch.device) -> None:
    findings = check.measure(case, dtype, device)
    assert len(findings) == 2
    for finding in findings:
        assert finding.ok, finding


LENGTHS = [1, 5, 17, 97, 128, 200, 257]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_length_against_float64(T: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_standard(cases.attention_case(2, T, 2, 32), dtype, device)


def by_formula(x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output, and the gradient of x (B, T, 3, H, D) by FlashAttention's formula: delta is sum(O dO)."""
    q, k, v, d_out = (part.transpose(1, 2) for part in (*x.unbind(2), upstream))  # (B, H, T, D)
    T, scale = q.shape[2], q.shape[3] ** -0.5
    hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    out = weights @ v
    delta = (out * d_out).sum(-1, keepdim=True)
    d_scores = weights * (d_out @ v.mT - delta)
    dq, dk, dv = d_scores @ k * scale, d_scores.mT @ q * scale, weights.mT @ d_out
    return [part.transpose(1, 2) for part in (out, dq, dk, dv)]


@pytest.mark.parametrize("T", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_or_three_tokens_are_as_exact_as_the_formula(
    T: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dP - delta cancels there. PyTorch may sum P dP instead, three times as exact: no measure of ours."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    x = qkv(16, T, 2, 32, device, dtype=dtype)
    upstream = torch.randn(16, T, 2, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out = ops.attention(*x.unbind(2))
    ours = [out, *torch.autograd.grad(out, x, upstream)[0].unbind(2)]
    truth = by_formula(x.detach().double(), upstream.double())
    theirs = by_formula(x.detach(), upstream)
    for mine, plain, true, factor in zip(ours, theirs, truth, (1.5, 2, 2, 2), strict=True):  # the standard's
        assert (mine - true).norm() <= factor * (plain - true).norm()


@pytest.mark.parametrize("D", [8, 16, 24, 40, 64, 72, 80, 96, 128])
def test_every_head_size_against_float64(D: int, device: torch.device) -> None:
    assert_standard(cases.attention_case(1, 70, 2, D), torch.float32, device)


@pytest.mark.parametrize(("B", "T"), [(16, 5), (2, 130), (2, 200)])  # the error of ten rows would be chance
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("documents", [False, True])
def test_dropout_and_documents_against_float64(
    B: int, T: int, p: float, documents: bool, device: torch.device
) -> None:
    assert_standard(
        cases.attention_case(B, T, 2, 16, dropout_p=p, documents=documents), torch.float32, device
    )


@pytest.mark.parametrize(("M", "N"), [(16, 128), (64, 64), (128, 64), (16, 32), (64, 32)])
@pytest.mark.parametrize("feature", ["plain", "documents", "dropout"])
def test_every_shape_of_tile_against_float64(M: int, N: int, feature: str, device: torch.device) -> None:
    tile = Tile(BLOCK_M=M, BLOCK_N=N, num_warps=4, num_stages=1, ahead=M > N)
    options: dict[str, Any] = {
        "plain": {},
        "documents": {"documents": lambda T: (torch.arange(T) - 30) // 240 % 2},  # with tiles of one document
        "dropout": {"dropout_p": 0.3},
    }
    T = 330 if feature == "documents" else 200
    q = torch.empty(1, 1, 1, 16, device=device)
    with ExitStack() as stack:
        for kernel in ("fwd", "dkdv", "dq"):
            stack.enter_context(tuning.override(tuning.attention_key(kernel, q, feature), tile))
        assert_standard(cases.attention_case(1, T, 2, 16, **options[feature]), torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [384, 768, 1025, 2048])
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_long_sequences_against_float64(
    T: int, D: int, p: float, documents: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert_standard(cases.attention_case(2, T, 4, D, dropout_p=p, documents=documents), dtype, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq"])
def test_far_sequences_are_addressed_in_64_bits(kernel: str, begins: Callable[..., set[int]]) -> None:
    """Sequence 2^26 of 64 tokens: 2^36 elements into every tensor."""
    T, D, sequence = 64, 16, 2**26
    tensors = {name: torch.zeros(T, D) for name in ("q", "k", "v", "dout", "out", "dk", "dv", "dq")}
    strides = {f"{name}_strides": (T * D, D, D, 1) for name in tensors}
    rows = {name: torch.zeros(T) for name in ("lse_ptr", "delta_ptr")}
    absent = dict.fromkeys(("ids_ptr", "spans_ptr", "seed_ptr", "offset_ptr"))
    known = {
        **tensors,
        **strides,
        **rows,
        **absent,
        "threshold": 0,
        "keep_scale": 1.0,
        "zero": 0.0,
        "scale": 1.0,
    }
    known |= {f"{name}_ptr": x for name, x in tensors.items()} | {"T": T, "D": D}
    known |= {
        "B": sequence + 1,
        "H": 1,
        "heads": 1,
        "BLOCK_D": D,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "AHEAD": False,
    }
    jit = {"fwd": kernels._attention_fwd_kernel, "dkdv": kernels._attention_dkdv_kernel}
    function = jit.get(kernel, kernels._attention_dq_kernel)
    arguments = {name: known[name] for name in function.arg_names}
    written = {"fwd": ["out"], "dkdv": ["dout", "dk", "dv"], "dq": ["dout", "out", "dq"]}[kernel]
    found = begins(function, sequence, **arguments)
    assert {tensors[name].data_ptr() + sequence * T * D * 4 for name in ["q", "k", "v", *written]} <= found
    assert rows["lse_ptr"].data_ptr() + sequence * T * 4 in found


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    """2.2e9 elements of qkv: the last sequence of the batch must equal the same one alone."""
    B, T, H, D = 700, 1024, 16, 64
    packed = torch.randn(B, T, 3, H, D, device=device, dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    whole = ops.qkv_attention(packed)
    assert torch.equal(whole[-1:], ops.qkv_attention(packed[-1:]))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_fused_projection_gives_the_same_bits_as_its_slices(p: float, device: torch.device) -> None:
    packed = qkv(2, 70, 2, 24, device)
    out = ops.qkv_attention(packed, **dropout(device, p))
    (gradient,) = torch.autograd.grad(out.square().sum(), packed)
    q, k, v = (x.detach().clone().requires_grad_() for x in packed.unbind(2))
    separate = ops.attention(q, k, v, **dropout(device, p))
    gradients = torch.autograd.grad(separate.square().sum(), (q, k, v))
    assert torch.equal(out, separate)
    for one, other in zip(gradient.unbind(2), gradients, strict=True):
        assert torch.equal(one, other)


def test_the_gradient_of_the_projection_is_written_without_a_copy(device: torch.device) -> None:
    packed = qkv(1, 9, 2, 16, device)
    ops.qkv_attention(packed).sum().backward()
    assert packed.grad is not None
    assert packed.grad.is_contiguous()


STRIDES = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "D not contiguous": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "an odd start": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one sequence repeated": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides: str, device: torch.device) -> None:
    views = [STRIDES[strides](x.detach()) for x in qkv(2, 70, 3, 16, device).unbind(2)]
    leaves = [x.requires_grad_() for x in views]
    copies = [x.detach().clone().contiguous().requires_grad_() for x in views]
    results = []
    for inputs in (leaves, copies):
        out = ops.attention(*inputs)
        results.append((out, *torch.autograd.grad(STRIDES[strides](out).square().sum(), inputs)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_expanded_upstream_gradient(device: torch.device) -> None:
    packed = qkv(1, 20, 2, 16, device)
    (summed,) = torch.autograd.grad(ops.qkv_attention(packed).sum(), packed)
    out = ops.qkv_attention(packed)
    (ones,) = torch.autograd.grad(out, packed, torch.ones_like(out))
    assert torch.equal(summed, ones)


def test_the_dropout_mask_is_the_references_forward_and_backward(device: torch.device) -> None:
    """With v the identity the output is the dropped weights; with dout the identity, dv their transpose."""
    T, p = 128, 0.3
    q, k = (x.detach() for x in qkv(1, T, 2, T, device)[:, :, :2].unbind(2))
    v = torch.eye(T, device=device).view(1, T, 1, T).expand(1, T, 2, T).clone().requires_grad_()
    out = ops.attention(q, k, v, **dropout(device, p))
    keep = reference.attention_dropout_mask(
        torch.Size((1, 2, T, T)), p, torch.tensor(7, device=device), torch.tensor(3 << 40, device=device)
    )
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    assert torch.equal(out.transpose(1, 2) != 0, keep & causal)
    (dv,) = torch.autograd.grad(out, v, torch.eye(T, device=device).view(1, T, 1, T).expand_as(out))
    torch.testing.assert_close(dv.permute(0, 2, 3, 1), out.detach().transpose(1, 2))


def test_every_step_has_its_own_mask_and_the_same_seed_the_same(device: torch.device) -> None:
    packed = qkv(1, 70, 2, 16, device).detach()
    first, again, later = (ops.qkv_attention(packed, **dropout(device, step=step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_documents_change_nothing_beyond_their_borders(device: torch.device) -> None:
    """Each document alone gives the bits it gives in the pack, whatever stands beside it."""
    packed = qkv(1, 200, 2, 16, device).detach()
    lengths = [64, 3, 100, 33]
    documents = torch.repeat_interleave(torch.tensor([5, -2, 9, 0]), torch.tensor(lengths)).to(device)[None]
    whole = ops.qkv_attention(packed, documents=documents)
    for part, alone in zip(whole.split(lengths, dim=1), packed.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, ops.qkv_attention(alone), rtol=1e-5, atol=1e-6)


def test_a_document_may_come_back(device: torch.device) -> None:
    assert_standard(
        cases.attention_case(1, 300, 1, 16, documents=lambda T: torch.arange(T) // 70 % 2),
        torch.float32,
        device,
    )


def test_masked_blocks_are_not_read(device: torch.device) -> None:
    """NaN in another document's blocks would reach the output through 0 * NaN if they were touched."""
    packed = qkv(1, 256, 1, 16, device).detach()
    packed[:, :64] = float("nan")
    packed[:, 192:] = float("nan")
    packed.requires_grad_()
    documents = (torch.arange(256, device=device) // 64).clamp(1, 2)[None]
    documents[:, :64], documents[:, 192:] = 0, 7
    out = ops.qkv_attention(packed, documents=documents)
    assert out[:, 64:192].isfinite().all()
    (gradient,) = torch.autograd.grad(out[:, 64:192].sum(), packed)
    assert gradient[:, 64:192].isfinite().all()


def adversarial(name: str, generator: torch.Generator, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values on which attention kernels have been seen to fail."""
    q, k, v = (made[name] for name in "qkv")
    if name == "logsumexp below -88.7":  # exp would underflow in fp32
        q, k = q + 5.0, k - 5.0
    elif name == "tied maxima":  # arXiv 2510.04212: weights of exactly 1, values of one sign
        k, v = k[:, torch.arange(k.shape[1]) // 7 * 7], v.abs()
    elif name == "outliers":
        hit = torch.rand(v.shape, generator=generator) < 0.001
        q, v = torch.where(hit.roll(1, 1), 100.0 * q, q), torch.where(hit, 1e4 * v.sign(), v)
    return {"q": q, "k": k, "v": v}


@pytest.mark.parametrize("name", ["logsumexp below -88.7", "tied maxima", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adversarial_values_against_float64(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.attention_case(2, 192, 2, 32)  # T % 128 is 64
    inputs = case.inputs
    assert_standard(replace(case, inputs=lambda g: adversarial(name, g, inputs(g))), dtype, device)


@pytest.mark.parametrize("documents", [False, True])
def test_a_sequence_gives_the_same_bits_in_any_batch(documents: bool, device: torch.device) -> None:
    packed = qkv(3, 130, 2, 16, device).detach()
    ids = torch.stack([torch.arange(130, device=device) // (30 + b) for b in range(3)]) if documents else None

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        x = packed[rows].requires_grad_()
        out = ops.qkv_attention(x, documents=None if ids is None else ids[rows])
        return out, *torch.autograd.grad(out.square().sum(), x)

    for one, other in zip(run([0, 1, 2]), run([2, 0, 1]), strict=True):
        assert torch.equal(one, other[[1, 2, 0]])
    for one, other in zip(run([0, 1, 2]), run([1]), strict=True):
        assert torch.equal(one[1:2], other)


def test_groups_of_heads_change_no_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 heads in groups of 5 and 4."""
    packed = qkv(3, 70, 3, 16, device)
    runs = []
    for size in (kernels._GROUP_BYTES, 5 * 2 * 70 * 16 * 4):
        monkeypatch.setattr(kernels, "_GROUP_BYTES", size)
        out = ops.qkv_attention(packed)
        runs.append((out, *torch.autograd.grad(out.square().sum(), packed)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_any_scale(scale: float, device: torch.device) -> None:
    assert_standard(cases.attention_case(1, 70, 2, 16, scale=scale), torch.float32, device)


def test_large_scores_neither_overflow_nor_vanish(device: torch.device) -> None:
    packed = qkv(1, 70, 2, 16, device).detach() * 100
    out = ops.qkv_attention(packed)
    truth = reference.attention(*packed.double().unbind(2))
    assert (out - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16), (2, 5, 3, 0, 16)])
def test_empty_batches(shape: tuple[int, ...], device: torch.device) -> None:
    packed = torch.empty(shape, device=device, requires_grad=True)
    out = ops.qkv_attention(packed)
    out.sum().backward()
    assert out.shape == (*shape[:2], *shape[3:])
    assert packed.grad is not None
    assert packed.grad.shape == shape


def test_the_same_bits_twice(device: torch.device) -> None:
    packed = qkv(2, 130, 2, 40, device)
    runs = []
    for _ in range(2):
        out = ops.qkv_attention(packed, **dropout(device))
        runs.append((out, *torch.autograd.grad(out.square().sum(), packed)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_no_rounding_bias(device: torch.device) -> None:
    """fp16 rounds the weights before they meet v; over 65,536 outputs nothing may lean towards 0."""
    case = cases.attention_case(2, 256, 4, 32)
    forward, backward = check.measure(case, torch.float16, device)
    assert abs(forward.bias) < 0.02
    assert abs(backward.bias) < 0.05


def test_opcheck(device: torch.device) -> None:
    q, k, v = qkv(1, 17, 2, 16, device).detach().unbind(2)
    documents = ops.prepare_documents(torch.arange(17, device=device)[None] // 6)
    seed, offset = (torch.tensor(x, device=device) for x in (7, 3 << 40))
    for state in ((0.25, 0.3, seed, offset, *documents), (0.25,)):
        torch.library.opcheck(torch.ops.fusedgpt.attention, (q, k, v, *state))
        saved = torch.ops.fusedgpt.attention(q, k, v, *state)
        torch.library.opcheck(torch.ops.fusedgpt.attention_bwd, (saved[0], q, k, v, *saved, *state))


@pytest.mark.parametrize("documents", [False, True])
def test_compiled_into_one_graph(documents: bool, device: torch.device) -> None:
    prepared = ops.prepare_documents(torch.arange(20, device=device).expand(2, 20) // 6)

    def block(packed: Tensor, weight: Tensor, documents: ops.Documents | None) -> Tensor:
        x = (packed.flatten(2) @ weight).view(packed.shape)
        return ops.qkv_attention(x, documents=documents, **dropout(device)).square().sum()

    arguments = qkv(2, 20, 2, 16, device), torch.randn(96, 96, device=device) / 10
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    losses = [function(*arguments, prepared if documents else None) for function in (block, compiled)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, arguments[0])[0] for loss in losses])


def test_recomputing_in_a_checkpoint_draws_the_same_mask(device: torch.device) -> None:
    packed = qkv(1, 40, 2, 16, device)
    documents = ops.prepare_documents(torch.arange(40, device=device)[None] // 15)

    def attend(x: Tensor, documents: ops.Documents) -> Tensor:
        return ops.qkv_attention(x, documents=documents, **dropout(device))

    gradients = [
        torch.autograd.grad(out.square().sum(), packed)[0]
        for out in (attend(packed, documents), checkpoint(attend, packed, documents, use_reentrant=False))
    ]
    assert torch.equal(*gradients)


@pytest.mark.gpu
def test_a_cuda_graph_draws_a_new_mask_each_replay(device: torch.device) -> None:
    packed = qkv(2, 128, 2, 64, device, dtype=torch.bfloat16).detach()
    state = dropout(device)
    out = ops.qkv_attention(packed, **state)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.qkv_attention(packed, **state)
    graph.replay()
    assert torch.equal(captured, out)
    state["offset"].add_(1 << 40)
    graph.replay()
    assert torch.equal(captured, ops.qkv_attention(packed, **state))
    assert not torch.equal(captured, out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.attention(x, x[:, :3], x), "k: expected the shape of q"),
        (lambda x: ops.attention(x, x, x.half()), "v: expected the dtype of q"),
        (lambda x: ops.attention(x.long(), x, x), "q: expected a floating-point tensor"),
        (
            lambda x: ops.attention(*[x.new_zeros(1, 4, 2, 136)] * 3),
            "q: expected a head size D of at most 128",
        ),
        (lambda x: ops.attention(x, x, x, scale=0.0), "scale: expected a positive number"),
        (lambda x: ops.attention(x, x, x, scale=float("nan")), "scale: expected a positive number"),
        (lambda x: ops.attention(x, x, x, documents=torch.zeros(2, 3)), "documents: expected"),
        (
            lambda x: ops.attention(x, x, x, documents=torch.zeros(1, 4, device="meta").long()),
            "documents: expected device",
        ),
        (lambda x: ops.attention(x.double(), x.double(), x.double()), "no Triton kernel for torch.float64"),
    ],
)
def test_bad_input_is_named(call: Any, message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 2, 16, device=device))

"""The seam: which path an op takes, what it refuses, and that it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedgpt.kernels import ops

CPU = torch.device("cpu")
X, W = torch.zeros(2, 3, 8), torch.zeros(8)
Q = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize("op", ops.OPS)
def test_cpu_takes_the_reference(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("auto", "reference"):
        monkeypatch.setenv("FUSEDGPT_KERNELS", choice)
        assert ops.backend(op, CPU) == "reference"


def test_insisting_on_triton_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"gelu has no Triton kernel for torch\.float64"):
        ops.bias_gelu(X.double(), W)


def test_a_fallback_on_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setenv("FUSEDGPT_KERNELS", "auto")
    assert ops.fallback(gpu, torch.bfloat16) == ""
    assert ops.fallback(gpu, torch.float64) == "dropout has no Triton kernel for torch.float64"
    capability = (7, 5)
    assert ops.fallback(gpu, torch.float16) == "dropout needs a GPU of compute capability 8.0 or newer"
    assert ops.fallback(CPU, torch.float64) == ""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "reference")
    assert ops.fallback(gpu, torch.float16) == ""


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDGPT_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast', expected auto, triton or reference"):
        ops.bias_gelu(X, W)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.attention(Q[0], Q, Q), r"q: expected \(B, T, H, D\)"),
        (lambda: ops.attention(Q, Q[:, :3], Q), "k: expected the shape of q"),
        (lambda: ops.attention(Q, Q, Q.double()), "v: expected the dtype of q"),
        (lambda: ops.attention(Q.long(), Q, Q), "q: expected a floating-point tensor"),
        (lambda: ops.attention(Q, Q, Q, dropout_p=1.0), "dropout_p: expected 0 <= p < 1"),
        (lambda: ops.attention(Q, Q, Q, dropout_p=0.1), "seed: expected an int64 scalar"),
        (
            lambda: ops.attention(Q, Q, Q, dropout_p=0.1, seed=torch.tensor(1), offset=torch.tensor([1])),
            "offset: expected an int64 scalar",
        ),
        (
            lambda: ops.attention(Q, Q, Q, documents=torch.zeros(1, 3, dtype=torch.int64)),
            "documents: expected",
        ),
        (lambda: ops.attention(Q, Q, Q, documents=torch.zeros(1, 4)), "documents: expected an integer"),
        (lambda: ops.decode_attention(Q[:, 0], Q[:, :, :1], Q, torch.ones(1)), "k_cache: expected"),
        (lambda: ops.decode_attention(Q[:, 0], Q, Q, torch.ones(1)), "lengths: expected an integer"),
        (lambda: ops.attention(Q, Q, Q, scale=-1.0), "scale: expected a positive"),
        (lambda: ops.attention(Q[..., :0], Q[..., :0], Q[..., :0]), "q: expected a head size"),
        (lambda: ops.qkv_attention(Q), r"qkv: expected \(B, T, 3, H, D\)"),
        (lambda: ops.decode_attention(Q[:, 0], Q, Q, torch.ones(2)), r"lengths: expected \(1,\)"),
        (lambda: ops.layer_norm(X, W[:7], W), r"weight: expected \(8,\)"),
        (lambda: ops.layer_norm(X, W, W, eps=0.0), "eps: expected a positive number"),
        (lambda: ops.dropout_add_layer_norm(X, X[:1], W, W), "residual: expected the shape of x"),
        (lambda: ops.bias_gelu(X, W[:7]), r"bias: expected \(8,\)"),
        (lambda: ops.embedding(X, X[0]), "idx: expected an integer tensor"),
        (lambda: ops.embedding(X.long(), W), r"weight: expected \(P, C\)"),
        (lambda: ops.embedding(X.long(), X[0].long()), "weight: expected a floating-point tensor"),
        (lambda: ops.dropout(X, -0.1), "dropout_p: expected"),
        (
            lambda: ops.dropout(X, 0.1, torch.tensor(1), torch.tensor(1, device="meta")),
            "offset: expected device cpu, got meta",
        ),
        (lambda: ops.layer_norm(X, W.to("meta"), W), "weight: expected device cpu"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_op_traces_into_one_graph() -> None:
    seed, offset = torch.tensor(1), torch.tensor(2)
    weight, targets = torch.randn(128, 8, requires_grad=True), torch.tensor([1, 5, -100])

    def chain(x: torch.Tensor) -> torch.Tensor:
        y, x = ops.dropout_add_layer_norm(
            ops.dropout(x, 0.1, seed, offset), x, W + 1, W, 1e-5, 0.1, seed, offset
        )
        q = ops.bias_gelu(ops.layer_norm(y, W + 1, W), W).view(1, 3, 2, 4)
        y = ops.attention(q, q, q, dropout_p=0.1, seed=seed, offset=offset)
        y = y + ops.decode_attention(q[:, 0], q, q, torch.tensor([3]))[:, None]
        return ops.linear_cross_entropy(y.reshape(3, 8), weight, targets, vocab_size=100)

    x = torch.randn(1, 3, 8, requires_grad=True)
    eager, compiled = chain(x), torch.compile(chain, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(loss, (x, weight)) for loss in (eager, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])

"""The reference ops against their definitions, written out naively in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import reference

SEED, OFFSET = torch.tensor(7), torch.tensor(3 << 40)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Token by token: what the formula says, no batching."""
    B, T, H, D = q.shape
    out = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
                scores = torch.stack([q[b, t, h] @ k[b, s, h] for s in seen]) / math.sqrt(D)
                out[b, t, h] = scores.softmax(0) @ v[b, seen, h]
    return out


@pytest.mark.parametrize("T", [1, 2, 5, 17])
@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_is_its_definition(T: int, with_documents: bool) -> None:
    q, k, v = torch.randn(3, 2, T, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    documents = torch.arange(T).expand(2, T) // 3 if with_documents else None
    ours = reference.attention(q, k, v, documents=documents)
    torch.testing.assert_close(ours, naive_attention(q, k, v, documents))


def test_attention_dropout_zeroes_the_masked_weights_and_scales_the_rest() -> None:
    T, p = 33, 0.25
    q, k = torch.randn(2, 1, T, 2, 8, dtype=torch.float64)
    v = torch.eye(T, dtype=torch.float64).view(1, T, 1, T).expand(1, T, 2, T)  # the output is the weights
    weights = reference.attention(q, k, v, scale=8**-0.5)
    dropped = reference.attention(q, k, v, scale=8**-0.5, dropout_p=p, seed=SEED, offset=OFFSET)
    keep = reference.attention_dropout_mask(torch.Size((1, 2, T, T)), p, SEED, OFFSET).transpose(1, 2)
    torch.testing.assert_close(dropped, weights * keep / (1 - p))


def test_decode_attention_is_the_last_row_of_attention() -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64)
    lengths = torch.tensor([9, 4])
    full = reference.attention(q, k, v)
    last = torch.stack([q[0, 8], q[1, 3]])
    torch.testing.assert_close(
        reference.decode_attention(last, k, v, lengths), torch.stack([full[0, 8], full[1, 3]])
    )


@pytest.mark.parametrize("C", [16, 97, 384])
def test_layer_norm_is_its_definition(C: int) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 5, C), (C,), (C,)))
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), expected)


def test_dropout_add_layer_norm_adds_in_fp32_and_rounds_once() -> None:
    x, residual = torch.randn(2, 64, 96).bfloat16()
    weight, bias = torch.rand(96), torch.rand(96)
    y, new_residual = reference.dropout_add_layer_norm(
        x, residual, weight, bias, dropout_p=0.3, seed=SEED, offset=OFFSET
    )
    keep = reference.dropout_mask(x.shape, 0.3, SEED, OFFSET)
    assert new_residual.dtype == y.dtype == torch.bfloat16
    exact = residual.double() + x.double() * keep / 0.7
    assert (new_residual == exact.bfloat16()).double().mean() > 0.999  # a tie may fall either way
    assert torch.equal(y, reference.layer_norm(new_residual, weight, bias))


def test_dropout_add_layer_norm_drops_only_x() -> None:
    x, residual = torch.randn(2, 8, 96, dtype=torch.float64)
    ones, zeros = torch.ones(96), torch.zeros(96)
    _, new_residual = reference.dropout_add_layer_norm(
        x, residual, ones, zeros, dropout_p=0.5, seed=SEED, offset=OFFSET
    )
    keep = reference.dropout_mask(x.shape, 0.5, SEED, OFFSET)
    torch.testing.assert_close(new_residual, residual + 2 * x * keep)


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(reference.bias_gelu(x - 1, torch.ones(101)), expected)


def test_philox_gives_random123s_known_answers() -> None:
    """Random123's kat_vectors, philox4x32-7 and philox2x32-7."""
    zero = reference.philox4x32(1, torch.tensor(0), torch.tensor(0))[0]
    assert [hex(x & 0xFFFFFFFF) for x in zero.tolist()] == [
        "0x5f6fb709",
        "0xd893f64",
        "0x4f121f81",
        "0x4f730a48",
    ]
    zero = reference.philox2x32(1, torch.tensor(0), torch.tensor(0))[0]
    assert [hex(x & 0xFFFFFFFF) for x in zero.tolist()] == ["0x257a3673", "0xcd26be2a"]
    key, counter = torch.tensor(0x13198A2E), torch.tensor(0x85A308D3243F6A88 - (1 << 64))
    pi = reference.philox2x32(1, key, counter)[0]
    assert [hex(x & 0xFFFFFFFF) for x in pi.tolist()] == ["0xbedbbe6b", "0xe4c770b3"]


@pytest.mark.parametrize("philox", [reference.philox4x32, reference.philox2x32])
def test_philox_is_a_pure_function_of_its_counter(philox: Callable[..., torch.Tensor]) -> None:
    blocks = philox(64, SEED, OFFSET)
    assert torch.equal(blocks[10:], philox(54, SEED, OFFSET + 10))
    assert not torch.equal(blocks, philox(64, SEED + 1, OFFSET))
    assert not torch.equal(blocks, philox(64, SEED + (1 << 32), OFFSET))
    assert blocks.dtype == torch.int32
    assert blocks.min() < 0 < blocks.max()  # all 32 bits are random


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_attention_dropout_keeps_its_share_in_steps_of_1_256(p: float) -> None:
    shape = torch.Size((2, 2, 500, 500))
    kept = reference.attention_dropout_mask(shape, p, SEED, OFFSET).double()
    share = 1 - reference.dropout_threshold(p) / 256
    assert abs(share - (1 - p)) <= 1 / 512
    five_sigma = 5 * math.sqrt(share * (1 - share) / shape.numel())
    assert abs(kept.mean().item() - share) <= five_sigma
    neighbours = (kept[..., 1:] - kept.mean()) * (kept[..., :-1] - kept.mean())
    assert abs(neighbours.mean().item()) <= 5 * share * (1 - share) / math.sqrt(neighbours.numel())


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.9])
def test_dropout_mask_keeps_its_share(p: float) -> None:
    n = 1 << 20
    kept = reference.dropout_mask(torch.Size((n,)), p, SEED, OFFSET).double().mean().item()
    five_sigma = 5 * math.sqrt(p * (1 - p) / n)
    assert abs(kept - (1 - p)) < five_sigma + 2**-17  # and half a step of 1/65536


def test_dropout_masks_of_neighbouring_seeds_and_steps_are_independent() -> None:
    shape = torch.Size((1 << 18,))
    base = reference.dropout_mask(shape, 0.5, SEED, OFFSET).double()
    for seed, offset in ((SEED + 1, OFFSET), (SEED, OFFSET + (1 << 40)), (SEED, OFFSET + (1 << 15))):
        other = reference.dropout_mask(shape, 0.5, seed, offset).double()
        agreement = (base == other).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(shape.numel())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_counts_only_real_targets_and_columns(reduction: str) -> None:
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    targets = torch.tensor([0, 10, -100, 3, -100, 5])
    loss = reference.linear_cross_entropy(hidden, weight, targets, vocab_size=11, reduction=reduction)
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:11].T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90)])
def test_orthogonalised_singular_values_lie_near_1(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -3, 30, dtype=torch.float64)
    u, vh = u[:, :30], vh[:30]
    x = u * values @ vh
    bound = (x @ x.T if shape[0] <= shape[1] else x.T @ x).abs().sum(1).max().sqrt()
    now = (u.T @ reference.orthogonalise(x) @ vh.T).diagonal()  # the singular vectors stay
    assert (now - 1).abs()[values > 0.01 * bound].max() < 0.2703  # 0.2702 is the most on [0.01, 1]
    torch.testing.assert_close(u * now @ vh, reference.orthogonalise(x))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_muon_is_torchs_but_for_the_iteration(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda x, *_: torch.sign(x))
    options = {"lr": 0.1, "weight_decay": 0.3}
    theirs = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = torch.optim.Muon([theirs], momentum=0.9, **options)
    param, momentum = theirs.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        theirs.grad = torch.randn(shape, dtype=torch.float64)
        param, momentum = reference.muon(
            param, theirs.grad, momentum, beta=0.9, orthogonalised=torch.sign, **options
        )
        optimizer.step()
        torch.testing.assert_close(param, theirs.detach())


def test_gradcheck() -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    dropout = {"dropout_p": 0.3, "seed": SEED, "offset": OFFSET}
    gradcheck = torch.autograd.gradcheck
    q, k, v = (tensor(1, 5, 2, 4) for _ in range(3))
    assert gradcheck(lambda *x: reference.attention(*x, **dropout), (q, k, v))
    x, residual, weight, bias = tensor(3, 8), tensor(3, 8), tensor(8), tensor(8)
    assert gradcheck(lambda *x: reference.dropout_add_layer_norm(*x, **dropout), (x, residual, weight, bias))
    assert gradcheck(reference.bias_gelu, (x, bias))


def test_a_compiler_sees_no_bools_viewed_as_bytes() -> None:
    """PyTorch 2.11's inductor cannot compile that."""
    seen: list[torch.fx.Node] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.extend(module.graph.nodes)
        return module

    x = torch.randn(4, 40, dtype=torch.bfloat16)
    compiled = torch.compile(reference.dropout, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, 0.3, SEED, OFFSET), reference.dropout(x, 0.3, SEED, OFFSET))
    assert len(seen) > 20
    assert not [node for node in seen if torch.uint8 in node.args]

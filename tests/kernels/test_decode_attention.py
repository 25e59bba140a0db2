"""Decoding against float64: lengths, splits, strides of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.decode_attention import decode_attention_fwd, rows_per_split
from fusedgpt.kernels.tools import cases, check

pytestmark = pytest.mark.usefixtures("triton_kernels")


def inputs(B: int, T: int, H: int, D: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, H, D), (B, T, H, D), (B, T, H, D))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@pytest.mark.parametrize(("T", "D"), [(1, 16), (2, 64), (17, 40), (97, 128), (128, 80), (257, 64), (1025, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_against_float64(T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    (finding,) = check.measure(cases.decode_attention_case(3, T, 2, D), dtype, device)
    assert finding.ok, finding


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1024, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_long_caches_against_float64(T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    (finding,) = check.measure(cases.decode_attention_case(4, T, 12, D), dtype, device)
    assert finding.ok, finding


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    B, T, H, D = 530, 4096, 16, 64
    cache = torch.randn(B, T, H, D, device=device, dtype=torch.bfloat16)
    q, lengths = torch.randn(B, H, D, device=device, dtype=torch.bfloat16), torch.full((B,), T, device=device)
    assert cache.numel() > 2**31
    whole = ops.decode_attention(q, cache, cache, lengths)
    alone = ops.decode_attention(q[-1:], cache[-1:], cache[-1:], lengths[-1:])
    assert torch.equal(whole[-1:], alone)


@pytest.mark.parametrize("rows", [64, 128, 192, 320])
def test_splits_of_any_size(rows: int, device: torch.device) -> None:
    """Some get no rows at all: 64 rows a block, sequences of 1, 64, 65 and 300 rows."""
    q, k, v = inputs(4, 300, 2, 24, device)
    lengths = torch.tensor([1, 64, 65, 300], device=device)
    out = decode_attention_fwd(q, k, v, lengths, 0.2, rows)
    truth = reference.decode_attention(q.double(), k.double(), v.double(), lengths, scale=0.2)
    assert (out - truth).norm() <= 1e-6 * truth.norm()


def test_rows_beyond_the_length_are_never_used(device: torch.device) -> None:
    q, k, v = inputs(2, 130, 2, 16, device)
    lengths = torch.tensor([70, 3], device=device, dtype=torch.int32)
    expected = ops.decode_attention(q, k, v, lengths)
    for cache in (k, v):
        cache[0, 70:], cache[1, 3:] = float("nan"), float("nan")
    assert torch.equal(ops.decode_attention(q, k, v, lengths), expected)


def test_lengths_beyond_the_cache_count_as_full_and_0_gives_nan(device: torch.device) -> None:
    q, k, v = inputs(2, 70, 2, 16, device)
    full = ops.decode_attention(q, k, v, torch.tensor([70, 70], device=device))
    assert torch.equal(ops.decode_attention(q, k, v, torch.tensor([70, 10**6], device=device)), full)
    for rows in (64, 128):
        empty = decode_attention_fwd(q, k, v, torch.zeros(2, dtype=torch.int64, device=device), 0.1, rows)
        assert empty.isnan().all()


def test_a_cache_of_any_strides(device: torch.device) -> None:
    q, k, v = inputs(2, 70, 3, 16, device)
    lengths = torch.tensor([70, 33], device=device)
    expected = ops.decode_attention(q, k, v, lengths)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    strided_q = q.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.decode_attention(strided_q, *heads_first, lengths), expected)


@pytest.mark.parametrize(
    ("capacity", "rows"), [(1, 128), (1024, 128), (8192, 128), (8193, 192), (16384, 256), (10**6, 15680)]
)
def test_the_capacity_decides_how_rows_are_split(capacity: int, rows: int) -> None:
    assert rows_per_split(capacity) == rows
    assert -(-capacity // rows) <= 64


@pytest.mark.parametrize("T", [100, 300])  # in one split, in three
def test_a_sequence_gives_the_same_bits_in_any_batch(T: int, device: torch.device) -> None:
    """Alone, at any place in a batch, beside longer and shorter ones, and for any number of heads."""
    q, k, v = inputs(5, T, 3, 24, device)
    lengths = torch.tensor([T, 1, 65, T - 1, 40], device=device)
    whole = ops.decode_attention(q, k, v, lengths)
    for rows in ([0], [3], [4, 3, 2], [1, 1, 3]):
        part = ops.decode_attention(q[rows], k[rows], v[rows], lengths[rows])
        assert torch.equal(part, whole[rows])
    one_head = ops.decode_attention(q[:, 1:2], k[:, :, 1:2], v[:, :, 1:2], lengths)
    assert torch.equal(one_head, whole[:, 1:2])


@pytest.mark.parametrize("shape", [(0, 2, 16), (2, 0, 16)])
def test_empty_batches(shape: tuple[int, int, int], device: torch.device) -> None:
    B, H, D = shape
    cache = torch.zeros(B, 5, H, D, device=device)
    q, lengths = torch.zeros(shape, device=device), torch.ones(B, dtype=torch.int64, device=device)
    assert ops.decode_attention(q, cache, cache, lengths).shape == shape


def test_opcheck_and_compile(device: torch.device) -> None:
    q, k, v = inputs(2, 20, 2, 16, device)
    lengths = torch.tensor([20, 7], device=device)
    torch.library.opcheck(torch.ops.fusedgpt.decode_attention, (q, k, v, lengths, 0.25))
    compiled = torch.compile(ops.decode_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, lengths), ops.decode_attention(q, k, v, lengths))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache": torch.zeros(2, 5, 3, 16)}, r"k_cache: expected \(2, T, 2, 16\)"),
        ({"v_cache": torch.zeros(2, 5, 2, 16).half()}, "v_cache: expected the dtype of k_cache"),
        ({"q": torch.zeros(2, 2, 16).half()}, "k_cache: expected the dtype of q"),
        ({"lengths": torch.ones(2)}, "lengths: expected an integer tensor"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths: expected \(2,\)"),
        ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, "lengths: expected device cpu"),
        ({"q": torch.zeros(2, 1, 2, 16)}, r"q: expected \(B, H, D\)"),
        ({"scale": -1.0}, "scale: expected a positive number"),
        ({"k_cache": torch.zeros(2, 6, 2, 16)}, "v_cache: expected the shape of k_cache"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    cache = torch.zeros(2, 5, 2, 16)
    good = {
        "q": torch.zeros(2, 2, 16),
        "k_cache": cache,
        "v_cache": cache,
        "lengths": torch.ones(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(**{**good, **change})

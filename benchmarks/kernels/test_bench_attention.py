"""Causal attention against SDPA and FlexAttention, at the points of flash-attention's published charts.

16k tokens of width 2048 at every length. FLOPs: 4 B H T^2 D, half of them because of the mask; 2.5 times as
many backward. Our backward is deterministic; of the rivals only sdpa_fa2_deterministic's is (PyTorch refuses
cuDNN's in that mode).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.kernels.harness import CUDA, DEVICE, DIRECTIONS, DTYPE, Bench, choose, compiled, randn
from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases

CASES = {D: cases.attention_case(1, *choose((1024, 4), (65, 1)), D) for D in choose((64, 128), (16,))}
LENGTHS = choose([512, 1024, 2048, 4096, 8192, 16384], [64])
TOKENS, WIDTH = choose((16384, 2048), (64, 32))
TENSORS = {"forward": 4, "backward": 8, "both": 12}  # (B, T, H, D) read and written
FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
BACKENDS = {"sdpa_fa2": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention by `backend` on views, (B, T, H, D) throughout."""
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flex(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention under torch.compile, without which it is no contender."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flex_attention(q, k, v, block_mask=mask)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's algorithms that give the same bits again, without its filling of new memory."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("contender", ["ours", "sdpa_fa2", "sdpa_fa2_deterministic", "sdpa_cudnn", "flex"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", list(CASES))
def test_attention(contender: str, D: int, T: int, direction: str, bench: Bench) -> None:
    if not CUDA and contender in ("sdpa_cudnn", "sdpa_fa2_deterministic"):
        pytest.skip(f"{contender} needs a GPU")
    if contender == "sdpa_fa2_deterministic" and direction == "forward":
        pytest.skip("every forward is deterministic")
    if not CUDA and contender == "flex" and direction != "forward":
        pytest.skip("FlexAttention has no backward on a CPU")
    functions = {name: partial(sdpa, backend) for name, backend in BACKENDS.items()}
    functions["sdpa_fa2_deterministic"] = functions["sdpa_fa2"]
    if contender == "flex":
        mask = create_block_mask(causal, None, None, T, T, device=DEVICE.type)
        functions["flex"] = compiled(partial(flex, mask))
    B, H = TOKENS // T, WIDTH // D
    with deterministic() if contender.endswith("deterministic") else nullcontext():
        bench.contend(
            CASES[D],
            contender,
            {name: randn(B, T, H, D) for name in ("q", "k", "v")},
            direction,
            shape=(B, T, H, D),
            flops=FACTOR[direction] * 0.5 * 4 * B * H * T * T * D,
            bytes_=TENSORS[direction] * B * H * T * D * DTYPE.itemsize,
            ours=ops.attention,
            **functions,
        )

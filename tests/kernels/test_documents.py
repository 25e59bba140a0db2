"""What attention's kernels read of documents: ids in 32 bits, and the blocks to visit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import ops

pytestmark = pytest.mark.usefixtures("triton_kernels")


def expected_spans(ids: Tensor) -> list[list[int]]:
    """[first, same_first, same_last, last] of each block of one sequence, block by block."""
    blocks = [block.tolist() for block in ids.split(64)]
    single = [set(block) if len(set(block)) == 1 else {object()} for block in blocks]
    spans = []
    for i, block in enumerate(blocks):
        meets = [j for j, b in enumerate(blocks) if min(b) <= max(block) and max(b) >= min(block)]
        left = next((j for j in range(i, -1, -1) if single[j] != set(block)), -1)
        right = next((j for j in range(i, len(blocks)) if single[j] != set(block)), len(blocks))
        spans.append([meets[0], left + 1, right - 1, meets[-1]])
    return spans


@pytest.mark.parametrize("T", [1, 63, 64, 130, 1500])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_spans_block_by_block(T: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(1, 300, (2, T), generator=generator)
    ids = torch.stack([torch.repeat_interleave(torch.arange(T) % 11, row)[:T] for row in lengths]).to(dtype)
    prepared = ops.prepare_documents(ids.to(device))
    assert prepared.spans is not None
    assert torch.equal(prepared.ids.cpu(), ids.int())
    assert prepared.spans.tolist() == [expected_spans(row) for row in ids]


def test_any_strides_and_no_tokens(device: torch.device) -> None:
    ids = torch.arange(12, device=device).view(3, 4)
    assert torch.equal(ops.prepare_documents(ids.T).ids, ids.T.int())
    assert ops.prepare_documents(ids[:, :0]).ids.shape == (3, 0)


def test_opcheck(device: torch.device) -> None:
    torch.library.opcheck(torch.ops.fusedgpt.prepare_documents, (torch.zeros(2, 70).long().to(device),))


@pytest.mark.parametrize("ids", [torch.zeros(3).long(), torch.zeros(2, 3)])
def test_bad_input_is_named(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="documents: expected"):
        ops.prepare_documents(ids)

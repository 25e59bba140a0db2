from __future__ import annotations

import pytest

from fusedgpt.kernels.tools.hardware import blocks_per_multiprocessor


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "blocks"),
    [
        (4, 37, 0, 12),  # CUDA Best Practices Guide, "Calculating Occupancy": 12 blocks, 75%
        (10, 37, 0, 4),  # the same page: 4 blocks, 63%
        (4, 32, 0, 16),  # 64 warps
        (1, 16, 0, 32),  # blocks
        (8, 188, 0, 1),
        (8, 128, 0, 2),
        (8, 129, 0, 1),  # 136 registers a thread are allocated: 56 warps do not need 65,536
        (4, 168, 0, 3),
        (4, 32, 113 * 1024, 2),  # 113 + 1 KiB: two fit 228
        (4, 32, 113 * 1024 + 1, 1),
        (4, 32, 227 * 1024, 1),
        (4, 32, 227 * 1024 + 1, 0),
    ],
)
def test_resident_blocks(warps: int, registers: int, shared: int, blocks: int) -> None:
    """Of 9.0, whose limits are those of the worked examples (7.0) but for shared memory."""
    assert blocks_per_multiprocessor(90, warps=warps, registers=registers, shared=shared) == blocks


def test_smaller_architectures_hold_fewer() -> None:
    used = {"warps": 4, "registers": 32, "shared": 30 * 1024}
    assert [blocks_per_multiprocessor(arch, **used) for arch in (80, 86, 90, 120)] == [5, 3, 7, 3]

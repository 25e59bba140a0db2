"""What the report assumes of the GPUs. Every constant is public; its source stands beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor; CUDA Programming Guide, technical specifications table."""

    blocks: int
    warps: int
    shared: int  # KiB
    registers: int = 65536

    @property
    def shared_per_block(self) -> int:
        """KiB that one block may use: one less than there are."""
        return self.shared - 1


MULTIPROCESSORS = {  # by compute capability
    80: Multiprocessor(blocks=32, warps=64, shared=164),
    86: Multiprocessor(blocks=16, warps=48, shared=100),
    87: Multiprocessor(blocks=16, warps=48, shared=164),
    89: Multiprocessor(blocks=24, warps=48, shared=100),
    90: Multiprocessor(blocks=32, warps=64, shared=228),
    100: Multiprocessor(blocks=32, warps=64, shared=228),
    103: Multiprocessor(blocks=32, warps=64, shared=228),
    120: Multiprocessor(blocks=24, warps=48, shared=100),
}


def blocks_per_multiprocessor(arch: int, *, warps: int, registers: int, shared: int) -> int:
    """How many thread blocks are resident at once; 0 if not even one fits.

    warps: per block. registers: per thread. shared: bytes per block. As in NVIDIA's occupancy calculator: a
    warp gets registers in units of 256, and each of the four schedulers holds as many warps; shared memory
    comes in units of 128 bytes, and the system reserves 1 KiB of it per block.
    """
    limits = MULTIPROCESSORS[arch]
    by_registers = limits.registers // (_round_up(32 * max(registers, 1), 256)) // 4 * 4
    by_shared = limits.shared * 1024 // _round_up(shared + 1024, 128)
    if shared > limits.shared_per_block * 1024:
        return 0
    return min(limits.blocks, limits.warps // warps, by_registers // warps, by_shared)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU of compute capability 9.0."""

    multiprocessors: int = 132
    clock: float = 1.755e9  # Hz, assumed under load; the boost clock is 1.98e9
    flops: float  # of a large bf16 matrix product per second; the datasheet has 989e12
    bandwidth: float  # bytes per second of a large copy
    l2: float = 5.5e12  # bytes per second read from the L2 cache; chipsandcheese.com on the H100 PCIe


GPUS = {
    # NVIDIA's datasheet has 3.35 TB/s; QuACK's best kernels reach 2.99. Large products: 2% below an H200's.
    "H100": GPU(flops=775e12, bandwidth=3.0e12),
    # 4.8 TB/s; published copies reach 4.2, large products 790 TFLOP/s.
    "H200": GPU(flops=790e12, bandwidth=4.2e12),
}
LAUNCH = 1e-6  # seconds between the work of two kernels in a CUDA graph, assumed

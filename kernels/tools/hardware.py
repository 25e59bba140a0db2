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

"""How many cycles a stretch of machine code takes on one scheduler of a multiprocessor, without a GPU.

Each warp issues in order: an instruction waits for the cycles and barriers that the compiler encoded, for its
execution unit, and for the scheduler, which issues one instruction per cycle, of the warp that can go first.
Matrix products of a warpgroup run on the tensor core while the warp goes on, until it waits for them. The
four schedulers of a multiprocessor do the same, so one is simulated: of a block of 8 warps it has 2.

Not modelled: caches, bank conflicts, bandwidth (see predict.py), branches that are not taken, data that the
tensor memory accelerator has yet to bring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusedgpt.kernels.tools.sass import Instruction, Mix

# Cycles per warp on one scheduler of 9.0: CUDA Programming Guide, arithmetic throughput (lanes
# per cycle and multiprocessor: fp32 128, integer and logic 64, multiplication 64, exp2 16).
_BUSY = {"fp32": 1, "alu": 2, "imad": 2, "mufu": 8}
TENSOR_FLOPS = 1024  # per cycle and scheduler, bf16: H100 whitepaper, 989 TFLOP/s at 132 x 1.83 GHz

# Cycles until a result is there. Memory: Luo et al. 2024 (arXiv 2402.13499), H100 (shared 29, L2 263, global
# 479, of which under load half as much again is assumed); the others as on Volta (arXiv 1804.06826).
_LATENCY = {"shared": 29, "mufu": 22, "alu": 6, "fp32": 6, "imad": 6, "wait": 20, "other": 20}
DRAM, L2 = 700, 263
_BARRIER = 20


@dataclass(eq=False)
class _Warp:
    block: int
    ready: float  # cycle from which the next instruction may be issued
    position: int = 0  # in the code
    last: float = -1.0  # when it issued last
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)  # when each is released
    products: list[float] = field(default_factory=list)  # when each group of matrix products is finished
    copies: list[float] = field(default_factory=list)  # when each group of asynchronous copies has arrived
    copying: float = 0.0  # when the open group has


def cycles(code: Sequence[Instruction], *, blocks: int, warps: int, memory: int = DRAM) -> float:
    """Cycles until the last of `blocks` thread blocks of `warps` warps has run `code`.

    memory: cycles until a load from global memory arrives.
    """
    return _run(code, blocks, warps, memory, iterations=1)[-1] if code else 0.0


def cycles_per_iteration(
    code: Sequence[Instruction], *, blocks: int, warps: int, memory: int = DRAM
) -> float:
    """Cycles in which every block goes once round the loop `code`, when all blocks have got going."""
    ends = _run(code, blocks, warps, memory, iterations=5)  # the last one has fewer blocks beside it
    return (ends[3] - ends[1]) / 2


def busy(mix: Mix, *, blocks: int, warps: int) -> dict[str, float]:
    """Cycles for which each unit, and the scheduler ("issue"), is busy when every block executes `mix`."""
    per_scheduler = blocks * warps / 4
    found = {unit: per_scheduler * n * mix.units.get(unit, 0) for unit, n in _BUSY.items()}
    found["issue"] = per_scheduler * mix.instructions
    found["shared"] = 4 * per_scheduler * mix.shared_cycles
    found["tensor"] = per_scheduler * mix.flops / TENSOR_FLOPS
    return found


def _run(code: Sequence[Instruction], blocks: int, warps: int, memory: int, iterations: int) -> list[float]:
    """When the last warp of one scheduler has finished each iteration."""
    per_block = max(1, warps // 4)
    count = max(1, blocks * warps // 4)
    # Blocks start one after the other, or all would do the same at the same time.
    running = [_Warp(i // per_block, ready=100.0 * (i // per_block)) for i in range(count)]
    free = dict.fromkeys(["tensor", "memory", "", *_BUSY], 0.0)  # when a unit is
    needs = [_needed(instruction) for instruction in code]
    arrived: dict[int, list[_Warp]] = {}  # block -> who waits at its barrier
    ends = [0.0] * iterations
    now = -1.0
    while running:
        first, soonest, slot = running[0], math.inf, now + 1
        for warp in running:  # the one that can issue first, of several the one that has waited longest
            time = max(warp.ready, free[needs[warp.position % len(code)]], slot)
            if time < soonest or (time == soonest and warp.last < first.last):
                first, soonest = warp, time
        now = soonest
        position = first.position % len(code)
        _issue(first, code[position], now, free, memory)
        first.position += 1
        if position + 1 == len(code):
            ends[first.position // len(code) - 1] = first.ready
            if first.position == iterations * len(code):
                running.remove(first)
                continue
        following = code[(position + 1) % len(code)]
        if following.waits:
            first.ready = max(first.ready, *(first.barriers[i] for i in following.waits))
        if code[position].name == "BAR":
            waiting = arrived.setdefault(first.block, [])
            waiting.append(first)
            running.remove(first)
            if len(waiting) == min(per_block, count):
                for warp in waiting:
                    warp.ready = max(warp.ready, now + _BARRIER)
                running += waiting
                waiting.clear()
    return ends


def _needed(instruction: Instruction) -> str:
    """The unit that must be free for it to be issued; matrix products queue."""
    unit = instruction.unit
    return "memory" if unit in ("shared", "global") else unit if unit in _BUSY else ""


def _issue(warp: _Warp, instruction: Instruction, now: float, free: dict[str, float], memory: int) -> None:
    unit, name = instruction.unit, instruction.name
    warp.ready, warp.last = now + instruction.stall, now
    finished = now + _LATENCY.get(unit, 6)
    if unit in _BUSY:
        free[unit] = now + _BUSY[unit]
    elif unit in ("shared", "global"):
        free["memory"] = now + 4 * max(1, instruction.width // 4)  # the four schedulers share it
        finished = max(finished, free["memory"] + (memory if name in ("LDG", "LDGSTS") else 0))
    elif unit == "tensor":
        finished = free["tensor"] = max(now, free["tensor"]) + instruction.flops / TENSOR_FLOPS
        if name == "HGMMA" and "gsb0" in instruction.operands:
            warp.products.append(finished)
    elif name == "LDGDEPBAR":
        warp.copies.append(warp.copying)
    elif name in ("WARPGROUP", "DEPBAR") and "," in instruction.operands:
        groups = warp.products if name == "WARPGROUP" else warp.copies
        last = len(groups) - int(instruction.operands.split(",")[1], 0)  # this many must be finished
        warp.ready = max(warp.ready, groups[last - 1]) if last > 0 else warp.ready
    if name == "LDGSTS":
        warp.copying = finished
    written, read = instruction.barriers
    if written < 6:
        warp.barriers[written] = max(warp.barriers[written], finished)
    if read < 6:
        warp.barriers[read] = max(warp.barriers[read], now + 10)

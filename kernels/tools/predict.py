"""How long a launch would take on an H100 or H200: a prediction from its machine code, not a measurement.

The time of a thread block is that of its instructions (simulate.py) with as many blocks beside it as fit a
multiprocessor; blocks go to free places in the order of the grid. A launch takes no less than its bytes at
the bandwidth of a large copy, its tiles at that of the L2 cache, or its products at the rate of a large one.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import ceil, prod

from torch import Tensor

from fusedgpt.kernels.tools import simulate
from fusedgpt.kernels.tools.compiling import Compiled
from fusedgpt.kernels.tools.hardware import GPUS, LAUNCH
from fusedgpt.kernels.tools.sass import Code, Mix

_PRODUCTS = {"fwd": 2, "dkdv": 4, "dq": 3}  # matrix products of attention kernels, each of 2 T^2 D / 2 FLOP
_BOUND = 0.8  # a unit that is busy for this share of the time is what bounds it


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a launch is predicted to take."""

    microseconds: dict[str, float]  # by GPU
    bound: str  # on an H200: what to save on to be faster
    flops: int  # of matrix products that are needed: masked ones count as none
    bytes: int  # that must be read and written once

    def rate(self, gpu: str) -> str:
        """TFLOP/s where there are matrix products, otherwise GB/s."""
        if self.flops:
            return f"{self.flops / self.microseconds[gpu] / 1e6:.0f} TFLOP/s"
        return f"{self.bytes / self.microseconds[gpu] / 1e3:.0f} GB/s"


def predict(launch: Compiled, code: Code, resident: int) -> Prediction:
    """The prediction for a launch on 9.0, `resident` of whose blocks fit a multiprocessor."""
    grid, warps = prod(launch.grid), launch.result.metadata.num_warps
    gpu = GPUS["H200"]
    together = min(resident, ceil(grid / gpu.multiprocessors))
    trips = _trips(launch, code, grid)
    loop, masked, once = _block_cycles(code, together, warps)
    durations = [full * loop + edge * masked + once for full, edge in trips]
    work = schedule(durations, gpu.multiprocessors * together, grid) / gpu.clock
    mean = sum(durations) / len(durations) * grid / (gpu.multiprocessors * together) / gpu.clock
    moved, flops = _bytes(launch), _flops(launch)
    executed = sum(_executed(code, full, edge) for full, edge in trips) * warps * grid / len(trips)
    tiles = sum(full + edge for full, edge in trips) * grid / len(trips) * _tile_bytes(launch)
    times = {
        name: {
            "work": work,
            "bytes": moved / it.bandwidth,
            "L2": tiles / it.l2,
            "tensor": executed / it.flops,
        }
        for name, it in GPUS.items()
    }
    bound = max(times["H200"], key=lambda name: times["H200"][name])
    if bound == "work":
        bound = "tail" if mean < 0.75 * work else _busiest(code, loop, once, together, warps)
    seconds = {name: LAUNCH + max(found.values()) for name, found in times.items()}
    return Prediction(
        microseconds={name: 1e6 * found for name, found in seconds.items()},
        bound=bound,
        flops=flops,
        bytes=moved,
    )


def schedule(durations: list[float], places: int, grid: int) -> float:
    """When the last of `grid` blocks ends, if each takes the first free place; durations repeat."""
    if len(set(durations)) == 1:
        return ceil(grid / places) * durations[0]
    free = [0.0] * places
    for i in range(grid):
        heapq.heappushpop(free, free[0] + durations[i % len(durations)])
    return max(free)


def _block_cycles(code: Code, together: int, warps: int) -> tuple[float, float, float]:
    """Cycles of an iteration of the hot loop, of one on masked tiles, and of what is outside of loops."""
    memory = simulate.L2 if code.hot and code.hot.flops else simulate.DRAM
    used = {"blocks": together, "warps": warps, "memory": memory}
    hot = simulate.cycles_per_iteration(code.hot.code, **used) if code.hot else 0.0
    masked = simulate.cycles_per_iteration(code.others[0].code, **used) if code.others else 0.0
    return hot, masked, simulate.cycles(code.straight.code, blocks=together, warps=warps)


def _trips(launch: Compiled, code: Code, grid: int) -> list[tuple[float, float]]:
    """Iterations (of the hot loop, on masked tiles) of the blocks in the order of the grid, which repeats."""
    a, kernel = launch.arguments, launch.kernel
    if kernel.startswith("_attention") and code.hot and code.hot.flops:
        T, M, N = a["T"], a["BLOCK_M"], a["BLOCK_N"]
        if "dkdv" in kernel:
            tiles = [_tiles_below(start, T, M, N) for start in range(0, T, N)]
        else:
            tiles = [_tiles_left(start, T, M, N) for start in reversed(range(0, T, M))]
        if not code.others:  # masked tiles are in the code that runs once
            tiles = [(full, 0) for full, _ in tiles]
        group = a.get("heads", 1)  # whose first tiles go before the second tile of any
        heads = [min(group, grid // len(tiles) - first) for first in range(0, grid // len(tiles), group)]
        return [tile for n in heads for tile in tiles for _ in range(n)]
    if code.hot is None:
        return [(0, 0)]
    if "TILE_K" in a:
        return [(ceil(a.get("N", a["M"]) / a["TILE_K"]), 0)]
    if "ROWS" in a:
        return [(ceil(a["N"] / a["ROWS"] / launch.grid[0]), 0)]
    # Both passes over a row of logits read it, the second from the L2 cache: as many bytes as memory moves.
    touched = code.hot.loaded + (0 if a.get("HAS_GRADIENT") else code.hot.stored)
    return [(_bytes(launch) / grid / (touched * 32 * launch.result.metadata.num_warps), 0)]


def _tiles_left(start: int, T: int, M: int, N: int) -> tuple[int, int]:
    """(full, masked) tiles of N keys for M queries from `start`."""
    full = start // N
    return full, ceil(min(start + M, T) / N) - full


def _tiles_below(start: int, T: int, M: int, N: int) -> tuple[int, int]:
    """(full, masked) tiles of M queries for N keys from `start`."""
    below = min(ceil((start + N) / M) * M, T)
    return ceil((T - below) / M), ceil(below / M) - start // M


def _flops(launch: Compiled) -> int:
    a = launch.arguments
    if "TILE_K" in a:
        return int(prod(launch.grid) * 2 * a["TILE"] ** 2 * a.get("N", a["M"]))
    products = next((n for name, n in _PRODUCTS.items() if launch.kernel == f"_attention_{name}_kernel"), 0)
    if not products:
        return 0
    rows = a["BLOCK_N"] if "dkdv" in launch.kernel else a["BLOCK_M"]
    heads = prod(launch.grid) // ceil(a["T"] / rows)
    return int(products * heads * a["T"] ** 2 * a["D"])


def _executed(code: Code, full: float, masked: float) -> float:
    """FLOP of the matrix products that one warp executes."""
    others = code.others[0].flops if code.others else 0
    return full * (code.hot.flops if code.hot else 0) + masked * others + code.straight.flops


def _tile_bytes(launch: Compiled) -> int:
    """Bytes that a block of matrix products reads in an iteration, mostly from the L2 cache; else 0."""
    a = launch.arguments
    if "TILE_K" in a:
        x = next(getattr(x, "base", x) for x in a.values() if isinstance(getattr(x, "base", x), Tensor))
        return int(2 * a["TILE"] * a["TILE_K"] * x.element_size())
    if not _flops(launch):
        return 0
    q = getattr(a["q"], "base", a["q"])
    rows = a["BLOCK_M"] if "dkdv" in launch.kernel else a["BLOCK_N"]
    return int(2 * rows * a["BLOCK_D"] * q.element_size())


def _bytes(launch: Compiled) -> int:
    """Of every tensor argument once, twice for logits that become their gradient; optimizers have tables."""
    a = launch.arguments
    if launch.kernel == "_muon_kernel":  # X, master or momentum, and what is in the model's dtype
        there = a["DTYPE"].primitive_bitwidth // 8
        return int(a["x_ptr"].numel() * (2 + 8 + (there % 4 if a["UPDATE"] else there)))
    if launch.kernel in ("_adamw_kernel", "_grad_norm_kernel"):
        grad, param = (
            a[name].primitive_bitwidth // 8 if name in a else 0 for name in ("GRAD_DTYPE", "PARAM_DTYPE")
        )
        moments = 24 if launch.kernel == "_adamw_kernel" else 0  # and the master, read and written
        return int(a["n_chunks"] * a["CHUNK"] * (grad + moments + param % 4))
    tensors = {id(x): x for x in (getattr(x, "base", x) for x in a.values()) if isinstance(x, Tensor)}
    once = sum(x.numel() * x.element_size() for x in tensors.values())
    return once * 2 if a.get("HAS_GRADIENT") else once


def _busiest(code: Code, loop: float, once: float, together: int, warps: int) -> str:
    """The unit that bounds the longer of loop and straight code, or "latency"."""
    mix: Mix = code.hot if code.hot and loop else code.straight
    busy = simulate.busy(mix, blocks=together, warps=warps)
    unit = max(busy, key=lambda unit: busy[unit])
    return unit if busy[unit] > _BOUND * (loop if mix is code.hot else once) else "latency"

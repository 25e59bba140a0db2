"""The predictions in cases whose answer is known: what bounds a kernel, and by how much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedgpt.kernels.tools import predict, sass, simulate
from fusedgpt.kernels.tools.compiling import Compiled
from fusedgpt.kernels.tools.hardware import GPUS

from .test_sass import listing

ELEMENTS = 1 << 27  # bf16, of which a block of 128 threads with 16 bytes each copies 1,024


def launched(kernel: str, grid: int, arguments: dict[str, Any]) -> Compiled:
    result = SimpleNamespace(metadata=SimpleNamespace(num_warps=4))
    return Compiled(kernel=kernel, grid=(grid,), arguments=arguments, result=result)


def copying(*work: str) -> predict.Prediction:
    """Of a kernel that does `work` to each 16 bytes that it copies."""
    code = ["LDG.E.128 R4, [R2]", *work, "STG.E.128 [R2], R4", "EXIT"]
    x = {name: torch.empty(ELEMENTS, dtype=torch.bfloat16, device="meta") for name in ("x", "out")}
    launch = launched("_copy_kernel", ELEMENTS // 1024, x)
    return predict.predict(launch, sass.parse(listing("\n".join(code))), resident=16)


def test_a_copy_takes_its_bytes() -> None:
    copied = copying()
    assert copied.bound == "bytes"
    assert copied.bytes == 4 * ELEMENTS
    for name, gpu in GPUS.items():
        assert copied.microseconds[name] == pytest.approx(1e6 * copied.bytes / gpu.bandwidth, rel=0.01)
    assert copied.rate("H200").endswith(" GB/s")


@pytest.mark.parametrize(
    ("instruction", "unit", "cycles"),
    [("MUFU.EX2 R4, R4", "mufu", 8), ("LOP3.LUT R4, R4", "alu", 2), ("FFMA R4, R4", "issue", 1)],
)
def test_a_busy_unit_bounds_a_kernel(instruction: str, unit: str, cycles: int) -> None:
    """Its instructions take the cycles of the programming guide, and twice as many twice as long."""
    once, twice = (copying(*[instruction] * n) for n in (400, 800))
    assert (once.bound, twice.bound) == (unit, unit)
    least = ELEMENTS // 1024 * 400 * cycles / 132 / 1.755e9
    assert 1e6 * least < once.microseconds["H200"] < 1.2e6 * least
    assert twice.microseconds["H200"] == pytest.approx(2 * once.microseconds["H200"], rel=0.1)
    assert copying(*[instruction] * 4).bound == "bytes"


def test_latency_bounds_what_has_too_few_bytes_under_way() -> None:
    many, few = ({"x": torch.empty(n * 128, device="meta")} for n in (1 << 13, 140))
    code = sass.parse("""
        /*0000*/    LDG.E R4, [R2] ;    /* 0x0000000000007308 */
                                        /* 0x000e220000000000 */
        /*0010*/    EXIT ;              /* 0x000000000000794d */
                                        /* 0x001fe20000000000 */
""")  # which waits for the load
    assert predict.predict(launched("_read_kernel", 1 << 13, many), code, resident=1).bound == "latency"
    assert predict.predict(launched("_read_kernel", 140, few), code, resident=1).bound == "tail"  # 132 and 8


def test_blocks_take_the_first_free_place() -> None:
    assert predict.schedule([3.0], places=4, grid=9) == 9.0
    assert predict.schedule([1.0, 1.0, 1.0, 3.0], places=2, grid=4) == 4.0
    assert predict.schedule([3.0, 1.0, 1.0, 1.0], places=2, grid=4) == 3.0  # the longest first


LOOPS = sass.parse(
    listing("""
.L_x_1:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P0 BRA `(.L_x_1)
.L_x_2:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FSEL R4, R4, R5, P0
    @P0 BRA `(.L_x_2)
    EXIT
""")
)


@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq"])
@pytest.mark.parametrize(("M", "N"), [(128, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("T", [1024, 1000, 100])
def test_causal_tiles_are_those_with_a_visible_key(kernel: str, M: int, N: int, T: int) -> None:
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    tiles = [[visible[i : i + M, j : j + N] for j in range(0, T, N)] for i in range(0, T, M)]
    seen = sum(bool(tile.any()) for row in tiles for tile in row)
    masked = sum(bool(tile.any() and not tile.all()) for row in tiles for tile in row)
    blocks = len(tiles[0]) if kernel == "dkdv" else len(tiles)
    q = torch.empty(2, T, 3, 64, device="meta")
    arguments = {"q": q, "T": T, "D": 64, "BLOCK_D": 64, "BLOCK_M": M, "BLOCK_N": N, "heads": 4}
    launch = launched(f"_attention_{kernel}_kernel", 6 * blocks, arguments)
    trips = predict._trips(launch, LOOPS, 6 * blocks)
    assert len(trips) == 6 * blocks
    assert sum(full + edge for full, edge in trips) == 6 * seen
    assert sum(edge for _, edge in trips) >= 6 * masked
    assert trips[0] == trips[3] == trips[4 * blocks]  # of four heads, then of two, the same tile first
    found = predict.predict(launch, LOOPS, resident=1)
    assert found.flops == {"fwd": 2, "dkdv": 4, "dq": 3}[kernel] * 6 * T * T * 64
    assert found.rate("H100").endswith(" TFLOP/s")


def test_products_run_beside_other_work_until_they_are_waited_for() -> None:
    start, wait = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    work = ["FFMA R4, R4, R5, R6"] * 100

    def cycles(*code: str, blocks: int = 1) -> float:
        instructions = sass.parse(listing("\n".join([*code, "EXIT"]))).straight.code[:-1]
        return simulate.cycles_per_iteration(instructions, blocks=blocks, warps=4)

    assert cycles(start, *work, wait) == pytest.approx(128, abs=4)  # 64 x 256 x 16 at 4,096 FLOP a cycle
    assert cycles(start, wait, *work) == pytest.approx(228, abs=4)
    assert cycles(start, wait, *work, blocks=2) == pytest.approx(256, abs=4)  # each beside the other's
    assert cycles(*work * 10, blocks=4) == pytest.approx(4000, rel=0.05)
    assert cycles(*work[:50], "BAR.SYNC 0x0", *work[:50], blocks=2) == pytest.approx(202, abs=25)


def test_the_scheduling_of_an_instruction_is_read() -> None:
    """Stall cycles, the barrier that is released, and the one that is waited for, of an encoding."""
    text = """
        /*0000*/    MUFU.RCP R0, R0 ;   /* 0x0000000000007308 */
                                        /* 0x008ee40000001000 */
        /*0010*/    EXIT ;              /* 0x000000000000794d */
                                        /* 0x000fea0003800000 */
"""
    mufu = sass.parse(text).straight.code[0]
    assert (mufu.stall, mufu.barriers, mufu.waits) == (2, (3, 7), (3,))

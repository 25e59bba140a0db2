from __future__ import annotations

import pytest

from fusedgpt.kernels.tools import sass


def listing(code: str) -> str:
    """`nvdisasm -c` of instructions and labels, one a line."""
    lines = [line.strip() for line in code.strip().splitlines()]
    return "\n".join(
        x if x.startswith(".L") else f"        /*{i:04x}*/    {x} ;" for i, x in enumerate(lines)
    )


MASKING = 20 * "FSEL R4, R24, R25, P0\n"
MATMUL = f"""
    S2R R0, SR_TID.X
    @!P1 BRA `(.L_x_9)
.L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20], R10
    @!P0 BRA `(.L_x_8)
.L_x_2:
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    MUFU.EX2 R5, R4
    FFMA R5, R5, R6, R7
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FMNMX R4, R24, R25, !PT
    MUFU.EX2 R4, R4
    IMAD.WIDE R2, R3, R4, R6
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P2 UTMALDG.4D [UR24], [UR10]
    @P3 BRA `(.L_x_1)
.L_x_3:
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
{MASKING}    @P3 BRA `(.L_x_3)
.L_x_9:
    STG.E.128 desc[UR6][R2.64], R16
    EXIT
.L_x_8:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20], R10
    @!P0 BRA `(.L_x_8)
    BRA `(.L_x_2)
.L_x_7:
    BRA `(.L_x_7)
"""


def test_the_loop_of_full_tiles_is_counted() -> None:
    code = sass.parse(listing(MATMUL))
    assert code.hot is not None
    assert code.hot.units == {
        "tensor": 2,
        "mufu": 2,
        "fp32": 1,
        "alu": 1,
        "imad": 1,
        "wait": 4,  # SYNCS, ARRIVE, DEPBAR, BAR; polling, outside the line, is a loop of its own
        "global": 1,
        "other": 3,  # branches
    }
    assert code.hot.flops == 2 * 2 * 64 * 128 * 16 // 4  # per warp
    assert (code.hot.overlapped, code.hot.overlapped_mufu) == (2, 1)
    assert [mix.units["alu"] for mix in code.others] == [20]  # masked tiles
    assert code.straight.units == {"other": 3, "global": 1}
    assert (code.straight.loaded, code.straight.stored) == (0, 16)


def test_a_product_left_running_overlaps_the_next_iteration() -> None:
    body = """
.L_x_1:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    FADD R1, R1, R2
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    FADD R1, R1, R2
    FADD R1, R1, R2
    @P3 BRA `(.L_x_1)
    EXIT
"""
    hot = sass.parse(listing(body)).hot
    assert hot is not None
    assert hot.overlapped == 4


def test_a_loop_inside_the_hot_one_does_not_count() -> None:
    """The outer loop loads the most per iteration; a subroutine is no loop."""
    code = sass.parse(
        listing("""
.L_x_1:
    LDG.E.128 R4, desc[UR8][R2.64]
    @P0 BRA `(.L_x_3)
.L_x_2:
    LDG.E.U16 R4, desc[UR8][R2.64]
    FADD R1, R1, R2
    @P1 BRA `(.L_x_2)
.L_x_3:
    LDGSTS.E.BYPASS.128 [R4], desc[UR12][R6.64], P1
    LDS.64 R4, [R5]
    @P2 EXIT
    BRA `(.L_x_1)
""")
    )
    assert code.hot is not None
    assert code.hot.units == {"global": 2, "shared": 1, "other": 3}
    assert (code.hot.loaded, code.hot.shared_cycles) == (32, 2)
    assert code.straight.instructions == 0


def test_code_without_a_loop_is_straight() -> None:
    code = sass.parse(
        listing("LDG.E.64 R4, desc[UR8][R2.64]\nMUFU.EX2 R4, R4\n@P0 EXIT\nFADD R1, R1, R2\nEXIT")
    )
    assert code.hot is None
    assert code.straight.units == {"global": 1, "mufu": 1, "other": 2, "fp32": 1}


@pytest.mark.parametrize(
    ("instruction", "unit"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "tensor"),
        ("UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR23]", "tensor"),
        ("F2F.BF16.F32 R4, R4", "mufu"),
        ("F2FP.BF16.F32.PACK_AB R4, R4, R5", "alu"),
        ("LOP3.LUT R0, R0, 0x3f8, RZ, 0xc0, !PT", "alu"),
        ("HFMA2 R4, R4, R5, R6", "fp32"),
        ("IMAD.HI.U32 R4, R4, R5, R6", "imad"),
        ("SHFL.BFLY PT, R4, R4, 0x1, 0x1f", "shared"),
        ("LDGDEPBAR", "wait"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "other"),
    ],
)
def test_execution_units(instruction: str, unit: str) -> None:
    code = sass.parse(listing(f"{instruction}\nEXIT"))
    assert list(code.straight.units) == list(dict.fromkeys([unit, "other"]))

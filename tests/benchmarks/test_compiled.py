"""Two kernel reports side by side."""

from __future__ import annotations

from benchmarks.report.compiled import side_by_side, worst


def row(
    arch: int, label: str, registers: int, stack: int, blocks: int, us: float | None = None
) -> dict[str, object]:
    predicted = us and {"microseconds": {"H100": 1.1 * us, "H200": us}}
    numbers = {"registers": registers, "stack": stack, "blocks": blocks, "predicted": predicted}
    return {"kernel": "_dq_kernel", "arch": arch, "dtype": "bf16", "label": label} | numbers


def test_the_worst_of_a_kernels_features_stands_beside_that_of_another_release() -> None:
    old = worst(
        [row(80, "D 64", 100, 0, 2), row(80, "D 64, dropout", 90, 8, 3), row(90, "D 64", 50, 0, 4, 70.4)]
    )
    new = worst([row(80, "D 64", 128, 8, 2), row(90, "D 64", 50, 0, 4, 25.0), row(90, "D 128", 60, 0, 1)])
    assert list(side_by_side(old, new)) == [
        "| kernel | size | dtype | sm_80 | sm_90 |",
        "|---|---|---|---|---|",
        "| dq | D 64 | bf16 | 100 / 8 / 2 -> 128 / 8 / 2 | 50 / 0 / 4 / 70 -> 50 / 0 / 4 / 25 |",
        "| dq | D 128 | bf16 | none | none -> 60 / 0 / 1 |",
    ]

"""Two kernel reports side by side."""

from __future__ import annotations

from benchmarks.report.compiled import side_by_side, worst


def row(arch: int, label: str, registers: int, stack: int, blocks: int) -> dict[str, object]:
    numbers = {"registers": registers, "stack": stack, "blocks": blocks}
    return {"kernel": "_dq_kernel", "arch": arch, "dtype": "bf16", "label": label} | numbers


def test_the_worst_of_a_kernels_features_stands_beside_that_of_another_release() -> None:
    old = worst([row(80, "D 64", 100, 0, 2), row(80, "D 64, dropout", 90, 8, 3), row(90, "D 64", 50, 0, 4)])
    new = worst([row(80, "D 64", 128, 8, 2), row(90, "D 64", 50, 0, 4), row(90, "D 128", 60, 0, 1)])
    assert list(side_by_side(old, new)) == [
        "| kernel | size | dtype | sm_80 | sm_90 |",
        "|---|---|---|---|---|",
        "| dq | D 64 | bf16 | 100 / 8 / 2 -> 128 / 8 / 2 | 50 / 0 / 4 |",
        "| dq | D 128 | bf16 | none | none -> 60 / 0 / 1 |",
    ]

"""Where a step's time goes: figures of made-up work on a GPU, and their table."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.report import page, sections
from benchmarks.workloads import step_profile
from benchmarks.workloads.step_profile import Work

GEMM = "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT"


def work(begin: float) -> list[Work]:
    """A step of 100 us, of which nothing runs during 20."""
    return [
        Work(GEMM, begin, begin + 40),
        Work("_attention_fwd_kernel", begin + 44, begin + 64),
        Work("Memcpy HtoD", begin + 50, begin + 70),  # on another stream, partly beside the kernel
        Work(GEMM, begin + 76, begin + 90),
    ]


def test_overlapping_work_counts_once_and_every_kernel_has_its_sum() -> None:
    found = step_profile.figures([*work(100), *work(0)], 2)
    assert found["ms"] == pytest.approx(0.095)  # 190 us: nothing is known of what follows the last kernel
    assert found["idle_ms"] == pytest.approx((4 + 6 + 4 + 6 + 10) / 2 / 1e3)
    assert found["between_us"] == pytest.approx(4.0)  # of 0, 0, 4, 4, 6, 6 and 10
    assert found["kernels"] == {
        GEMM: [2, pytest.approx(0.054)],
        "_attention_fwd_kernel": [1, pytest.approx(0.020)],
        "Memcpy HtoD": [1, pytest.approx(0.020)],
    }
    assert next(iter(found["kernels"])) == GEMM  # the longest first


def test_nothing_on_the_gpu_is_a_fault() -> None:
    assert "fault" in step_profile.figures([], 2)


def profile(contender: str, **figures: Any) -> dict[str, Any]:
    return {**step_profile.BASE, "device": "NVIDIA H200", "contender": contender, **figures}


def test_the_table_sets_what_was_measured_beside_what_was_predicted() -> None:
    graph = {"splitKreduce_kernel": [1, 0.5], GEMM: [2, 1.5], "_attention_fwd_kernel": [12, 1.0]}
    guess = {
        "aten.mm": [2, 0.8],
        "aten.addmm": [1, 0.2],
        "_attention_fwd_kernel": [12, 2.0],
        "aten.add": [1, 0.1],
    }
    rows = [
        profile("ours", ms=4.0, idle_ms=1.0, between_us=0.9, kernels=graph),
        profile("ours-eager", ms=8.0, idle_ms=5.0, between_us=7.0, kernels=graph | {"elementwise": [1, 0.2]}),
        profile("predicted", ms=3.1, kernels=guess),
    ]
    found = page.markdown([sections.step_profile(rows)])
    assert "CUDA graph: a step takes 4 ms with the profiler on, idle for 1 of them, 0.9 us" in found
    products, attention, others = found.splitlines()[-3:]
    assert products == "| matrix products | 3 | 50.0% | 2 | 2 | 1 | 2.00 |"
    assert attention == "| attention_fwd | 12 | 25.0% | 1 | 1 | 2 | 0.50 |"
    assert others == "| others | 0 | 0.0% | 0 | 0.2 | 0.1 |  |"
    assert "attention_fwd" in page.markdown([sections.step_profile(rows[1:])])  # what was cut leaves the rest


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.workloads.step_profile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(": error: ")[2]) == (
        2,
        "there is no CUDA GPU to profile",
    )

"""Ours in the benchmarks of a GPU, rehearsed without one, in a process where kernels are not interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from unittest.mock import patch

import pytest

from fusedgpt.kernels.tools.report import problems
from fusedgpt.train.tools.meta_cuda import meta_cuda

with meta_cuda(90) as record:
    import torch
    from benchmarks.workloads.contenders import ours, tokens
    from fusedgpt.model.config import PRESETS

    with patch("fusedgpt.kernels.tools.check.measure", lambda *_: []):
        arguments = ["benchmarks/kernels", "--compile-only", "-k", "ours and not xl"]
        failed = pytest.main(arguments)
    config = PRESETS["gpt2"].model_copy(update={"n_layer": 2, "dropout": 0.1})
    with torch.device("cuda"):
        loss, step, model = ours("ours-without-compile", config, tokens(16, 1024, 50257), "bf16")
    for i in range(8):
        model.train(i >= 3)  # as after its gate
        step()
        record.watching = True
    loss()
kernels = [kernel for kernel, _ in record.kernels.values()]
faults = [f"{kernel.src.fn.__name__} {x}" for kernel in kernels for x in problems(kernel, 90)]
print(*record.faults, *faults, sep="\\n")
sys.exit(failed or bool(record.faults or faults) or len(kernels) < 30)
"""


def test_every_shape_compiles_and_our_step_neither_waits_nor_compiles_in_a_capture() -> None:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=outside)
    assert done.returncode == 0, done.stdout + done.stderr

"""Names and arguments that the installed torch lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedgpt.train.tools.torch_api import missing_from_torch


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("torch.cuda.is_avialable()", "there is no torch.cuda.is_avialable"),
        ("torch.cuda.graph(g, capture_mode='global')", "torch.cuda.graph takes no capture_mode"),
        ("torch.addmm(a, b, c, out_dtypes=d)", "torch.addmm takes no out_dtypes"),
        ("from torch.cuda import Streams", "torch.cuda has no Streams"),
        ("triton.next_power_of_three(3)", "there is no triton.next_power_of_three"),
    ],
)
def test_what_is_missing_is_found(code: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"import torch\n{code}\n")
    assert missing_from_torch([tmp_path]) == [f"{tmp_path.name}/code.py:2: {fault}"]


def test_what_is_there_is_not_reported(tmp_path: Path) -> None:
    fine = [
        "torch.cuda.graph(g, capture_error_mode='thread_local')",
        "torch.addmm(a, b, c, beta=0.0, out_dtype=d, out=e)",
        "torch.empty(3, device='cuda', pin_memory=False)",
        "from triton.runtime.driver import driver",
        "torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, anything=1)",
        "torch.cuda.CUDAGraph().replay()",
    ]
    (tmp_path / "code.py").write_text("\n".join(fine))
    assert missing_from_torch([tmp_path]) == []

"""Where a model is trained and in which numbers: device, compute dtype, fp16's loss scale."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fusedgpt.model.gpt import GPT

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FIRST_SCALE, _STEPS_TO_GROW = 65536.0, 2000  # torch.amp.GradScaler's


def resolve_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. Raises ValueError for a device torch cannot use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bf16 where "auto" finds it in hardware, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        precision = "bf16" if native else "fp32"
    return _DTYPES[precision]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively (AVX512-BF16, AMX or Arm's BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def set_precision(model: GPT, dtype: torch.dtype) -> None:
    """Let `model` compute in dtype; on a GPU its parameters become dtype too, and AdamW keeps fp32 masters.

    On a CPU the parameters stay fp32: casting them step by step costs the same there, and a small batch 5%
    less (docs/experiments.md, "Low-precision parameters on a CPU").
    """
    model.compute_dtype = dtype
    if model.wte.weight.device.type == "cuda":
        model.to(dtype)


class LossScale:
    """fp16's dynamic loss scale, kept on the device: halved by a skipped step, doubled after 2,000 good ones.

    Source: Micikevicius et al. 2018, section 3.2, with torch.amp.GradScaler's constants.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Take in a step; skipped: fp32 scalar, 1.0 or 0.0. Waits for nothing."""
        self.good_steps.add_(1.0).mul_(1.0 - skipped)
        grow = self.good_steps >= _STEPS_TO_GROW
        self.scale.mul_(torch.where(grow, 2.0, 1.0 - 0.5 * skipped))
        self.good_steps.masked_fill_(grow, 0.0)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])

"""Where a model is trained and in which numbers: device, dtypes, fp16's loss scale, deterministic ops.

The compute dtype is that of all activations, the residual stream among them; the trainer hands it to the
model with every batch. Always fp32, whatever the compute dtype: softmax, the statistics of LayerNorm, the
loss, the gradient norm, AdamW's moments, sums of gradients over micro-batches, and one copy of every
parameter: on a CPU the parameters themselves, on a GPU biases and norms, and the optimizer's masters of the
matrices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels.cpu.process import cpu_description
from fusedgpt.kernels.errors import UsageError
from fusedgpt.model.gpt import GPT

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FIRST_SCALE, _STEPS_TO_GROW = 65536.0, 2000  # torch.amp.GradScaler's


def resolve_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. cuda:N becomes the current GPU, which kernels run on.

    Raises ValueError for a device torch cannot use.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        listed = "Expected one of" in str(error)  # of all of torch's back ends
        reason = "expected auto, cpu, cuda or cuda:N" if listed else str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {reason}") from None
    if device.type == "mps":
        raise UsageError("--device mps: it has no float64, in which losses and norms are added up: use cpu")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bf16 where "auto" finds it in hardware, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        precision = "bf16" if native else "fp32"
    return _DTYPES[precision]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively (AVX512-BF16, AMX or Arm's BF16)."""
    return not set(cpu_description().split()).isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def cast_parameters(model: GPT, dtype: torch.dtype) -> None:
    """On a GPU, matrices become `dtype`, and AdamW keeps fp32 masters of them; biases and norms stay fp32.

    On a CPU all parameters stay fp32: casting them in every forward pass costs the same there, and 5% less
    with a small batch (docs/experiments.md, "Low-precision parameters on a CPU").
    """
    if model.wte.weight.device.type == "cuda":
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data = parameter.data.to(dtype)


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


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Let cuBLAS round the factors of fp32 matmuls to TF32 (10 bits of mantissa) for a while, if `wanted`."""
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Keep torch's own CUDA ops deterministic for a while, if `wanted`; an op that cannot be raises.

    Call before the process first multiplies matrices on a GPU: cuBLAS reads its setting then.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic  # whose settings its stub does not know
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # it finds bugs, and writes everything twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]

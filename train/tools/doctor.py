"""What this machine has, and which path each op will take on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu.linear import USES_ONEDNN
from fusedgpt.train.loop.precision import cpu_has_bf16, resolve_device, resolve_precision

_PACKAGES = ("fusedgpt", "torch", "triton", "transformers", "tiktoken", "tokenizers", "safetensors")


def examine() -> dict[str, dict[str, str]]:
    """Sections of name -> finding, ready to print."""
    device = resolve_device("auto")
    precision = str(resolve_precision("auto", device)).removeprefix("torch.")
    return {
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu cores": f"{os.cpu_count()}, {torch.get_num_threads()} used by torch",
            "cpu bf16": "native" if cpu_has_bf16() else "no",
            "cpu fp32 matmul": "oneDNN" if USES_ONEDNN else "torch's default",
            **_gpus(),
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "training": {"device": device.type, "precision": precision},
        "ops": {op: _path(op, device) for op in ops.OPS},
    }


def _gpus() -> dict[str, str]:
    gpus = {}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus[f"gpu {i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return gpus or {"gpu": "none that torch can use"}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _path(op: str, device: torch.device) -> str:
    try:
        return ops.backend(op, device)
    except ValueError as error:
        return f"error: {error}"

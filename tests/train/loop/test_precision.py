"""Devices and dtypes: what is asked for, what the hardware has."""

from __future__ import annotations

import pytest
import torch

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.loop import precision
from fusedgpt.train.loop.precision import cast_parameters, resolve_device, resolve_precision, tf32


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense:x"])
def test_unusable_devices_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"--device {device}: "):
        resolve_device(device)


def test_apples_gpu_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # as where torch has it
    with pytest.raises(ValueError, match="--device mps: it has no float64"):
        resolve_device("mps")


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches kernels on the current GPU, whatever GPU their tensors are on."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda", "cpu", "cuda:1"):
        assert resolve_device(name) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.filterwarnings("error")
def test_tf32_is_on_for_a_while() -> None:
    before = torch.get_float32_matmul_precision()
    for wanted in (False, True):
        with tf32(wanted):
            assert (torch.get_float32_matmul_precision() == "high") == wanted
        assert torch.get_float32_matmul_precision() == before


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda native=native: native)
        assert resolve_precision("auto", cpu) == dtype
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {name: resolve_precision(name, cpu) for name in asked} == asked


def test_parameters_stay_fp32_on_a_cpu_and_shrink_on_a_gpu(device: torch.device) -> None:
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16)).to(device)
    cast_parameters(model, torch.bfloat16)
    for parameter in model.parameters():
        low = device.type == "cuda" and parameter.ndim == 2
        assert parameter.dtype == (torch.bfloat16 if low else torch.float32)

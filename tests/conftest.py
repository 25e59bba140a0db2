"""Shared by all tests: offline Hugging Face, kernels on the GPU or interpreted, a tiny GPT."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see train/runtime.py

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from collections.abc import Iterator

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The seam insists on Triton, and memory that is not written is NaN: a kernel that skips some fails."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two layers, odd sizes: 61 tokens of vocabulary, 3 heads of 8 channels, 16 of context."""
    return GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=3, n_embd=24, dropout=0.1)


@pytest.fixture
def tiny_gpt(tiny_config: GPTConfig) -> GPT:
    return GPT(tiny_config, seed=1).eval()

"""Shared by all tests: offline Hugging Face, and a GPT small enough to train in a second."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see train/runtime.py

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two layers, odd sizes: 61 tokens of vocabulary, 3 heads of 8 channels, 16 of context."""
    return GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=3, n_embd=24, dropout=0.1)


@pytest.fixture
def tiny_gpt(tiny_config: GPTConfig) -> GPT:
    return GPT(tiny_config, seed=1).eval()

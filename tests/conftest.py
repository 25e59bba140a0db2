"""Shared by all tests: offline Hugging Face, kernels on the GPU or interpreted, a tiny GPT."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see kernels/cpu/process.py

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and what only a -m expression asks for."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}  # keywords have the names of folders too
        for marker in {"soak", "serving", "llama"} & marks:
            if marker not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"only with -m {marker}"))
        if "gpu" in marks and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: a GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def prepared_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter twice as fast: it prepares the language once a test, not in each call of a function."""
    from triton.runtime import interpreter

    prepare, prepared = interpreter._patch_lang, {}

    def prepare_once(fn: Any) -> Any:
        if fn.__module__ not in prepared:
            prepared[fn.__module__] = prepare(fn)
        return interpreter._LangPatchScope()  # that restores nothing

    monkeypatch.setattr(interpreter, "_patch_lang", prepare_once)
    yield
    for scope in reversed(prepared.values()):
        scope.restore()


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The seam insists on Triton, and memory that is not written is NaN: a kernel that skips some fails."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[int]]:
    """begins(kernel, program, *arguments): where loads and stores of one interpreted program would begin.

    Nothing is loaded or stored, so the program may be one whose tensors no memory could hold.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def run(kernel: Any, program: int, *args: Any, **constants: Any) -> set[int]:
        found: set[int] = set()

        def skip(access: Callable[..., Any], mask_position: int) -> Callable[..., Any]:
            def recorded(pointers: Any, *rest: Any) -> Any:
                found.add(int(pointers.data.min()))
                rest[mask_position].data = rest[mask_position].data & False
                return access(pointers, *rest)

            return recorded

        def set_grid_idx(x: int, y: int, z: int) -> None:
            builder.grid_idx = (program, y, z)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", set_grid_idx)
            patch.setattr(builder, "create_masked_load", skip(load, 0))
            patch.setattr(builder, "create_masked_store", skip(store, 1))
            kernel[(1,)](*args, **constants)
        return found

    return run


@pytest.fixture
def tiny_config() -> GPTConfig:
    """Two layers, odd sizes: 61 tokens of vocabulary, 3 heads of 8 channels, 16 of context."""
    return GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=3, n_embd=24, dropout=0.1)


@pytest.fixture
def tiny_gpt(tiny_config: GPTConfig) -> GPT:
    return GPT(tiny_config, seed=1).eval()

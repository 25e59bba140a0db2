"""Launches that only compile, for any architecture and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fusedgpt.kernels import tuning


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One launch of a kernel that only compiled."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, with options such as num_warps
    result: Any  # a CompiledKernel, or the exception that compiling raised


@contextmanager
def only_compile(arch: int) -> Iterator[list[Compiled]]:
    """Within the block launches only compile, for `arch`, e.g. 90; yields the growing list of them.

    Arguments may be meta tensors: the address of one is its byte offset in its storage, so it is aligned
    where memory from torch is, and the kernel is specialised like the one that runs.
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_and_record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            result = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            result = error
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        compiled.append(
            Compiled(kernel=self.fn.__name__, grid=tuple(grid), arguments=arguments, result=result)
        )

    JITFunction.run = compile_and_record
    asked = {  # what Triton's launch code asks of a driver before it compiles
        "get_current_device": lambda: f"sm_{arch}",  # the key of Triton's cache; no real device shares it
        "get_current_stream": lambda device: 0,
        "get_current_target": lambda: GPUTarget("cuda", arch, 32),
    }
    driver.set_active(SimpleNamespace(**asked))
    try:
        with tuning.assume_capability((arch // 10, arch % 10)):
            yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(None)  # Triton looks for the real one at the next launch

"""What every kernel compiles to and needs, without a GPU: `fusedgpt kernels report`.

The launchers themselves are called on meta tensors, under a driver that only compiles. What is reported is
therefore what runs: the same block sizes, flags and argument specialisation.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
import triton

from fusedgpt.kernels.errors import InputError
from fusedgpt.kernels.tools import sass
from fusedgpt.kernels.tools.compiling import Compiled, only_compile
from fusedgpt.kernels.tools.hardware import MULTIPROCESSORS, blocks_per_multiprocessor
from fusedgpt.kernels.tools.launches import LAUNCHES
from fusedgpt.kernels.tools.predict import Prediction, predict

ARCHITECTURES = (80, 90, 100)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MORE_DTYPES = {**_DTYPES, "fp16": torch.float16}

_TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.(\S+)")
_MMA_TYPE = re.compile(r"kind::(\w+)|\.[fs](?:16|32)\.(\w+)")  # the type of the first factor
_ACCESS = re.compile(r"\b(ld|st)(?:\.[\w:]+)*?\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_ASYNC_LOAD = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], *(0x[0-9a-f]+|\d+)")
_TMA = re.compile(r"\bcp(?:\.reduce)?\.async\.bulk\.tensor\S*?\.(shared::\w+|global)\.(?:shared|global)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel compiled for one architecture; `problem` is empty if it may ship."""

    kernel: str
    arch: int  # compute capability, e.g. 90
    dtype: str
    label: str  # what was launched
    config: str = ""  # constexpr arguments, warps and stages
    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread in local memory: spilled registers and arrays
    shared: int = 0  # bytes per block
    blocks: int = 0  # resident on one multiprocessor
    loop: dict[str, int] = field(default_factory=dict)  # execution unit -> instructions of the hot loop
    straight: dict[str, int] = field(default_factory=dict)  # the same outside of loops
    overlapped: int = 0  # instructions of the hot loop issued while its matrix products run
    overlapped_mufu: int = 0
    predicted: Prediction | None = None  # of the bf16 kernels on 9.0
    tensor_core: dict[str, int] = field(default_factory=dict)  # instruction and input type -> count
    loads: dict[str, int] = field(default_factory=dict)  # bytes per instruction, or "tma" -> count
    stores: dict[str, int] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()  # pointer arguments not known to be divisible by 16
    problem: str = ""

    def cells(self) -> dict[str, str]:
        """Column -> text, for a table. CTAs: an SM; loop: instructions, or all; predicted: an H200."""
        return {
            "kernel": self.kernel.removeprefix("_").removesuffix("_kernel"),
            "launch": self.label,
            "regs": str(self.registers),
            "CTAs": str(self.blocks),
            "loop": str(sum(self.loop.values()) or sum(self.straight.values()) or ""),
            "bound": self.predicted.bound if self.predicted else "",
            "predicted": self.predicted.rate("H200") if self.predicted else "",
            "problem": self.problem,
        }


def report(
    stems: Iterable[str] = (),
    architectures: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[str] = (),
    *,
    full: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Compile the kernels of the files `stems` (all if empty) for each architecture, e.g. 90.

    dtypes: bf16 and fp32 if empty. full adds fp16 to these, and less common shapes.
    progress(done, total) counts files per architecture and dtype.
    Raises ValueError for an unknown stem or architecture, and under TRITON_INTERPRET=1.
    """
    stems, architectures = tuple(stems) or tuple(LAUNCHES), tuple(architectures)
    for stem in stems:
        if stem not in LAUNCHES:
            raise InputError(f"no kernel file {stem!r}; there are {', '.join(LAUNCHES)}")
    for arch in architectures:
        if arch not in MULTIPROCESSORS:
            raise InputError(f"no architecture {arch}; there are {', '.join(map(str, MULTIPROCESSORS))}")
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET=1 interprets the kernels; unset it to compile them")
    dtypes = tuple(dtypes) or tuple(_MORE_DTYPES if full else _DTYPES)
    tasks = [(stem, arch, dtype, full) for stem in stems for arch in architectures for dtype in dtypes]
    # fork: a spawned worker would spend seconds importing torch.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(tasks)), get_context("fork")) as pool:
        futures = [pool.submit(_compile_file, *task) for task in tasks]
        for done, _ in enumerate(as_completed(futures)):
            progress(done + 1, len(tasks))
        return [row for future in futures for row in future.result()]


def _compile_file(stem: str, arch: int, dtype: str, full: bool) -> list[Row]:
    """One row for each distinct kernel that the launches of one file start."""
    rows: dict[str, Row] = {}
    with only_compile(arch) as compiled:
        for label, launch in LAUNCHES[stem](_MORE_DTYPES[dtype], full):
            try:
                launch()
            except Exception as error:  # a launcher that raises is reported like a compiler error
                compiled.append(Compiled(kernel=stem, grid=(), arguments={}, result=error))
            for kernel in compiled:
                name, result = kernel.kernel, kernel.result
                common: dict[str, Any] = {"kernel": name, "arch": arch, "dtype": dtype, "label": label}
                if isinstance(result, Exception):
                    problem = f"does not compile: {type(result).__name__}: {_innermost(result)}"
                    rows.setdefault(f"{name} {problem}", Row(**common, problem=problem))
                elif result.hash not in rows:
                    rows[result.hash] = _examine(kernel, **common)
            compiled.clear()
    return list(rows.values())


def _examine(launch: Compiled, *, arch: int, dtype: str, **common: Any) -> Row:
    """The row of a launch that compiled."""
    compiled = launch.result
    fn, metadata, ptx = compiled.src.fn, compiled.metadata, compiled.asm["ptx"]
    constants = [f"{fn.arg_names[i]}={compiled.src.constants.get((i,))}" for i in fn.constexprs]
    registers, stack, blocks = resources(compiled, arch)
    tensor_core = _tensor_core(ptx)
    # Reading takes half of the report's time, and fp32 on ordinary cores seldom runs.
    code = None if dtype == "fp32" and not tensor_core else sass.read(compiled)
    hot = code.hot if code else None
    loads, stores = _widths(ptx)
    return Row(
        **common,
        arch=arch,
        dtype=dtype,
        config=" ".join([*constants, f"warps={metadata.num_warps}", f"stages={metadata.num_stages}"]),
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        blocks=blocks,
        loop=hot.units if hot else {},
        straight=code.straight.units if code else {},
        overlapped=hot.overlapped if hot else 0,
        overlapped_mufu=hot.overlapped_mufu if hot else 0,
        predicted=predict(launch, code, blocks)
        if arch == 90 and dtype == "bf16" and code and blocks
        else None,
        tensor_core=tensor_core,
        loads=loads,
        stores=stores,
        unaligned=_unaligned(compiled.src),
        problem="; ".join(problems(compiled, arch)),
    )


def problems(compiled: Any, arch: int) -> Iterator[str]:
    """Why a CompiledKernel may not ship."""
    metadata, (_, stack, blocks) = compiled.metadata, resources(compiled, arch)
    limit = MULTIPROCESSORS[arch].shared_per_block
    if stack:
        yield f"spills {stack} bytes per thread"
    if metadata.shared > limit * 1024:
        yield f"needs {metadata.shared / 1024:.0f} KiB of shared memory, the limit is {limit}"
    elif not blocks:
        yield f"does not fit a multiprocessor with {metadata.num_warps} warps"
    if (getattr(metadata, "tmem_size", None) or 0) > 512:
        yield f"needs {metadata.tmem_size} columns of tensor memory, the limit is 512"


@lru_cache(maxsize=1)  # of one kernel after the other, asked twice
def resources(compiled: Any, arch: int) -> tuple[int, int, int]:
    """Registers and bytes of local memory per thread, and blocks resident on a multiprocessor."""
    cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    metadata = compiled.metadata
    blocks = blocks_per_multiprocessor(
        arch, warps=metadata.num_warps, registers=used["REG"], shared=metadata.shared
    )
    return used["REG"], used["STACK"] + used["LOCAL"], blocks


def _tensor_core(ptx: str) -> dict[str, int]:
    """Instruction and input type, e.g. "wgmma.mma_async bf16" -> count."""
    found: Counter[str] = Counter()
    for instruction, rest in _TENSOR_CORE.findall(ptx):
        kind = _MMA_TYPE.search(f".{rest}")
        found[f"{instruction} {(kind[1] or kind[2]) if kind else rest}"] += 1
    return dict(found)


def _widths(ptx: str) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of global loads and stores by width in bytes, widest first."""
    counts: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in _ACCESS.findall(ptx):
        counts[kind][int(vector or 1) * int(bits) // 8] += 1
    counts["ld"].update(int(size, 0) for size in _ASYNC_LOAD.findall(ptx))
    into = Counter("st" if target == "global" else "ld" for target in _TMA.findall(ptx))
    loads, stores = (
        ({"tma": into[kind]} if into[kind] else {})
        | {str(width): count for width, count in sorted(counts[kind].items(), reverse=True)}
        for kind in ("ld", "st")
    )
    return loads, stores


def _unaligned(source: Any) -> tuple[str, ...]:
    """The pointer arguments that the compiler cannot assume to be divisible by 16."""
    aligned = {path for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    return tuple(
        name
        for i, (name, kind) in enumerate(source.signature.items())
        if isinstance(kind, str) and kind.startswith("*") and (i,) not in aligned
    )


def _innermost(error: BaseException) -> str:
    """The last line of the root cause, and the kernel's line that Triton points at, if any."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] + (f" in `{lines[lines.index('^') - 1]}`" if "^" in lines[1:] else "")

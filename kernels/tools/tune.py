"""Search for the fastest tile of each attention kernel on this GPU: `fusedgpt kernels tune`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor

from fusedgpt.kernels import attention, documents, tuning
from fusedgpt.kernels.errors import InputError
from fusedgpt.kernels.tools import cases, check
from fusedgpt.kernels.tools.check import DTYPES
from fusedgpt.kernels.tools.compiling import only_compile
from fusedgpt.kernels.tools.report import problems
from fusedgpt.kernels.tuning import Tile

Timer = Callable[[Callable[[], object]], float]

KERNELS = ("fwd", "dkdv", "dq")
LENGTHS = (1024, tuning.SHORT)  # of long and of short sequences
_TOKENS, _WIDTH = 16384, 768  # of the problem that is timed: enough to fill any GPU
_TIMER = partial(triton.testing.do_bench, warmup=10, rep=50, return_mode="median")  # milliseconds of each
_CHECKED = {False: 320, True: 192}  # tokens of the problem that is checked, by whether it is short


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search found for one kernel."""

    key: str  # tuning.attention_key
    default_ms: float  # the whole forward or backward pass with the default tile
    ms: float  # the same with `tile`
    tile: Tile
    timed: list[tuple[Tile, float]]  # the others and their milliseconds, before the fastest were checked

    def cells(self) -> dict[str, str]:
        """Column -> text, for a table."""
        sizes = f"{self.tile.BLOCK_M} x {self.tile.BLOCK_N}"
        launch = f"{self.tile.num_warps} warps, {self.tile.num_stages} stages"
        return {
            "kernel": self.key,
            "default ms": f"{self.default_ms:.3f}",
            "best ms": f"{self.ms:.3f}",
            "tile": ", ".join(
                [sizes, launch, *(name for name in ("descriptors", "ahead") if getattr(self.tile, name))]
            ),
            "timed": str(1 + len(self.timed)),
        }


def candidates(device: torch.device, kernel: str) -> list[Tile]:
    """Every tile worth timing for one of KERNELS on this device."""
    described = tuning.capability(device)[0] in (9, 10)
    ahead = (False, True) if kernel == "fwd" else (False,)
    sizes = itertools.product((128, 64, 32), (128, 64), (8, 4), (3, 2), ahead)
    return [
        Tile(BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, descriptors=described, ahead=ahead)
        for M, N, warps, stages, ahead in sizes
    ]


def tune(
    head_sizes: Iterable[int],
    dtype: str,
    feature: str,
    minutes: float,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Choice], Path]:
    """Run `search` on this GPU for each head size; the choices, and the tuning file that now holds them.

    Raises ValueError without a GPU and for a head size that attention does not take.
    """
    if not torch.cuda.is_available():
        raise InputError("kernels tune measures on a CUDA GPU, and torch finds none on this machine")
    head_sizes = tuple(head_sizes)
    for size in head_sizes:
        if size not in range(1, 129):
            raise InputError(f"head size {size}: expected 1 to 128")
    device, deadline = torch.device("cuda"), time.monotonic() + 60 * minutes
    path, gpu = tuning.tuning_path(), torch.cuda.get_device_name(device)
    searches = list(itertools.product(LENGTHS, head_sizes))
    tiles = sum(len(candidates(device, kernel)) for kernel in KERNELS)
    total, done = 2 * len(searches) * tiles, itertools.count(1)  # compiled, then timed
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "feature": feature, "deadline": deadline}
    found: list[Choice] = []
    for T, head_size in searches:
        new = search(device, head_size=head_size, T=T, **options, step=lambda: progress(next(done), total))
        tuning.save_tiles(path, gpu, {choice.key: choice.tile for choice in new})
        found += new
    return found, path


def search(
    device: torch.device,
    *,
    head_size: int,
    dtype: torch.dtype,
    feature: str = "plain",
    T: int = 1024,
    tiles: Iterable[Tile] | None = None,
    timer: Timer = _TIMER,
    deadline: float = float("inf"),
    step: Callable[[], None] = lambda: None,
) -> list[Choice]:
    """The fastest tile of each kernel at (B, T, H, head_size), one kernel after the other.

    A tile is timed if it compiles without a spill and fits the GPU, and taken if it also keeps to `check`'s
    standard. deadline: on time.monotonic(), in seconds; kernels not begun by then are left out. step is
    called after each tile that was compiled or timed. timer returns milliseconds.
    """
    forward, backward, q = _problem(device, head_size, dtype, feature, T)
    options: dict[str, Any] = {"dropout_p": 0.1} if feature == "dropout" else {}
    options["documents"] = feature == "documents"
    checked = cases.attention_case(1, _CHECKED[T <= tuning.SHORT], 2, head_size, **options)
    given = None if tiles is None else list(tiles)
    work = [
        (kernel, tile)
        for kernel in KERNELS
        for tile in (candidates(device, kernel) if given is None else given)
    ]
    fitting = set(work if device.type == "cpu" else _fitting(work, q, feature, deadline, step))
    found: list[Choice] = []
    for kernel in KERNELS:
        if time.monotonic() > deadline:
            break
        run = forward if kernel == "fwd" else backward
        key = tuning.attention_key(kernel, q, feature)
        default = tuning.default_attention(kernel, q, feature, describable=True)
        with tuning.override(key, default):
            default_ms = timer(run)
        best, best_ms, timed = default, default_ms, []
        for tile in (tile for other, tile in work if other == kernel):
            if time.monotonic() > deadline:
                break
            step()
            if tile == default or (kernel, tile) not in fitting:
                continue
            with tuning.override(key, tile):
                timed.append((tile, ms := timer(run)))
                if ms < best_ms and _is_right(checked, dtype, device):
                    best, best_ms = tile, ms
        found.append(Choice(key=key, default_ms=default_ms, ms=best_ms, tile=best, timed=timed))
    return found


def _fitting(
    work: list[tuple[str, Tile]], q: Tensor, feature: str, deadline: float, step: Callable[[], None]
) -> list[tuple[str, Tile]]:
    """Those of (kernel, tile) that `_fits`: compiled on all cores, into Triton's cache."""
    major, minor = tuning.capability(q.device)
    fits = partial(_fits, arch=10 * major + minor, shape=tuple(q.shape), dtype=q.dtype, feature=feature)
    found = []
    # spawn: a fork of a process that has used CUDA cannot be relied on.
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))
    try:
        futures = {pool.submit(fits, *one): one for one in work}
        left = None if deadline == float("inf") else deadline - time.monotonic()
        for future in as_completed(futures, left):
            step()
            if future.result():
                found.append(futures[future])
    except TimeoutError:  # what has not compiled by the deadline is left out
        pass
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _fits(
    kernel: str, tile: Tile, *, arch: int, shape: tuple[int, ...], dtype: torch.dtype, feature: str
) -> bool:
    """Whether the kernel compiles with this tile for q of `shape`, without a spill and within its limits."""
    B, T, H, D = shape
    qkv = torch.empty(B, T, 3, H, D, dtype=dtype, device="meta")
    key = tuning.attention_key(kernel, qkv.select(2, 0), feature)
    with only_compile(arch) as compiled, tuning.override(key, tile):
        forward, backward, _ = _passes(qkv, feature)
        (forward if kernel == "fwd" else backward)()
    results = [one.result for one in compiled if one.kernel == f"_attention_{kernel}_kernel"]
    return all(not isinstance(x, Exception) and not list(problems(x, arch)) for x in results)


def _is_right(case: cases.Case, dtype: torch.dtype, device: torch.device) -> bool:
    return all(finding.ok for finding in check.measure(case, dtype, device))


def _problem(
    device: torch.device, head_size: int, dtype: torch.dtype, feature: str, T: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]:
    """`_passes` at about GPT-2's width."""
    B, H = max(1, _TOKENS // T), max(1, _WIDTH // head_size)
    generator = torch.Generator(device).manual_seed(0)
    return _passes(torch.randn(B, T, 3, H, head_size, device=device, generator=generator).to(dtype), feature)


def _passes(qkv: Tensor, feature: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]:
    """(forward pass, backward pass, q) of a projection (B, T, 3, H, D)."""
    B, T, _, _, D = qkv.shape
    q, k, v = qkv.unbind(2)
    seed, offset = torch.zeros(2, 2, dtype=torch.int64, device=qkv.device)[:, 0]
    state: tuple[Any, ...] = (D**-0.5, 0.1 if feature == "dropout" else 0.0, seed, offset)
    if feature == "documents":
        state += documents.documents((torch.arange(T, device=qkv.device) * 4 // T).expand(B, T))
    out, lse = attention.attention_fwd(q, k, v, *state)
    return (
        lambda: attention.attention_fwd(q, k, v, *state)[0],
        lambda: attention.attention_bwd(out, q, k, v, out, lse, *state),
        q,
    )

"""Which GPU a launch is for, and the block sizes, warps and stages of the attention kernels on it.

The tables hold what compiles without spilling (`fusedgpt kernels report`) and should be fastest.
`fusedgpt kernels tune` measures on this machine's GPU and writes a file that takes precedence:
$FUSEDGPT_TUNING, or tuning.json in the user's cache folder. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgpt.kernels.common import DTYPES

_SAFE_DEFAULT = (8, 0)  # also of the interpreter
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}  # A100, H100, B200
_assumed: list[tuple[int, int]] = []


@contextmanager
def assume_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Within the block, launch as on a GPU of `capability`, e.g. (9, 0): for compiling without that GPU."""
    _assumed.append(capability)
    _tile.cache_clear()
    try:
        yield
    finally:
        _assumed.pop()
        _tile.cache_clear()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability to choose block sizes for."""
    if _assumed:
        return _assumed[-1]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _SAFE_DEFAULT


def multiprocessor_count(device: torch.device) -> int:
    """How many streaming multiprocessors `device` has; of the assumed GPU, or of an A100 on a CPU."""
    if device.type == "cuda" and not _assumed:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS.get(capability(device), 108)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one attention kernel is launched."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    descriptors: bool = False  # read through the tensor memory accelerator (9.0 and newer)
    ahead: bool = False  # forward: the next tile's Q K^T runs beside this tile's softmax
    maxnreg: int | None = None  # registers per thread


_Sizes = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages
_Table = dict[tuple[str, int], tuple[_Sizes, _Sizes, _Sizes]]
FEATURES = ("plain", "documents", "dropout")  # dropout with documents takes the last

# (kernel, largest head size) -> sizes per feature. Fits 99 KiB of shared memory: the default of all GPUs.
_POINTERS: _Table = {
    ("fwd", 64): ((128, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("fwd", 128): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    ("dkdv", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3)),
    ("dkdv", 128): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    ("dq", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 4, 3)),
    ("dq", 128): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
}
_HOPPER: _Table = {  # where 4 warps suffice, a multiprocessor has several blocks
    ("fwd", 64): ((128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 2)),
    ("fwd", 128): ((128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
    ("dkdv", 64): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("dkdv", 128): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("dq", 64): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("dq", 128): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
}
_AHEAD = {("fwd", 128, "dropout")}  # of _HOPPER
_MAXNREG = {("dq", 64, "plain"): 128}  # of _HOPPER: for two blocks on a multiprocessor; Triton 3.6 takes 136
_HOPPER_SHORT: _Table = {  # less of a smaller tile lies above the diagonal
    ("fwd", 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("dkdv", 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("dkdv", 128): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("dq", 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
}
_BLACKWELL: _Table = {
    ("fwd", 64): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("fwd", 128): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("dkdv", 64): ((64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    ("dkdv", 128): ((64, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 3)),
    ("dq", 128): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
}
_FP32: dict[tuple[str, int], _Sizes] = {  # without tensor cores
    ("fwd", 64): (32, 32, 8, 2),
    ("fwd", 128): (16, 32, 4, 2),
    ("dkdv", 64): (16, 32, 8, 1),
    ("dkdv", 128): (16, 32, 16, 1),
    ("dq", 64): (16, 32, 4, 2),
    ("dq", 128): (32, 32, 8, 2),
}
_INTERPRETED = (32, 64, 4, 1)  # small enough for short sequences to have several


SHORT = 256  # tokens of a sequence that counts as short; the batch decides nothing: bits would depend on it


class _Problem(NamedTuple):
    """What decides on a tile."""

    kernel: str  # "fwd", "dkdv" or "dq"
    device: torch.device
    dtype: torch.dtype
    D: int
    short: bool
    feature: str


def _problem(kernel: str, q: Tensor, feature: str) -> _Problem:
    return _Problem(kernel, q.device, q.dtype, q.shape[3], q.shape[1] <= SHORT, feature)


def attention(kernel: str, q: Tensor, *, feature: str = "plain", describable: bool = False) -> Tile:
    """The tile of an attention kernel ("fwd", "dkdv", "dq") for q (B, T, H, D).

    feature: "plain", "documents" or "dropout". describable: whether descriptors can address the tensors.
    Environment, tuning file and device are read when a problem is met first, not at every launch.
    """
    return _tile(_problem(kernel, q, feature), describable)


@cache
def _tile(problem: _Problem, describable: bool) -> Tile:
    measured = _measured(_key(problem), problem.device)
    if measured and (describable or not measured.descriptors):
        return measured
    return _default(problem, describable)


def default_attention(kernel: str, q: Tensor, feature: str, describable: bool) -> Tile:
    """The tile of the tables, ignoring measurements."""
    return _default(_problem(kernel, q, feature), describable)


def _default(problem: _Problem, describable: bool) -> Tile:
    kernel, device, dtype, D, short, feature = problem
    architecture = capability(device)
    descriptors = describable and architecture[0] in (9, 10) and dtype.itemsize == 2
    largest = 64 if D <= 64 else 128
    if device.type == "cpu" and not _assumed:
        sizes = _INTERPRETED
    elif dtype.itemsize == 4:
        sizes = _FP32.get((kernel, largest), _FP32[kernel, 128])
    else:
        table = _POINTERS
        if descriptors:
            hopper = _HOPPER_SHORT if short else _HOPPER
            table = hopper if architecture[0] == 9 else _BLACKWELL
        row = table.get((kernel, largest), table[kernel, 128])
        sizes = row[FEATURES.index(feature)]
    M, N, warps, stages = sizes
    tile = Tile(BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, descriptors=descriptors)
    if descriptors and architecture[0] == 9 and not short:
        entry = (kernel, largest, feature)
        tile = replace(tile, ahead=entry in _AHEAD, maxnreg=_MAXNREG.get(entry))
    return tile


def attention_key(kernel: str, q: Tensor, feature: str) -> str:
    """The name of one entry of a tuning file, e.g. "attention_fwd bf16 64 plain", or "... plain short"."""
    return _key(_problem(kernel, q, feature))


def _key(problem: _Problem) -> str:
    dtype = next(name for name, dtype in DTYPES.items() if dtype == problem.dtype)
    key = f"attention_{problem.kernel} {dtype} {problem.D} {problem.feature}"
    return f"{key} short" if problem.short else key


def tuning_path() -> Path:
    """Where `fusedgpt kernels tune` writes and every launch reads. Raises OSError without a home folder."""
    if given := os.environ.get("FUSEDGPT_TUNING"):
        return Path(given)
    try:
        cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise OSError("there is no home folder for the tuning file: set FUSEDGPT_TUNING to a path") from None
    return cache_folder / "fusedgpt" / "tuning.json"


_overrides: dict[str, Tile] = {}


@contextmanager
def override(key: str, tile: Tile) -> Iterator[None]:
    """Within the block, use `tile` for one entry: for measuring it."""
    _overrides[key] = tile
    _tile.cache_clear()
    try:
        yield
    finally:
        del _overrides[key]
        _tile.cache_clear()


def _measured(key: str, device: torch.device) -> Tile | None:
    if key in _overrides:
        return _overrides[key]
    if device.type != "cuda" or _assumed:
        return None
    with suppress(OSError):
        return load_tiles(tuning_path(), torch.cuda.get_device_name(device)).get(key)
    return None


@cache
def load_tiles(path: Path, gpu: str) -> dict[str, Tile]:
    """The measured tiles of one kind of GPU; none without a usable file; a launch then takes the default."""
    try:
        content = json.loads(path.read_text())
        return {key: _checked(Tile(**tile)) for key, tile in content.get(gpu, {}).items()}
    except OSError:  # none, or in a folder that is not ours
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        ignored = f"{path} is ignored, it is not a tuning file ({error})"
        warnings.warn(f"{ignored}: delete it or run fusedgpt kernels tune", stacklevel=2)
        return {}


def _checked(tile: Tile) -> Tile:
    registers = 1 if tile.maxnreg is None else tile.maxnreg
    sizes = (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages, registers)
    if not all(type(size) is int and 0 < size <= 256 for size in sizes):
        raise ValueError(f"{tile} has a size that is not a number from 1 to 256")
    if any(size & (size - 1) for size in sizes[:3]) or tile.BLOCK_M < 16 or tile.BLOCK_N < 32:
        raise ValueError(f"{tile} has a size that is not a power of two, or too small")
    return tile


def save_tiles(path: Path, gpu: str, tiles: dict[str, Tile]) -> None:
    """Add tiles of one kind of GPU to the file `path`, which is replaced atomically."""
    content: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError, ValueError, TypeError):
        content |= json.loads(path.read_text())
    known = {key: asdict(tile) for key, tile in load_tiles(path, gpu).items()}
    content[gpu] = {**known, **{key: asdict(tile) for key, tile in tiles.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    load_tiles.cache_clear()
    _tile.cache_clear()

"""How long the GPU would work on one optimizer step of gpt2: a prediction, not a measurement.

The step is the rehearsal's, every launch with its shapes. Our kernels take what kernels/tools/predict.py
says, a matrix product of torch whole waves of tiles of 128 x 256 at the rate of a large product, any other op
its bytes at the bandwidth of a large copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

from torch import Tensor

from fusedgpt.kernels.tools import sass
from fusedgpt.kernels.tools.compiling import Compiled
from fusedgpt.kernels.tools.hardware import GPUS, LAUNCH
from fusedgpt.kernels.tools.predict import predict
from fusedgpt.kernels.tools.report import resources
from fusedgpt.model.config import PRESETS
from fusedgpt.train.tools.meta_cuda import TorchOp, meta_cuda
from fusedgpt.train.tools.rehearse import cases

_GPU = GPUS["H200"]
_TILE = (128, 256)


@dataclass(frozen=True, kw_only=True)
class Part:
    """All launches of one kernel in a step."""

    kernel: str
    launches: int
    milliseconds: float

    def cells(self) -> dict[str, str]:
        """Column -> text, for a table."""
        return {
            "kernel": self.kernel.removeprefix("_").removesuffix("_kernel"),
            "launches": str(self.launches),
            "predicted ms": f"{self.milliseconds:.2f}",
        }


def predict_step(dropout: bool = True) -> list[Part]:
    """The parts of a step of gpt2, bf16, 16 x 1024, on an H200, the longest first, and their sum."""
    two, three = (_times(blocks, dropout) for blocks in (2, 3))  # all blocks are equal
    more = PRESETS["gpt2"].n_layer - 2
    parts = [
        Part(
            kernel=name,
            launches=two[0][name] + more * (three[0][name] - two[0][name]),
            milliseconds=1e3 * (two[1][name] + more * (three[1][name] - two[1][name])),
        )
        for name in three[0]
    ]
    parts.sort(key=lambda part: -part.milliseconds)
    total = (sum(p.launches for p in parts), sum(p.milliseconds for p in parts))
    return [*parts, Part(kernel="together", launches=total[0], milliseconds=total[1])]


def _times(blocks: int, dropout: bool) -> tuple[Counter[str], dict[str, float]]:
    """Launches, and seconds, of a step by kernel."""
    launches = Counter[str]()
    seconds: dict[str, float] = defaultdict(float)
    known: dict[str, float] = {}
    name = f"training gpt2 bf16, {'dropout' if dropout else 'no dropout'}"
    case = next(case for case in cases(full=False) if case.name == name)
    with meta_cuda(90) as record:
        case.run(record, blocks)
    for work in record.step:
        name = work.name if isinstance(work, TorchOp) else work.kernel
        key = str((name, [(*x.shape, x.dtype) for x in _tensors(work)]))
        if key not in known:
            known[key] = _torch_seconds(work) if isinstance(work, TorchOp) else _kernel_seconds(work)
        launches[name] += 1
        seconds[name] += known[key]
    return launches, seconds


def _tensors(work: Compiled | TorchOp) -> list[Tensor]:
    found = [*work.inputs, *work.outputs] if isinstance(work, TorchOp) else work.arguments.values()
    return [x for x in (getattr(x, "base", x) for x in found) if isinstance(x, Tensor)]


def _kernel_seconds(launch: Compiled) -> float:
    code = sass.read(launch.result)
    return predict(launch, code, resources(launch.result, 90)[2]).microseconds["H200"] / 1e6


def _torch_seconds(op: TorchOp) -> float:
    moved = sum(x.numel() * x.element_size() for x in {id(x): x for x in _tensors(op)}.values())
    seconds = moved / _GPU.bandwidth
    if "mm" in op.name:
        *batch, M, N = op.outputs[0].shape
        K = next(  # an output may be among the inputs
            left.shape[-1]
            for left, right in pairwise(x for x in op.inputs if x.ndim >= 2)
            if left.shape[-1] == right.shape[-2] and (left.shape[-2], right.shape[-1]) == (M, N)
        )
        seconds = max(seconds, _product_seconds(M, K, N, prod(batch)))
    return seconds + LAUNCH


def _product_seconds(M: int, K: int, N: int, batch: int) -> float:
    """(M, K) times (K, N), `batch` times, in waves of tiles; K in as many parts, up to 8, as are fastest."""
    tiles = batch * ceil(M / _TILE[0]) * ceil(N / _TILE[1])
    waves = min(ceil(tiles * parts / _GPU.multiprocessors) / parts for parts in range(1, 9))
    return waves * 2 * _TILE[0] * _TILE[1] * K / (_GPU.flops / _GPU.multiprocessors)

"""The ceilings of this machine: a large matmul and a large copy.

    python -m benchmarks.ceilings [--precisions fp32 bf16]

On a CPU the matmul is the faster of torch's and ours (kernels/cpu/linear.py).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch

from benchmarks.arguments import make_parser
from benchmarks.clock import CUDA, DEVICE, Call, Timed, choose, nothing
from benchmarks.report import record
from fusedgpt.kernels.cpu.linear import matmul_nt
from fusedgpt.train.loop.precision import resolve_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """TFLOP/s of a matmul in one dtype, GB/s read and written by a copy."""

    tflops: float
    gbps: float


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Medians of a matmul of 8192^3 and a copy of 1 GiB; on a CPU the best of 1024^3 and 64 MiB."""
    n, size = choose((8192, 1 << 30), (1024, 1 << 26))
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    matmuls: list[Call] = [lambda _: a @ b, *([] if CUDA else [lambda _: matmul_nt(a, b)])]
    middle = choose(statistics.median, min)
    matmul = min(middle(Timed((nothing, call)).samples()) for call in matmuls)
    copy = middle(Timed((nothing, lambda _: target.copy_(source))).samples())
    return Ceilings(tflops=2e-9 * n**3 / matmul, gbps=2e-6 * size / copy)


def default_precisions() -> list[str]:
    """What is measured by default: bf16 only where the hardware has it."""
    return list(DTYPES) if resolve_precision("auto", DEVICE) == torch.bfloat16 else ["fp32"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--precisions", nargs="+", default=default_precisions(), choices=DTYPES)
    for name in parser.parse_args().precisions:
        record.emit({"suite": "ceilings", "dtype": name, **asdict(measure_ceilings(DTYPES[name]))})


if __name__ == "__main__":
    main()

"""Every op against its float64 reference, and against PyTorch in the same dtype: `fusedgpt kernels check`.

An error is ||out - truth|| / ||truth|| of one output or gradient. Limits: ours <= 1.5 x PyTorch's forward and
<= 2 x backward, where PyTorch's error counts at least as much as rounding the truth once. In half precision
the mean signed error must also be near 0, so that errors average out instead of adding up.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from fusedgpt.kernels.errors import InputError
from fusedgpt.kernels.tools.cases import Case, Function, Inputs, cases

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FACTOR = {"forward": 1.5, "backward": 2.0}
_FLOAT64_NOISE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The worst output of one case in one dtype and direction."""

    op: str
    shape: str
    dtype: str
    direction: str = ""  # "forward" or "backward"
    output: str = ""  # "out 0", or the input whose gradient it is
    error: float = math.nan  # ||ours - truth|| / ||truth||
    torch_error: float = math.nan  # the same of PyTorch in this dtype
    limit: float = math.nan
    bias: float = math.nan  # mean signed error towards the truth's sign / rms error
    bias_limit: float = math.nan
    exception: str = ""  # what the case raised; the figures are then NaN

    @property
    def ok(self) -> bool:
        """Whether error and bias are within their limits; False where either is NaN."""
        return self.error <= self.limit and abs(self.bias) <= self.bias_limit

    @property
    def fault(self) -> str:
        """One line on what is wrong; empty if ok."""
        what = f"{self.op} {self.shape} {self.dtype} {self.direction} {self.output}".rstrip()
        if self.exception:
            return f"{what}: {self.exception}"
        if not self.error <= self.limit:
            return f"{what}: error {self.error:.2e}, the limit is {self.limit:.2e}"
        return "" if self.ok else f"{what}: bias {self.bias:+.3f}, the limit is {self.bias_limit:.3f}"

    def as_dict(self) -> dict[str, str | float | bool | None]:
        """All fields and `ok`; None for an infinite or NaN figure, which JSON cannot hold."""
        fields = asdict(self)
        odd = {name for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)}
        return fields | dict.fromkeys(odd) | {"ok": self.ok}

    def cells(self) -> dict[str, str]:
        """Column -> text, for a table."""
        errors = {"error": self.error, "PyTorch": self.torch_error, "limit": self.limit}
        return {
            **{name: getattr(self, name) for name in ("op", "dtype", "shape", "direction")},
            "worst output": self.output,
            **{name: f"{error:.2e}" for name, error in errors.items()},
            "bias": f"{self.bias:+.3f}",
            "verdict": "ok" if self.ok else "FAIL",
        }


def check(
    device: torch.device,
    op_names: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Findings of all `cases`, or of some ops and dtypes only; an exception in one is a finding too.

    On a CPU the interpreter runs in fp32 and fp16, which it computes correctly. Raises ValueError for an op
    without cases and for a dtype that is unknown or not supported on this device.
    """
    usable = list(DTYPES) if device.type == "cuda" else ["fp32", "fp16"]
    every = cases(device)
    wanted, dtypes = tuple(op_names), tuple(dtypes) or usable
    _refuse_unknown("op", wanted, [case.op for case in every])
    _refuse_unknown("dtype", dtypes, usable)
    tasks = [(case, dtype) for case in every for dtype in dtypes if not wanted or case.op in wanted]
    findings = []
    for done, (case, dtype) in enumerate(tasks):
        progress(done, len(tasks))
        try:
            with warnings.catch_warnings():  # a GPU makes inf and NaN silently, the interpreter's NumPy warns
                warnings.simplefilter("ignore", RuntimeWarning)
                findings += measure(case, DTYPES[dtype], device)
        except Exception as error:  # whatever a kernel raises is a finding
            exception = f"{type(error).__name__}: {' '.join(str(error).split())}"
            findings.append(Finding(op=case.op, shape=case.shape, dtype=dtype, exception=exception))
    return findings


def _refuse_unknown(what: str, asked: Iterable[str], known: Iterable[str]) -> None:
    for name in asked:
        if name not in known:
            raise InputError(f"no {what} {name!r} to check here; there are {', '.join(dict.fromkeys(known))}")


def measure(case: Case, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> list[Finding]:
    """[forward, backward] findings of the Triton path of `case`; [forward] if nothing has a gradient."""
    exact = case.inputs(torch.Generator().manual_seed(seed))
    dtypes = dict.fromkeys(exact, dtype) | dict.fromkeys(case.fp32_inputs, torch.float32)
    rounded = {name: _cast(x, dtypes[name]).to(device) for name, x in exact.items()}
    wide = {name: _cast(x, torch.float64) for name, x in rounded.items()}
    truth, upstream = run_case(case.reference, wide, None, dtype)
    with patch.dict(os.environ, FUSEDGPT_KERNELS="triton"):
        ours, _ = run_case(case.ours, rounded, upstream)
    theirs, _ = run_case(case.reference, rounded, upstream)
    findings = []
    for direction in truth:
        compared = [
            _compare(case, dtype, direction, name, ours[direction][name], theirs[direction][name], expected)
            for name, expected in truth[direction].items()
        ]
        if compared:
            findings.append(max(compared, key=lambda f: (not f.ok, f.error / f.limit if f.limit else 0.0)))
    return findings


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def run_case(
    function: Function,
    inputs: Inputs,
    upstream: list[Tensor] | None,
    upstream_dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Inputs], list[Tensor]]:
    """Outputs and gradients by name, and the upstream gradients: drawn if None, exact in upstream_dtype."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
        upstream = [dy.to(upstream_dtype).to(y) for dy, y in zip(upstream, outputs, strict=True)]
    results = {"forward": {f"out {i}": y.detach() for i, y in enumerate(outputs)}, "backward": {}}
    if any(y.requires_grad for y in outputs):
        torch.autograd.backward(outputs, [d.to(y.dtype) for d, y in zip(upstream, outputs, strict=True)])
        results["backward"] = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return results, upstream


def _compare(
    case: Case, dtype: torch.dtype, direction: str, name: str, ours: Tensor, theirs: Tensor, truth: Tensor
) -> Finding:
    unit = math.sqrt(max(truth.numel(), 1))  # the norm of unit entries, the scale of all inputs
    vanishes = truth.norm().item() < _FLOAT64_NOISE * unit  # e.g. dq where a row has one key
    size = unit if vanishes else truth.norm().item()
    error, torch_error = ours.double() - truth, (theirs.double() - truth).norm().item() / size
    one_rounding = (truth.to(ours.dtype).double() - truth).norm().item() / size
    if vanishes:
        one_rounding = torch.finfo(ours.dtype).eps
    rms = error.norm().item() / unit
    rows = truth.numel() / truth.shape[-1] if truth.ndim else 1.0
    half = ours.dtype in (torch.float16, torch.bfloat16)
    return Finding(
        op=case.op,
        shape=case.shape,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        direction=direction,
        output=name,
        error=error.norm().item() / size,
        torch_error=torch_error,
        limit=_FACTOR[direction] * max(torch_error, one_rounding),
        bias=(error * truth.sign()).mean().item() / rms if rms else 0.0,
        bias_limit=0.02 + 5.0 / math.sqrt(max(rows, 1.0)) if half else math.inf,
    )

"""`fusedgpt kernels ...`: the Triton kernels, checked, inspected and tuned."""

import os
import sys
from dataclasses import asdict
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from typing import Annotated, Any, Literal

import typer

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.cli.common import App, Debug, Group, Json, print_json, print_table
from fusedgpt.train.report.terminal import progress_bar

kernels = App(cls=Group, no_args_is_help=True, help="Inspect, check and tune the Triton kernels.")


class Dtype(StrEnum):  # typer takes no list of a Literal
    """Of the inputs of a kernel."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@kernels.command(name="report")
def report_kernels(
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only the kernels of this file; may be repeated.")
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(help="Compute capability; may be repeated.", show_default="80, 90, 100"),
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Add more dtypes and shapes.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a kernel has a problem.")] = False,
    step: Annotated[
        bool,
        typer.Option("--step", help="Predict the parts of a step of gpt2 instead, 16 x 1024, no dropout."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile every kernel, no GPU needed: registers, blocks per multiprocessor, instructions in the loop.

    CTAs: thread blocks on one multiprocessor. bound, predicted: for bf16 on 9.0, what an H200 is
    predicted to do, not a measurement. A narrow terminal has fewer columns.
    --json adds shared memory, instructions by execution unit, loads, stores, configuration.
    """
    if step:
        parts = _triton_module("train.tools.predict_step").predict_step(dropout=False)
        if as_json:
            print_json([asdict(part) for part in parts])
        else:
            print_table([part.cells() for part in parts])
        return
    inspection = _triton_module("kernels.tools.report")
    with progress_bar("compiling") as progress:
        only = kernel or (), arch or inspection.ARCHITECTURES, dtype or ()
        rows = inspection.report(*only, full=full, progress=progress)
    rows.sort(key=lambda row: (row.arch, row.dtype))
    if as_json:
        print_json([asdict(row) for row in rows])
    for (arch, dtype), group in groupby([] if as_json else rows, key=lambda row: (row.arch, row.dtype)):
        typer.echo(f"sm_{arch} {dtype}")
        print_table([row.cells() for row in group], if_wide=("loop", "bound"))
        typer.echo()
    if check:
        faulty = [row for row in rows if row.problem]
        _exit_with([f"{r.kernel} ({r.dtype}, {r.label}, sm_{r.arch}) {r.problem}" for r in faulty])


@kernels.command(name="check")
def check_kernels(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every kernel against float64, in the interpreter if there is no GPU; exit with 1 on failure."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are imported
    checking = _triton_module("kernels.tools.check")
    with progress_bar("checking") as progress:
        findings = checking.check(device, op or (), dtype or (), progress=progress)
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print_table([finding.cells() for finding in findings])
        wrong = sum(not finding.ok for finding in findings)
        typer.echo(f"{len(findings)} results, {wrong or 'none'} wrong")
    _exit_with([finding.fault for finding in findings if not finding.ok])


@kernels.command(name="rehearse")
def rehearse_kernels(
    arch: Annotated[
        list[int] | None,
        typer.Option(help="Compute capability; may be repeated.", show_default="80, 90, 100"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every case for every architecture.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run training and sampling as on a GPU, no GPU needed: launches, faults; exit with 1 on a fault."""
    rehearsal = _triton_module("train.tools.rehearse")
    with progress_bar("rehearsing") as progress:
        results = rehearsal.rehearse(arch or rehearsal.ARCHITECTURES, full=full, progress=progress)
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        print_table([result.cells() for result in results])
    _exit_with([f"{r.case}, sm_{r.arch}: {fault}" for r in results for fault in r.faults])


@kernels.command(name="tune")
def tune_kernels(
    head_size: Annotated[
        list[int] | None, typer.Option(help="Channels per head; may be repeated.", show_default="64, 128")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the inputs.")] = Dtype.BF16,
    feature: Annotated[
        Literal["plain", "documents", "dropout"], typer.Option(help="Variant of the kernel.")
    ] = "plain",
    minutes: Annotated[float, typer.Option(help="Time limit; the best found so far is kept.")] = 20.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest attention tiles for this GPU and store them for later runs."""
    tune = _triton_module("kernels.tools.tune")
    with progress_bar("tuning") as progress:
        choices, path = tune.tune(head_size or (64, 128), dtype, feature, minutes, progress=progress)
    if as_json:
        print_json([asdict(choice) for choice in choices])
        return
    print_table([choice.cells() for choice in choices])
    typer.echo(f"tuning file: {path}")


def _triton_module(name: str) -> Any:
    """The module fusedgpt.`name`, which needs Triton."""
    if find_spec("triton") is None:
        raise InputError("the kernels need the package triton, which exists for Linux only")
    return import_module(f"fusedgpt.{name}")


def _exit_with(faults: list[str]) -> None:
    """Exit with 1 if there are faults, each a line on standard error."""
    sys.stderr.writelines(f"fusedgpt: {fault}\n" for fault in faults)
    if faults:
        raise typer.Exit(1)

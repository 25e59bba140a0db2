"""`fusedgpt kernels ...`: the Triton kernels, checked, inspected and tuned."""

import os
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from fusedgpt.train.cli.common import Debug, Json, exit_with, print_json, print_table
from fusedgpt.train.report.terminal import progress_bar

kernels = typer.Typer(
    no_args_is_help=True, help="The Triton kernels: what they compile to, and their errors."
)


@kernels.command(name="report")
def report_kernels(
    kernel: Annotated[list[str] | None, typer.Option(help="Only this file of kernels; repeatable.")] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability, e.g. 90 (default: 80, 90, 100).")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="More dtypes and shapes.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 where a kernel may not ship.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile every kernel, with or without a GPU: registers, spills, shared memory, instructions."""
    inspection = _triton_module("report")
    with progress_bar("compiling") as progress:
        rows = inspection.report(kernel or (), arch or inspection.ARCHITECTURES, full=full, progress=progress)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print_table([row.cells() for row in rows])
    faults = [
        f"{row.kernel} ({row.dtype}, {row.label}, sm_{row.arch}) {row.problem}" for row in rows if row.problem
    ]
    if check:
        exit_with(faults)


@kernels.command(name="check")
def check_kernels(
    op: Annotated[list[str] | None, typer.Option(help="Only this op; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only fp32, fp16 or bf16; repeatable.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure every kernel against float64, interpreted where there is no GPU; exit with 1 on a failure."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are imported
    checking = _triton_module("check")
    with progress_bar("checking") as progress:
        findings = checking.check(
            torch.device("cuda" if gpu else "cpu"), op or (), dtype or (), progress=progress
        )
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print_table([finding.cells() for finding in findings])
    exit_with([finding.fault for finding in findings if not finding.ok])


@kernels.command(name="tune")
def tune_kernels(
    head_size: Annotated[
        list[int] | None, typer.Option(help="Channels of a head; repeatable (default: 64 and 128).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    feature: Annotated[str, typer.Option(help="plain, documents or dropout.")] = "plain",
    minutes: Annotated[float, typer.Option(help="Stop after that long, with what was found.")] = 20.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search this GPU's fastest attention tiles and keep them for every later run."""
    tune = _triton_module("tune")
    with progress_bar("tuning") as progress:
        choices, path = tune.tune(head_size or (64, 128), dtype, feature, minutes, progress=progress)
    if as_json:
        print_json([asdict(choice) for choice in choices])
        return
    print_table([choice.cells() for choice in choices])
    typer.echo(f"tuning file: {path}")


def _triton_module(name: str) -> Any:
    """The module fusedgpt.kernels.tools.`name`, which needs Triton."""
    if find_spec("triton") is None:
        raise ValueError("the kernels need the package triton, which exists for Linux only")
    return import_module(f"fusedgpt.kernels.tools.{name}")

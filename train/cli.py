"""The command line: parse, call, print."""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from fusedgpt.train.config import ConfigError, build_config, option_fields
from fusedgpt.train.runtime import spin_briefly

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trains small GPTs fast: a prompt or text goes in, a model folder that other tools open comes out.",
)
kernels = typer.Typer(
    no_args_is_help=True, help="The Triton kernels: what they compile to, and their errors."
)
app.add_typer(kernels, name="kernels")
_INTERRUPTED = 130
_SYNONYMS = {"preset": ["--size"]}

OutputDir = Annotated[Path, typer.Option(help="Where finished model folders go.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")]


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, in place of its **options, an option for each field of the run's configuration."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    generated = []
    for name, field in option_fields().items():
        flags = [f"--{name.replace('_', '-')}", *_SYNONYMS.get(name, [])]
        default = "" if field.default is None else f" (default: {field.default})"
        option = typer.Option(None, *flags, help=f"{field.description}{default}")
        kind = _option_type(field.annotation) | None
        generated.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
        )
    parameters = [*own, *generated]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option_type(annotation: Any) -> Any:
    """int, float or str for a field's annotation; pydantic knows what values it may have."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in (int, float) if kind in kinds), str)


@app.command()
@with_run_options
def create(
    prompt: Annotated[str, typer.Argument(help="What the GPT is to write, in your own words.")],
    output_dir: OutputDir = Path("models"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Make a GPT from a prompt: data, refinement, training, test samples, model folder."""
    from fusedgpt.train.monitor import Monitor
    from fusedgpt.train.pipeline import create_config, run_full_pipeline

    config = create_config(options)
    _report(run_full_pipeline(prompt, config, output_dir, monitor=Monitor(quiet=quiet)), as_json)


@app.command()
@with_run_options
def train(
    data: Annotated[
        list[Path], typer.Option(help="A text file, or a folder of .txt and .md; may be repeated.")
    ],
    output_dir: OutputDir = Path("models"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a GPT on your own text."""
    from fusedgpt.train.monitor import Monitor
    from fusedgpt.train.pipeline import train_on_files

    _report(train_on_files(data, build_config(options), output_dir, Monitor(quiet=quiet)), as_json)


def _report(result: Any, as_json: bool) -> None:
    """The outcome of create or train, for a person or a program."""
    from fusedgpt.train.pipeline import loss_text

    if as_json:
        _print_json(result.as_dict())
        return
    for prompt, text in result.samples.items():
        typer.echo(f"--- sample for {prompt!r}\n{printable(text).rstrip()}\n")
    summary = result.summary
    typer.echo(
        f"{summary.steps} steps, {summary.seconds:.0f} s, {summary.tokens_per_second:,.0f} tok/s, "
        f"loss {summary.final_loss:.4f}, validation loss {loss_text(summary.val_loss)}"
    )
    typer.echo(f"model folder: {result.model_path}")


@app.command()
def sample(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="The text to continue; empty starts a new one.")] = "",
    n_samples: Annotated[int, typer.Option("--n-samples", "-n", help="How many texts.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="The longest continuation, in tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: among all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from a model folder."""
    from fusedgpt.model.folder import load_folder
    from fusedgpt.model.generate import sample_texts
    from fusedgpt.train.trainer import resolve_device

    gpt, tokenizer = load_folder(model)
    texts = sample_texts(
        gpt.to(resolve_device(device)),
        tokenizer,
        prompt,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        _print_json({"model_path": str(model), "prompt": prompt, "samples": texts})
    else:
        typer.echo("\n---\n".join(map(printable, texts)))


@app.command(name="list")
def list_models(
    output_dir: OutputDir = Path("models"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Saved models, newest first."""
    from fusedgpt.model.folder import list_folders

    rows = list_folders(output_dir)
    if as_json:
        _print_json(rows)
    elif not rows:
        typer.echo(f"no models in {output_dir}")
    for row in [] if as_json else rows:
        typer.echo(f"{row['saved']}  {row['parameters']:>13,}  {row['name']}")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """What this machine has, and which path each op will take."""
    from fusedgpt.train.doctor import examine

    report = examine()
    if as_json:
        _print_json(report)
        return
    for section, entries in report.items():
        typer.echo(f"{section}\n" + "\n".join(f"  {name:<24} {value}" for name, value in entries.items()))


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
    inspection = _triton_module("inspect")
    with _progress("compiling") as progress:
        rows = inspection.report(kernel or (), arch or inspection.ARCHITECTURES, full=full, progress=progress)
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        _print_table([row.cells() for row in rows])
    faults = [
        f"{row.kernel} ({row.dtype}, {row.label}, sm_{row.arch}) {row.problem}" for row in rows if row.problem
    ]
    if check:
        _exit_with(faults)


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
    with _progress("checking") as progress:
        findings = checking.check(
            torch.device("cuda" if gpu else "cpu"), op or (), dtype or (), progress=progress
        )
    if as_json:
        _print_json([finding.as_dict() for finding in findings])
    else:
        _print_table([finding.cells() for finding in findings])
    _exit_with([finding.fault for finding in findings if not finding.ok])


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
    with _progress("tuning") as progress:
        choices, path = tune.tune(head_size or (64, 128), dtype, feature, minutes, progress=progress)
    if as_json:
        _print_json([asdict(choice) for choice in choices])
        return
    _print_table([choice.cells() for choice in choices])
    typer.echo(f"tuning file: {path}")


def _triton_module(name: str) -> Any:
    """The module fusedgpt.kernels.`name`, which needs Triton."""
    if find_spec("triton") is None:
        raise ValueError("the kernels need the package triton, which exists for Linux only")
    return import_module(f"fusedgpt.kernels.{name}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal: call it with what is done and the total."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_table(rows: list[dict[str, str]]) -> None:
    """Columns as wide as their widest cell; those that are empty throughout are left out."""
    columns = [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _exit_with(faults: list[str]) -> None:
    """Exit with 1 if there are faults, each a line on standard error."""
    sys.stderr.writelines(f"fusedgpt: {fault}\n" for fault in faults)
    if faults:
        sys.exit(1)


def printable(text: str) -> str:
    """`text` without control characters and escape sequences, which could drive the terminal."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])?", "", text)
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def main() -> None:
    """The console script: errors are one line and a non-zero exit, a traceback only with --debug."""
    spin_briefly()
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns the first into the second
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        expected = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingDiverged"
        kind = "" if expected else f"internal error, {type(error).__name__}: "
        hint = "" if expected else " (--debug shows where; please report it)"
        _fail(f"{kind}{' '.join(str(error).split())}{hint}", 2 if isinstance(error, ConfigError) else 1)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"fusedgpt: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The command line: parse, call, print."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fusedgpt.kernels.cpu.process import spin_briefly
from fusedgpt.train.cli import model as cli_model
from fusedgpt.train.cli.common import (
    Assignments,
    ConfigFile,
    Debug,
    Json,
    OutputDir,
    PrintConfig,
    Profile,
    Quiet,
    Resume,
    RunDir,
    print_json,
    print_table,
    resolve_run,
    with_options,
    with_run_options,
)
from fusedgpt.train.cli.data import data as data_app
from fusedgpt.train.cli.kernels import kernels
from fusedgpt.train.cli.prepare import prepare
from fusedgpt.train.config import ConfigError, build_config, create_config, option_fields
from fusedgpt.train.report.terminal import printable, progress_bar

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Trains small GPTs fast: a prompt or text goes in, a model folder that other tools open comes out.",
)
_INTERRUPTED = 130
# For spin_briefly, measured in docs/experiments.md, "Spinning" and "Spinning while sampling".
_SPINS = {"create": 1_000, "train": 1_000, "sample": 16_000, "chat": 16_000}
_EXPECTED = ("TrainingDiverged", "Stopped")  # by name: their modules import torch


@app.command()
@with_options(option_fields(llm=True))
def create(
    prompt: Annotated[
        str | None, typer.Argument(help="What the GPT is to write, in your own words.", show_default=False)
    ] = None,
    output_dir: OutputDir = Path("models"),
    run_dir: RunDir = None,
    resume: Resume = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
    profile: Profile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Make a GPT from a prompt: data, refinement, training, test samples, model folder."""
    told, found, layers = resolve_run("create", run_dir, resume, config, assignments)
    resolved = create_config(options, layers)
    if print_config:
        typer.echo(resolved.to_toml(), nl=False)
        return
    if told and prompt not in (None, told["prompt"]):
        raise ConfigError(f"the run to resume was made for the prompt {told['prompt']!r}")
    prompt = told.get("prompt", prompt)
    if prompt is None:
        raise ConfigError('say what the GPT is to write: fusedgpt create "PROMPT"')
    from fusedgpt.train.pipeline import RunOptions, run_full_pipeline
    from fusedgpt.train.report.progress import Monitor

    where = RunOptions(run_dir=run_dir, resume=found, profile=profile)
    monitor, bar = Monitor(quiet=quiet), partial(progress_bar, quiet=quiet)
    result = run_full_pipeline(prompt, resolved, output_dir, monitor=monitor, options=where, bar=bar)
    _report(result, as_json)


@app.command()
@with_run_options
def train(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, .jsonl, .parquet, folders of them; or token sets, each with its weight or none "
            "(SET:0.7); may be repeated."
        ),
    ] = None,
    output_dir: OutputDir = Path("models"),
    run_dir: RunDir = None,
    resume: Resume = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
    plot_schedule: Annotated[
        Path | None, typer.Option(help="Draw the learning rate over the run into this PNG and stop.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print memory and time by --checkpointing and stop.")
    ] = False,
    profile: Profile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a GPT on your own text."""
    told, found, layers = resolve_run("train", run_dir, resume, config, assignments)
    resolved = build_config(options, layers=layers)
    data = data or [Path(path) for path in told.get("data", [])]
    if print_config:
        typer.echo(resolved.to_toml(), nl=False)
        return
    if not (data or plot_schedule or estimate):
        raise ConfigError("say what to train on: --data FILE_OR_FOLDER")
    from fusedgpt.train import pipeline
    from fusedgpt.train.report.progress import Monitor

    if plot_schedule is not None:
        typer.echo(pipeline.draw_schedule(resolved, data, plot_schedule))
    elif estimate:
        print_table(pipeline.estimate_rows(resolved, data))
    else:
        where = pipeline.RunOptions(run_dir=run_dir, resume=found, profile=profile)
        _report(pipeline.train_on_files(data, resolved, output_dir, Monitor(quiet=quiet), where), as_json)


def _report(result: Any, as_json: bool) -> None:
    """The outcome of create or train, for a person or a program."""
    from fusedgpt.train.pipeline import loss_text

    if as_json:
        print_json(result.as_dict())
        return
    for prompt, text in result.samples.items():
        typer.echo(f"--- sample for {prompt!r}\n{printable(text).rstrip()}\n")
    summary = result.summary
    typer.echo(
        f"{summary.steps} steps, {summary.seconds:.0f} s, {summary.tokens_per_second:,.0f} tok/s, "
        f"loss {summary.final_loss:.4f}, validation loss {loss_text(summary.best_val_loss)}"
    )
    typer.echo(f"run directory: {result.run_path}\nmodel folder: {result.model_path}")


@app.command(name="list")
def list_models(
    output_dir: OutputDir = Path("models"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Saved models, newest first."""
    from fusedgpt.model.hf_config import list_folders

    rows = list_folders(output_dir)
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(f"no models in {output_dir}")
    for row in [] if as_json else rows:
        typer.echo(f"{row['saved']}  {row['parameters']:>13,}  {row['name']}")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """What this machine has, and which path each op will take."""
    from fusedgpt.train.tools.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
        return
    for section, entries in report.items():
        typer.echo(f"{section}\n" + "\n".join(f"  {name:<24} {value}" for name, value in entries.items()))


app.command()(cli_model.sample)
app.command()(cli_model.chat)
app.command(name="eval")(cli_model.eval_model)
app.command()(cli_model.export)
app.command()(prepare)
app.add_typer(kernels, name="kernels")
app.add_typer(data_app, name="data")


def main() -> None:
    """The console script: errors are one line and a non-zero exit, a traceback only with --debug."""
    if spins := _SPINS.get("".join(sys.argv[1:2])):
        spin_briefly(spins)
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:  # before typer makes it an exit code
        code = _INTERRUPTED
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _explain(error)
    if code == _INTERRUPTED:
        _fail("interrupted", code)
    sys.exit(code)


def _explain(error: Exception) -> NoReturn:
    usage = getattr(error, "format_message", None)  # typer's errors; their class depends on its version
    if usage is not None and not usage():  # no arguments at all
        typer.echo(error.ctx.get_help(), err=True)  # type: ignore[attr-defined]
        sys.exit(2)
    if usage is not None:
        _fail(f"{' '.join(usage().split()).rstrip('.')}; --help says more", 2)
    expected = isinstance(error, (ValueError, OSError)) or type(error).__name__ in _EXPECTED
    kind = "" if expected else f"internal error, {type(error).__name__}: "
    hint = "" if expected else " (--debug shows where; please report it)"
    code = getattr(error, "exit_code", 2 if isinstance(error, ConfigError) else 1)
    _fail(f"{kind}{' '.join(str(error).split())}{hint}", code)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"fusedgpt: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

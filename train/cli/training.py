"""Commands that train: `fusedgpt create` and `fusedgpt train`."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgpt.kernels.cpu.process import spin_briefly
from fusedgpt.train.cli.common import MODELS, Debug, Json, OutputDir, Quiet, print_json, print_table
from fusedgpt.train.cli.settings import earlier_layers, given_settings
from fusedgpt.train.report.terminal import printable, progress_bar
from fusedgpt.train.run.world import join

_SPINS = 1_000  # measured: docs/experiments.md, "Spinning"
_log_option = partial(typer.Option, rich_help_panel="Checkpoints and logs")
_config_option = partial(typer.Option, rich_help_panel="Configuration")
_instead_option = partial(typer.Option, rich_help_panel="Instead of training")

Name = Annotated[
    str | None,
    typer.Option(help="Name of the run and of the model's folder.", show_default="what it is and the time"),
]
RunDir = Annotated[
    Path | None,
    _log_option(help="Directory of the run: checkpoints and metrics.", show_default="a new one in runs/"),
]
Resume = Annotated[
    str | None,
    typer.Option(
        help="Continue a run: its directory, a checkpoint of it, or auto for the newest of the same data."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file of settings, or a recipe's name; flags override it.")
]
Assignments = Annotated[
    list[str] | None,
    _config_option(
        "--set",
        metavar="SECTION.NAME=VALUE",
        help="Override a setting of the file, such as train.beta2=0.99; may be repeated.",
    ),
]
PrintConfig = Annotated[
    bool, _config_option("--print-config", help="Print the resolved settings as TOML and exit.")
]


def _silence_profiler(value: bool) -> bool:
    if value:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own notes; before torch is imported
    return value


Profile = Annotated[
    bool,
    _log_option(
        "--profile",
        help="Trace a few steps (trace.json) and print the ten most expensive ops.",
        callback=_silence_profiler,
    ),
]


def create(
    ctx: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="What the GPT should write, in your own words.", show_default=False)
    ] = None,
    name: Name = None,
    output_dir: OutputDir = MODELS,
    run_dir: RunDir = None,
    resume: Resume = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
    profile: Profile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Create a GPT from a prompt: generate texts, refine them, train, test, save a model folder."""
    spin_briefly(_SPINS)
    from fusedgpt.train.config import ConfigError
    from fusedgpt.train.defaults import create_config

    world = join()
    this = {"command": "create", "prompt": prompt}
    recorded, found, layers = earlier_layers(this, run_dir, resume, config, assignments, world)
    resolved = create_config(given_settings(ctx), layers)
    if print_config:
        if world.first:
            typer.echo(resolved.to_toml(), nl=False)
        return
    if recorded and prompt not in (None, recorded["prompt"]):
        raise ConfigError(f"the run to resume was made for the prompt {recorded['prompt']!r}")
    prompt = recorded.get("prompt", prompt)
    if prompt is None or not prompt.strip():
        raise ConfigError('no prompt: say what the GPT should write, fusedgpt create "PROMPT"')
    from fusedgpt.train.pipeline import run_full_pipeline
    from fusedgpt.train.report.progress import Monitor

    quiet = quiet or not world.first
    monitor, bar = Monitor(quiet=quiet), partial(progress_bar, quiet=quiet)
    where: dict[str, Any] = {"name": name, "run_dir": run_dir, "resume": found}
    where |= {"profile": profile, "world": world}
    with _finished_is_fine(resume, as_json):
        result = run_full_pipeline(prompt, resolved, output_dir, monitor=monitor, bar=bar, **where)
        if world.first:
            _report(result.as_dict(), as_json)


def train(
    ctx: typer.Context,
    text: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="The same as --data.", show_default=False)
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text, JSON, CSV or .parquet files, folders of them, or token sets, which may have a weight "
            "(SET:0.7); may be repeated.",
        ),
    ] = None,
    name: Name = None,
    output_dir: OutputDir = MODELS,
    run_dir: RunDir = None,
    resume: Resume = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    print_config: PrintConfig = False,
    plot_schedule: Annotated[
        Path | None, _instead_option(metavar="PNG", help="Plot the learning rate over the run to this file.")
    ] = None,
    estimate: Annotated[
        bool, _instead_option("--estimate", help="Print memory and time of each --checkpointing.")
    ] = False,
    profile: Profile = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a GPT on your own text."""
    spin_briefly(_SPINS)
    from fusedgpt.train.config import ConfigError
    from fusedgpt.train.defaults import train_config

    world = join()
    data = [*(text or []), *(data or [])]
    this = {"command": "train", "data": [str(path.resolve()) for path in data]}
    recorded, found, layers = earlier_layers(this, run_dir, resume, config, assignments, world)
    resolved = train_config(given_settings(ctx), layers)
    data = data or [Path(path) for path in recorded.get("data", [])]
    if not world.first and (print_config or plot_schedule is not None or estimate):
        return
    if print_config:
        typer.echo(resolved.to_toml(), nl=False)
        return
    if not (data or plot_schedule or estimate):
        raise ConfigError("no training data: fusedgpt train FILE_OR_FOLDER")
    from fusedgpt.train import pipeline
    from fusedgpt.train.report.progress import Monitor

    if plot_schedule is not None:
        typer.echo(pipeline.draw_schedule(resolved, data, plot_schedule))
    elif estimate:
        _show_estimates(*pipeline.estimates(resolved, data), as_json=as_json)
    else:
        monitor = Monitor(quiet=quiet or not world.first)
        where: dict[str, Any] = {"name": name, "run_dir": run_dir, "resume": found}
        where |= {"profile": profile, "world": world}
        with _finished_is_fine(resume, as_json):
            result = pipeline.train_on_files(data, resolved, output_dir, monitor, **where)
            if world.first:
                _report(result.as_dict(), as_json)


def _show_estimates(one: list[Any], several: list[Any], *, as_json: bool) -> None:
    """Rows of pipeline.estimates, for a person or a program."""
    from fusedgpt.train.tools import estimate, scaling

    if as_json:
        print_json({"one_card": list(map(asdict, one)), "several_cards": list(map(asdict, several))})
        return
    print_table(estimate.table(one))
    if several:
        typer.echo(f"\nseveral cards, predicted; {scaling.ASSUMED}s where this machine has no GPU")
        print_table(scaling.table(several))


@contextmanager
def _finished_is_fine(resume: str | None, as_json: bool) -> Iterator[None]:
    """With --resume auto, as in a job script that is started again, report a finished run once more."""
    from fusedgpt.train.run.directory import RunFinished

    try:
        yield
    except RunFinished as finished:
        if resume != "auto":
            raise
        sys.stderr.write(f"{finished}\n")
        _report(finished.result, as_json)


def _report(result: dict[str, Any], as_json: bool) -> None:
    """The outcome, for a person or a program; result: as TrainingResult.as_dict."""
    from fusedgpt.train.report.model_card import loss_text, quality_text

    if as_json:
        print_json(result)
        return
    if quality := result.get("quality"):
        for i, text in enumerate(quality["samples"], 1):
            typer.echo(f"--- text {i} of {len(quality['samples'])}\n{printable(text).strip()}\n")
        typer.echo(quality_text(quality))
    elif result.get("opening"):
        typer.echo(
            f"--- how it goes on from the beginning of the text\n{printable(result['opening']).rstrip()}\n"
        )
    typer.echo(
        f"{result['steps']} steps, {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tok/s, "
        f"loss {result['final_loss']:.4f}, validation loss {loss_text(result['best_val_loss'])}"
    )
    typer.echo(f"run directory: {result['run_path']}\nmodel folder: {result['model_path']}")
    typer.echo(f"talk to it: fusedgpt chat {shlex.quote(result['model_path'])}")

"""The command line: the commands, and how errors become one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from fusedgpt.kernels.errors import InputError, UserError
from fusedgpt.train.cli import model, training
from fusedgpt.train.cli.common import MODELS, App, Debug, Group, Json, OutputDir, print_json, print_table
from fusedgpt.train.cli.data import data
from fusedgpt.train.cli.kernels import kernels
from fusedgpt.train.cli.prepare import prepare
from fusedgpt.train.cli.settings import SettingsCommand
from fusedgpt.train.report.terminal import protect_streams
from fusedgpt.train.run.world import among_several

_INTERRUPTED = 130
_MAKE, _MODELS, _TOOLS = "Make a model", "Use a model", "Tools"

app = App(
    cls=Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Train small GPTs fast: from a prompt or from text to a model folder that other tools can open.",
)


def _show_version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(f"fusedgpt {metadata.version('fusedgpt')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


app.command(cls=SettingsCommand, rich_help_panel=_MAKE)(training.create)
app.command(cls=SettingsCommand, rich_help_panel=_MAKE)(training.train)
app.command(rich_help_panel=_MAKE)(prepare)
app.add_typer(data, name="data", rich_help_panel=_MAKE)
app.command(cls=SettingsCommand, rich_help_panel=_MODELS)(model.sample)
app.command(cls=SettingsCommand, rich_help_panel=_MODELS)(model.chat)
app.command(name="eval", rich_help_panel=_MODELS)(model.eval_model)
app.command(rich_help_panel=_MODELS)(model.export)


@app.command(name="list", rich_help_panel=_MODELS)
def list_models(output_dir: OutputDir = MODELS, as_json: Json = False, debug: Debug = False) -> None:
    """List the saved models, newest first."""
    from fusedgpt.model.hf_config import list_folders
    from fusedgpt.train.report.model_card import origin

    if output_dir != MODELS and not output_dir.is_dir():
        raise InputError(f"there is no folder {output_dir}; without --output-dir, models are in {MODELS}/")
    rows = [row | origin(Path(row["path"])) for row in list_folders(output_dir)]
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(f"no models in {output_dir}")
    else:
        print_table([_list_row(**row) for row in rows])


def _list_row(
    path: str, saved: str, parameters: int, val_loss: float | None, prompt: str | None, **_: Any
) -> dict[str, str]:
    loss = "" if val_loss is None else f"{val_loss:.3f}"
    size, about = f"{parameters:,}", shorten(prompt or "", 40)
    return {"path": path, "saved": saved, "parameters": size, "val loss": loss, "prompt": about}


@app.command(name="report", rich_help_panel=_TOOLS)
def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a page that compares runs: losses over tokens and time, throughput, memory, settings."""
    from fusedgpt.train.report.comparison import compare

    path = compare(runs, out)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)


@app.command(rich_help_panel=_TOOLS)
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what this machine has and which implementation each op will use."""
    from fusedgpt.train.tools.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
        return
    for section, entries in report.items():
        typer.echo(f"{section}\n" + "\n".join(f"  {name:<24} {value}" for name, value in entries.items()))


app.add_typer(kernels, name="kernels", rich_help_panel=_TOOLS)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; arguments: those of the process by default. Always raises SystemExit.

    An error is one line on standard error and a non-zero exit code, a traceback only with --debug.
    """
    if sys.platform == "win32":
        sys.exit("fusedgpt runs on Linux and macOS; on Windows, run it in WSL: https://aka.ms/wslinstall")
    protect_streams()
    if os.environ.get("COLUMNS") == "0":  # said where the width is not known; rich would print nothing
        del os.environ["COLUMNS"]
    if arguments is None and len(sys.argv) == 1 and sys.stdin.isatty() and sys.stdout.isatty():
        from fusedgpt.train.cli.menu import choose

        arguments = choose()
        if arguments is None:
            sys.exit(_INTERRUPTED)
    message = ""
    context: dict[str, Any] = {}  # ctx.obj of every command
    try:
        code = app(arguments, prog_name="fusedgpt", standalone_mode=False, obj=context)
    except KeyboardInterrupt:  # outside of typer, which makes it an exit code
        code = _INTERRUPTED
    except Exception as error:
        if context.get("debug"):
            raise
        message, code = _explain(error)
    message = message or ("interrupted" if code == _INTERRUPTED else "")
    message = " ".join(message.split())
    if among_several():
        from fusedgpt.train.run.ranks import leave

        leave(message, code or 0)
    if message:
        sys.stderr.write(f"fusedgpt: {message}\n")
    sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """(what to say, exit code)."""
    code = getattr(error, "exit_code", 1)  # 2 for wrong usage, ConfigError included; a signal's for Stopped
    if isinstance(error, typer.TyperException):  # wrong usage; without a message typer has printed the help
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        return message and f"{message}; --help says more", code
    if isinstance(error, (UserError, OSError)):
        return str(error), code
    if among_several():
        from fusedgpt.train.run.ranks import explain_lost

        if message := explain_lost(error):
            return message, 1
    return f"internal error, {type(error).__name__}: {error} (--debug shows where; please report it)", 1


if __name__ == "__main__":
    main()

"""What the commands share: options, tables and JSON."""

import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from fusedgpt.model.files import to_json

MODELS = Path("models")
LATEST = Path("latest")
F = TypeVar("F", bound=Callable[..., Any])

_output_option = partial(typer.Option, rich_help_panel="Output")


def _model_folder(path: Path) -> Path:
    """`path`, the newest model for `latest`, or the model of the finished run `path`.

    Others are refused before torch is imported.
    """
    from fusedgpt.model.hf_config import ModelFolderError, list_folders, read_config

    if path == LATEST and not path.exists():
        for newest in list_folders(MODELS):
            return Path(newest["path"])
        raise ModelFolderError(f"{MODELS}/ holds no model yet: `fusedgpt create` makes one")
    try:
        read_config(path)
        return path
    except ModelFolderError:
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        if not (run / "run.json").is_file():
            raise
    from fusedgpt.train.run.directory import read_run

    about, _ = read_run(run)
    model = about.get("result", {}).get("model_path")
    if model is None:
        remedy = f"`fusedgpt {about.get('command')} --resume {run}` finishes the run and writes one"
    elif path != run:
        remedy = f"its run wrote {model}"
    else:
        read_config(Path(model))
        return Path(model)
    raise ModelFolderError(f"{path} is no model folder: {remedy}")


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.ensure_object(dict)["debug"] = value  # main reads it when an exception reaches it
    return value


class _PlainFlags:
    """Help without <bool> beside a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    pass


class Group(_PlainFlags, TyperGroup):
    pass


class App(typer.Typer):
    """Commands with plain flags."""

    def command(self, *args: Any, cls: type[TyperCommand] = Command, **options: Any) -> Callable[[F], F]:  # type: ignore[override]
        return super().command(*args, cls=cls, **options)


ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A model folder, or latest for the newest in models/.", callback=_model_folder
    ),
]
OutputDir = Annotated[Path, typer.Option(help="Directory of the finished model folders.")]
TextField = Annotated[str, typer.Option(help="Field that holds the text, in JSON, CSV and tables.")]
Errors = Annotated[
    Literal["strict", "replace", "ignore"],
    typer.Option(help="Bytes that are not UTF-8: refuse the file, replace them by U+FFFD, or skip them."),
]
Json = Annotated[bool, _output_option("--json", help="Print the result to stdout as one line of JSON.")]
Quiet = Annotated[bool, _output_option("--quiet", help="Print no progress to stderr.")]
Debug = Annotated[  # eager: seen before another option is found to be wrong
    bool,
    _output_option(
        "--debug", help="Show the traceback of an error.", callback=_remember_debug, is_eager=True
    ),
]


def print_table(rows: list[dict[str, str]], *, if_wide: Collection[str] = ()) -> None:
    """Columns as wide as their widest cell; without those that have no text.

    if_wide: columns that a terminal has to be wide enough for.
    """
    columns = [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    if sys.stdout.isatty() and sum(width.values()) + 2 * (len(width) - 1) > get_terminal_size().columns:
        columns = [name for name in columns if name not in if_wide]
    for line in (dict(zip(columns, columns, strict=True)), *rows):
        typer.echo("  ".join(line[name].ljust(width[name]) for name in columns).rstrip())


def print_json(value: Any) -> None:
    """One line on standard output; what its encoding lacks is escaped."""
    text = to_json(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = to_json(value)
    typer.echo(text)

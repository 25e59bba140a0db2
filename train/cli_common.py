"""What the commands share: options, progress bars, tables."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fusedgpt.train.config import option_fields

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
        kind = _option_type(field.annotation)
        flag = name.replace("_", "-")
        flags = [f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}", *_SYNONYMS.get(name, [])]
        default = "" if field.default is None else f" (default: {field.default})"
        option = typer.Option(None, *flags, help=f"{field.description}{default}")
        generated.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)
        )
    parameters = [*own, *generated]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option_type(annotation: Any) -> Any:
    """bool, int, float or str for a field's annotation; pydantic knows what values it may have."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in (bool, int, float) if kind in kinds), str)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal: call it with what is done and the total."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(rows: list[dict[str, str]]) -> None:
    """Columns as wide as their widest cell; those that are empty throughout are left out."""
    columns = [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def exit_with(faults: list[str]) -> None:
    """Exit with 1 if there are faults, each a line on standard error."""
    sys.stderr.writelines(f"fusedgpt: {fault}\n" for fault in faults)
    if faults:
        sys.exit(1)


def printable(text: str) -> str:
    """`text` without control characters and escape sequences, which could drive the terminal."""
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])?", "", text)
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def print_json(value: Any) -> None:
    """One line on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))

"""What the commands share: options, tables."""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from fusedgpt.train.config import ConfigError, Sections, option_fields, parse_set, read_toml

_SYNONYMS = {"preset": ["--size"]}

OutputDir = Annotated[Path, typer.Option(help="Where finished model folders go.")]
RunDir = Annotated[
    Path | None, typer.Option(help="Where checkpoints and metrics go (default: a new folder in runs/).")
]
Resume = Annotated[
    str | None,
    typer.Option(help="auto, or a run directory or one of its checkpoints: go on where it stopped."),
]
ConfigFile = Annotated[Path | None, typer.Option(help="A TOML file of settings; flags go before it.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.NAME=VALUE", help="One setting, such as train.beta2=0.99."),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved settings as TOML and stop.")
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Trace a few steps (trace.json) and print the ten dearest ops.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one line of JSON on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _model_folder(path: Path) -> Path:
    """`path`; what is no model folder is refused before anything waits for torch."""
    from fusedgpt.model.hf_config import read_config

    read_config(path)
    return path


ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.", callback=_model_folder)]
TextField = Annotated[str, typer.Option(help="The field with the text, of .jsonl and tables.")]


class DecodingErrors(StrEnum):
    """What to do with bytes that are not UTF-8."""

    STRICT = "strict"
    REPLACE = "replace"
    IGNORE = "ignore"


Errors = Annotated[
    DecodingErrors,
    typer.Option(help="What is not UTF-8: strict refuses, replace puts U+FFFD, ignore skips."),
]
_Command = Callable[..., None]


def with_run_options(command: _Command) -> _Command:
    """Give `command`, in place of its **options, an option for each field of the run's configuration."""
    return with_options(option_fields())(command)


def with_options(fields: Mapping[str, FieldInfo]) -> Callable[[_Command], _Command]:
    """A decorator that gives a command, in place of its **options, an option for each field."""
    return partial(_add_options, fields)


def _add_options(fields: Mapping[str, FieldInfo], command: _Command) -> _Command:
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    generated = []
    for name, field in fields.items():
        kind = _option_type(field.annotation)
        flags = [f"--{name.replace('_', '-')}", *_SYNONYMS.get(name, [])]
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


def resolve_run(
    command: str,
    run_dir: Path | None,
    resume: str | None,
    config: Path | None,
    assignments: list[str] | None,
) -> tuple[dict[str, Any], Path | None, list[Sections]]:
    """(what run.json of the run to resume holds, that run, layers of settings for build_config)."""
    found, told, layers = (None, {}, []) if resume is None else _run_to_resume(command, run_dir, resume)
    layers += [read_toml(config)] if config else []
    layers += [parse_set(assignment) for assignment in assignments or []]
    return told, found, layers


def _run_to_resume(
    command: str, run_dir: Path | None, resume: str
) -> tuple[Path | None, dict[str, Any], list[Sections]]:
    from fusedgpt.train.run.directory import directory_of, find_run, read_run

    found = find_run(resume, run_dir)
    if found is None:
        sys.stderr.write("nothing to resume: this is a new run\n")
        return None, {}, []
    told, saved = read_run(directory_of(found))
    if told.get("command") != command:
        raise ConfigError(f"{found} is a run of `fusedgpt {told.get('command')}`, not of {command}")
    if run_dir is not None and run_dir.resolve() != directory_of(found).resolve():
        raise ConfigError(f"--resume {found} goes on in its own directory, not in --run-dir {run_dir}")
    return found, told, [saved]


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


def print_json(value: Any) -> None:
    """One line on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))

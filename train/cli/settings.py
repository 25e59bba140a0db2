"""The settings of a run as options of a command, and what they are merged with."""

import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:  # pydantic takes 0.1 s to import, and `fusedgpt --help` needs none of it
    from fusedgpt.train.config import Sections

_SYNONYMS = {"preset": ["--size"]}


class SettingsCommand(TyperCommand):
    """A command that has an option for each of its settings (config.settings_of its name).

    typer makes options of a signature, and pydantic gives a model the signature of its fields. So settings,
    defined once in train/config.py, go through a model to typer, and no list repeats them. This happens when
    a command is asked for its options: `fusedgpt --help` does not import pydantic.
    """

    @cached_property
    def _settings(self) -> list[Any]:
        from pydantic import create_model

        from fusedgpt.train.config import DEFAULTS, panel_of, settings_of

        options: dict[str, Any] = {}
        for name, field in settings_of(self.name or "").items():
            panel, unset = panel_of(field)
            default = DEFAULTS.get(self.name or "", {}).get(name, field.default)
            option = typer.Option(
                f"--{name.replace('_', '-')}",
                *_SYNONYMS.get(name, []),
                help=field.description,
                rich_help_panel=panel,
                show_default=unset if unset and default is None else True,
            )
            options[name] = (Annotated[field.annotation, option], default)
        app = typer.Typer(add_completion=False)
        app.command()(create_model("Settings", **options))
        return typer.main.get_command(app).params

    def get_params(self, ctx: Any) -> list[Any]:
        """The function's own parameters of the first panel, the settings, the other own ones, --help."""
        params: list[Any] = super().get_params(ctx)
        *own, help_option = params
        first = [param for param in own if param.rich_help_panel is None]
        return [*first, *self._settings, *(param for param in own if param not in first), help_option]

    def invoke(self, ctx: Any) -> Any:
        """Call the function without the settings: `all_settings` and `given_settings` return them."""
        settings = {param.name: ctx.params.pop(param.name) for param in self._settings}
        ctx.ensure_object(dict)["settings"] = settings
        return super().invoke(ctx)


def all_settings(ctx: typer.Context) -> dict[str, Any]:
    """The value of every setting of a SettingsCommand."""
    return dict(ctx.obj["settings"])


def given_settings(ctx: typer.Context) -> dict[str, Any]:
    """The settings that were given as options."""

    def is_given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    return {name: value for name, value in all_settings(ctx).items() if is_given(name)}


def earlier_layers(
    command: str,
    run_dir: Path | None,
    resume: str | None,
    config: Path | None,
    assignments: list[str] | None,
) -> tuple[dict[str, Any], Path | None, list["Sections"]]:
    """(what run.json of the run to resume holds, that run, the settings that options override).

    The settings are layers for build_config: those of the run, of the --config file, of each --set.
    """
    from fusedgpt.train.config import parse_set, read_toml

    found, recorded, layers = (None, {}, []) if resume is None else _run_to_resume(command, run_dir, resume)
    layers += [read_toml(config)] if config else []
    layers += [parse_set(assignment) for assignment in assignments or []]
    return recorded, found, layers


def _run_to_resume(
    command: str, run_dir: Path | None, resume: str
) -> tuple[Path | None, dict[str, Any], list["Sections"]]:
    from fusedgpt.train.config import ConfigError
    from fusedgpt.train.run.directory import directory_of, find_run, read_run

    found = find_run(resume, run_dir)
    if found is None:
        sys.stderr.write("nothing to resume: this is a new run\n")
        return None, {}, []
    recorded, saved = read_run(directory_of(found))
    if recorded.get("command") != command:
        raise ConfigError(f"{found} is a run of `fusedgpt {recorded.get('command')}`, not of {command}")
    if run_dir is not None and run_dir.resolve() != directory_of(found).resolve():
        raise ConfigError(f"--resume {found} continues in its own directory, not in --run-dir {run_dir}")
    return found, recorded, [saved]

"""The settings of a run as options of a command, and what they are merged with."""

import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedgpt.train.cli.common import Command
from fusedgpt.train.run.world import World

if TYPE_CHECKING:  # pydantic takes 0.1 s to import, and `fusedgpt --help` needs none of it
    from fusedgpt.train.config import Sections


class SettingsCommand(Command):
    """A command that has an option for each of its settings (config.settings_of its name).

    typer makes options from a signature, and a pydantic model has one with its fields. The model is made when
    the command is asked for its options, so that `fusedgpt --help` does not import pydantic.
    """

    @cached_property
    def _settings(self) -> list[Any]:
        from pydantic import create_model

        from fusedgpt.train.config import panel_of, settings_of
        from fusedgpt.train.defaults import DEFAULTS

        options: dict[str, Any] = {}
        command = self.name or ""
        for name, field in settings_of(command).items():
            panel, unset = panel_of(field)
            default = DEFAULTS.get(command, {}).get(name, field.default)
            option = typer.Option(
                f"--{name.replace('_', '-')}",
                *(["--size"] if name == "preset" else []),
                help=field.description,
                rich_help_panel=panel,
                show_default=unset if unset and default is None else True,
                case_sensitive=False,
                metavar="" if field.annotation is bool else None,
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
    sources = {name: ctx.get_parameter_source(name) for name in ctx.obj["settings"]}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return {name: value for name, value in all_settings(ctx).items() if name in given}


def earlier_layers(
    command: dict[str, Any],  # as run.json has it; None for what is not given
    run_dir: Path | None,
    resume: str | None,
    config: Path | None,
    sets: list[str] | None,
    world: World,
) -> tuple[dict[str, Any], Path | None, list["Sections"]]:
    """(what run.json of the run to resume holds, that run, the settings that options override).

    The settings are layers for build_config: those of the run, of the --config file, of each --set.
    """
    from fusedgpt.train.config import parse_set, read_toml

    recorded: dict[str, Any] = {}
    found, layers = None, []
    if resume is not None:
        found, recorded, saved = world.from_first(lambda: _run_to_resume(command, run_dir, resume))
        found = found and Path(found)
        layers = [saved] if found else []
    layers += [read_toml(config)] if config else []
    layers += [parse_set(assignment) for assignment in sets or []]
    return recorded, found, layers


def _run_to_resume(
    command: dict[str, Any], run_dir: Path | None, resume: str
) -> tuple[str | None, dict[str, Any], "Sections"]:
    """(path, run.json, settings) of the run that --resume names; (None, {}, {}) where auto finds none."""
    from fusedgpt.train.config import ConfigError
    from fusedgpt.train.run.directory import directory_of, find_run, read_run  # it imports torch

    found = find_run(resume, run_dir, command)
    if found is None:
        sys.stderr.write("nothing to resume: this is a new run\n")
        return None, {}, {}
    recorded, saved = read_run(directory_of(found))
    made_by = recorded.get("command")
    if made_by != command["command"]:
        raise ConfigError(f"{found} is a run of `fusedgpt {made_by}`, not of {command['command']}")
    if run_dir is not None and run_dir.resolve() != directory_of(found).resolve():
        where = f"its own directory, not in --run-dir {run_dir}"
        raise ConfigError(f"--resume {found} continues in {where}")
    return str(found), recorded, saved

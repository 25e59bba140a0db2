"""`fusedgpt data ...`: the first steps of `create` alone, with JSONL files in between."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fusedgpt.train.cli.common import App, Debug, Group, Json, Quiet, print_json
from fusedgpt.train.cli.settings import SettingsCommand, given_settings
from fusedgpt.train.report.terminal import progress_bar

if TYPE_CHECKING:  # they take long to import
    from fusedgpt.train.data.synthetic.llm_config import LLMConfig
    from fusedgpt.train.data.synthetic.task import Task

data = App(cls=Group, no_args_is_help=True, help="Generate and refine training texts, without training.")
Domain = Literal["cooking", "poetry", "technical", "general", "conversation"]


@data.command(cls=SettingsCommand)
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the texts should teach, in your own words.")],
    output: Annotated[
        Path,
        typer.Option(
            help='JSONL file to write, one {"text": ...} per line; one from a language model is continued.'
        ),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="GPT-2 tokens to generate.")] = 30_000,
    domain: Annotated[
        Domain | None, typer.Option(help="Kind of text.", show_default="chosen by the prompt")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate texts for a prompt, from templates or with a language model."""
    from fusedgpt.train.data.synthetic.collect import make_texts
    from fusedgpt.train.data.synthetic.grammar import choose_domain
    from fusedgpt.train.data.synthetic.jsonl import write_objects

    config = _config(ctx)
    if config.data_source == "template":
        _refuse_to_overwrite(output)
    task = _task(prompt, domain or choose_domain(prompt), seed, quiet)
    texts, info = make_texts(task, config, tokens, output)
    if "fallback" in info:
        output = output.with_suffix(".filled.jsonl")
    if config.data_source == "template" or "fallback" in info:
        write_objects(output, ({"text": text} for text in texts))
    _report({"path": str(output), "samples": len(texts), **info}, f"{len(texts):,} texts: {output}", as_json)


@data.command(cls=SettingsCommand)
def refine(
    ctx: typer.Context,
    texts: Annotated[Path, typer.Argument(help='JSONL file with one {"text": ...} per line.')],
    output: Annotated[Path, typer.Option(help="JSONL file to write.")],
    prompt: Annotated[
        str, typer.Option(help="What the texts should teach; they are graded by it.", show_default=False)
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="GPT-2 tokens to keep.")] = 15_000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep the best texts without repeats, graded by heuristics or by a language model."""
    from fusedgpt.train.data.synthetic.collect import refine_texts
    from fusedgpt.train.data.synthetic.grammar import choose_domain
    from fusedgpt.train.data.synthetic.jsonl import read_texts, write_objects

    config = _config(ctx)
    _refuse_to_overwrite(output)
    if not texts.is_file():
        raise FileNotFoundError(f"there is no file {texts}")
    samples = read_texts(texts)
    task = _task(prompt, choose_domain(prompt), 0, quiet)
    kept, info = refine_texts(samples, task, config, tokens, output.with_suffix(".grades.jsonl"))
    write_objects(output, ({"text": text} for text in kept))
    _report({"path": str(output), "samples": len(kept), **info}, f"{len(kept):,} texts: {output}", as_json)


def _config(ctx: typer.Context) -> "LLMConfig":
    """The settings of the language model. Raises ConfigError."""
    from fusedgpt.train.config import build_config

    return build_config(given_settings(ctx)).llm


def _task(prompt: str, domain: str, seed: int, quiet: bool) -> "Task":
    from fusedgpt.train.data.synthetic.task import Task
    from fusedgpt.train.report.progress import Monitor

    shown: dict[str, Any] = {} if quiet else {"note": Monitor().note, "bar": progress_bar}
    return Task(prompt=prompt, domain=domain, seed=seed, **shown)


def _refuse_to_overwrite(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it, or choose another --output")


def _report(result: dict[str, Any], summary: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        typer.echo(summary)

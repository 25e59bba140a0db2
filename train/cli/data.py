"""Commands that make training texts and choose the best of them, each step alone: JSONL in and out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusedgpt.train.cli.common import Debug, Json, Quiet, print_json, with_options
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.report.terminal import progress_bar

data = typer.Typer(no_args_is_help=True, help="Make and choose training texts, without training on them.")
_LLM = LLMConfig.model_fields


@data.command()
@with_options(_LLM)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the texts are to teach, in your own words.")],
    output: Annotated[Path, typer.Option(help='The JSONL file to make or go on with: {"text": ...} a line.')],
    tokens: Annotated[int, typer.Option(min=1, help="GPT-2 tokens to write.")] = 30_000,
    domain: Annotated[
        str | None, typer.Option(help="cooking, poetry, technical, general, conversation.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other texts.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Write texts for a prompt, from templates or by a language model."""
    from fusedgpt.train.data.synthetic.collect import make_texts
    from fusedgpt.train.data.synthetic.grammar import DOMAINS, choose_domain
    from fusedgpt.train.data.synthetic.jsonl import write_objects

    if domain not in (None, *DOMAINS):
        raise ValueError(f"no domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    config = _config(options)
    if config.data_source == "template":
        _refuse_to_overwrite(output)
    task = _task(prompt, domain or choose_domain(prompt), seed, quiet)
    texts, info = make_texts(task, config, tokens, output)
    if config.data_source == "template" or "fallback" in info:
        filled = output if config.data_source == "template" else output.with_suffix(".filled.jsonl")
        write_objects(filled, ({"text": text} for text in texts))
        output = filled
    _report({"path": str(output), "samples": len(texts), **info}, f"{len(texts):,} texts: {output}", as_json)


@data.command()
@with_options(_LLM)
def refine(
    texts: Annotated[Path, typer.Argument(help='A JSONL file with {"text": ...} a line.')],
    output: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    prompt: Annotated[str, typer.Option(help="What the texts are to teach; by it they are graded.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="GPT-2 tokens to keep.")] = 15_000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Keep the best texts, without repeats: graded by heuristics, or by a language model."""
    from fusedgpt.train.data.synthetic.collect import refine_texts
    from fusedgpt.train.data.synthetic.grammar import choose_domain
    from fusedgpt.train.data.synthetic.jsonl import read_texts, write_objects

    config = _config(options)
    _refuse_to_overwrite(output)
    if not texts.is_file():
        raise FileNotFoundError(f"there is no file {texts}")
    samples = read_texts(texts)
    task = _task(prompt, choose_domain(prompt), 0, quiet)
    kept, info = refine_texts(samples, task, config, tokens, output.with_suffix(".grades.jsonl"))
    write_objects(output, ({"text": text} for text in kept))
    _report({"path": str(output), "samples": len(kept), **info}, f"{len(kept):,} texts: {output}", as_json)


def _config(options: dict[str, Any]) -> LLMConfig:
    """Raises ConfigError for options out of range or at odds."""
    from pydantic import ValidationError

    from fusedgpt.train.config import ConfigError, explain

    try:
        return LLMConfig(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _task(prompt: str, domain: str, seed: int, quiet: bool) -> Any:
    from fusedgpt.train.data.synthetic.collect import Task
    from fusedgpt.train.report.progress import Monitor

    if quiet:
        return Task(prompt=prompt, domain=domain, seed=seed)
    return Task(prompt=prompt, domain=domain, seed=seed, note=Monitor().note, bar=progress_bar)


def _refuse_to_overwrite(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or choose another --output")


def _report(result: dict[str, Any], summary: str, as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        typer.echo(summary)

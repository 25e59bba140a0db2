"""Commands that take a model folder."""

from typing import Annotated

import typer

from fusedgpt.train.cli_common import Debug, Json, ModelFolder, print_json, printable


def sample(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="The text to continue; empty starts a new one.")] = "",
    n_samples: Annotated[int, typer.Option("--n-samples", "-n", help="How many texts.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="The longest continuation, in tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: among all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from a model folder."""
    from fusedgpt.model.folder import load_folder
    from fusedgpt.model.generate import sample_texts
    from fusedgpt.train.precision import resolve_device

    gpt, tokenizer = load_folder(model)
    texts = sample_texts(
        gpt.to(resolve_device(device)),
        tokenizer,
        prompt,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        print_json({"model_path": str(model), "prompt": prompt, "samples": texts})
    else:
        typer.echo("\n---\n".join(map(printable, texts)))

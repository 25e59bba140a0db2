"""`fusedgpt` alone on a terminal: arrows and Enter make a command line."""

from __future__ import annotations

import shlex
import shutil
import timeit
from pathlib import Path

import questionary
import typer
from questionary import Choice

from fusedgpt.train.cli.common import MODELS

_OWN = "own"
# Of training beside large products, and seconds for all else: 1M took 140 s for 3.8 TFLOP, and 20 s more,
# where products reach 150 GFLOP/s.
_EFFICIENCY, _OVERHEAD = 0.18, 20.0
PROMPTS = {
    "Recipe writer": "A fun GPT that writes cooking recipes",
    "Vegan cook": "Vegan recipes for every day",
    "Baker": "Cakes, cookies and bread",
    "Soup kitchen": "Recipes for warm soups and stews",
    "Haiku poet": "A haiku poet who watches the seasons",
    "Poet of the sea": "A poem about the sea",
    "Love poet": "Poems about love and longing",
    "Storyteller": "Bedtime stories about dragons",
    "Letter writer": "Letters about everyday life",
    "Diary": "A diary of a year in the countryside",
    "Dialogue partner": "A dialogue partner for small talk",
    "Travel talk": "Conversations of travellers who ask the way",
    "Database teacher": "Explains databases and SQL",
    "Python teacher": "Explains Python to beginners",
    "詩人": "詩を書くGPT",
    "料理人": "料理のレシピ",
}
_SIZES = ("1M", "3M", "12M", "33M")


def choose() -> list[str] | None:
    """Ask what to do; the arguments of the command, which is also shown. None where the person leaves."""
    actions = {
        "Create a GPT from a prompt": _create,
        "Train a GPT on my own text": _train,
        "Let a model write": lambda: _use("sample"),
        "Chat with a model": lambda: _use("chat"),
        "List the models": lambda: ["list"],
        "Show what this machine has": lambda: ["doctor"],
    }
    action = questionary.select(
        "What shall we do?", [Choice(name, make) for name, make in actions.items()]
    ).ask()
    arguments = action and action()
    if arguments:
        typer.echo(f"$ fusedgpt {shlex.join(arguments)}")
    return arguments or None


def _create() -> list[str] | None:
    choices = [Choice(f"{name:<18} {prompt}", prompt) for name, prompt in PROMPTS.items()]
    prompt = questionary.select("What should it write?", [*choices, Choice("My own words", _OWN)]).ask()
    if prompt == _OWN:
        prompt = questionary.text("In your words:", validate=_not_blank).ask()
    size = prompt and _ask_size()
    source = size and _ask_source()
    if not source:
        return None
    default = "1" if source == ["template"] else "20"
    epochs = questionary.text("How often is the text read?", default=default, validate=str.isdigit).ask()
    if epochs is None:
        return None
    more = [] if epochs == default else ["--epochs", epochs]
    if source != ["template"]:
        more += ["--data-source", *source]
    return ["create", prompt, "--size", size, *more]


def _ask_size() -> str | None:
    choices = []
    for size, minutes in _estimates().items():
        about = f"{size:<5} about {minutes:.0f} minutes on this machine's CPU" if minutes else size
        choices.append(Choice(about, size))
    return questionary.select("How large?", choices).ask()  # type: ignore[no-any-return]


def _estimates() -> dict[str, float | None]:
    """Minutes that `create` takes by size, from the rate of a matrix product; None where a GPU will train."""
    if shutil.which("nvidia-smi"):
        return dict.fromkeys(_SIZES)
    import numpy as np

    from fusedgpt.train.defaults import create_config, text_tokens

    x = np.ones((1024, 1024), np.float32)
    flops_per_second = 2 * 1024**3 / min(timeit.repeat(lambda: x @ x, number=1, repeat=6))
    found: dict[str, float | None] = {}
    for size in _SIZES:
        config = create_config({"preset": size})
        _, rest = config.model.gpt_config(1).parameter_counts()
        tokens = text_tokens(config)[1]
        found[size] = (6 * rest * tokens / (_EFFICIENCY * flops_per_second) + _OVERHEAD) / 60
    return found


def _ask_source() -> list[str] | None:
    """What --data-source takes, and what that needs."""
    choices = [
        Choice("Templates: at once, no server", "template"),
        Choice("A model of Ollama on this machine", "ollama"),
        Choice("An OpenAI-compatible server", "openai"),
    ]
    source = questionary.select("Who writes the text to learn from?", choices).ask()
    if source == "ollama":
        model = _ask_ollama_model()
        return [source, "--gen-model", model] if model else None
    if source == "openai":
        host = questionary.text("Its address:", default="https://api.openai.com", validate=_not_blank).ask()
        model = host and questionary.text("The model's name:", validate=_not_blank).ask()
        return [source, "--llm-host", host, "--gen-model", model] if model else None
    return source and [source]


def _ask_ollama_model() -> str | None:
    from fusedgpt.kernels.errors import UserError

    try:
        from fusedgpt.train.data.synthetic.llm import installed_models

        models = installed_models()
    except (UserError, ModuleNotFoundError) as error:
        typer.echo(f"{error}; `scripts/setup llm` installs the client", err=True)
        return None
    if not models:
        typer.echo(
            "Ollama has no model yet: `ollama pull llama3.2` gets a small one that writes well", err=True
        )
        return None
    return questionary.select("Which model writes?", models).ask()  # type: ignore[no-any-return]


def _train() -> list[str] | None:
    path = questionary.path(
        "Which file or folder?", validate=lambda path: Path(path).exists() or "not there"
    ).ask()
    size = path and questionary.select("How large?", ["3M", "12M", "33M", "gpt2"], default="12M").ask()
    return size and ["train", path, "--size", size]


def _use(command: str) -> list[str] | None:
    from fusedgpt.model.hf_config import list_folders

    rows = list_folders(MODELS)
    if not rows:
        typer.echo(f"{MODELS}/ holds no model yet: create one first", err=True)
        return None
    path = questionary.select("Which model?", [row["path"] for row in rows]).ask()
    if command == "chat" or path is None:
        return path and [command, path]
    text = questionary.text("Text to continue:").ask()
    return None if text is None else [command, path, text]


def _not_blank(text: str) -> bool | str:
    return bool(text.strip()) or "say something"

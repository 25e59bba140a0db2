"""Commands that take a model folder."""

import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from fusedgpt.kernels.cpu.process import spin_briefly
from fusedgpt.train.cli.common import Debug, Errors, Json, ModelFolder, Quiet, TextField, print_json
from fusedgpt.train.cli.settings import all_settings
from fusedgpt.train.report.terminal import ShowProgress, printable, progress_bar
from fusedgpt.train.run.world import join

if TYPE_CHECKING:  # they take long to import
    from fusedgpt.model.generate import Sampling
    from fusedgpt.model.gpt import GPT
    from fusedgpt.model.tokenizer import Tokenizer
    from fusedgpt.train.data.text.sources import Source

_SPINS = 16_000  # measured: docs/experiments.md, "Spinning while sampling"

Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Stop before this string; may be repeated.")
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens", help="Encode names of special tokens, such as <|im_start|>, as those tokens."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def sample(
    ctx: typer.Context,
    model: ModelFolder,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="The same as --prompt.", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text to continue; may be repeated.", show_default="empty"),
    ] = None,
    n_samples: Annotated[int, typer.Option("--n-samples", "-n", help="Samples per prompt.")] = 1,
    stop: Stop = None,
    special_tokens: SpecialTokens = False,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text; with --json, one line per prompt."""
    gpt, tokenizer, sampling = _load(ctx, model, device)
    from fusedgpt.model.generate import sample_batch
    from fusedgpt.train.report.terminal import TerminalWriter

    prompts = [*(text or []), *(prompt or [])] or [""]
    if not special_tokens:
        _note_special_tokens(tokenizer, "".join(prompts))
    writer = TerminalWriter(sys.stdout) if len(prompts) * n_samples == 1 and not as_json else None
    begun = False

    def show(text: str) -> None:  # the prompt is not shown before prompt and settings have proved usable
        nonlocal begun
        if writer is not None:
            writer.write(text if begun else prompts[0] + text)
        begun = True

    texts = sample_batch(
        gpt,
        tokenizer,
        prompts,
        n_samples=n_samples,
        stop=stop or (),
        special_tokens=special_tokens,
        on_text=show,
        **sampling,
    )
    if as_json:
        for one, samples in zip(prompts, texts, strict=True):
            print_json({"model_path": str(model), "prompt": one, "samples": samples})
    elif writer is None:
        typer.echo("\n---\n".join(printable(text) for samples in texts for text in samples))
    else:
        writer.write("" if begun else prompts[0])
        writer.end()


def chat(
    ctx: typer.Context,
    model: ModelFolder,
    user: Annotated[str, typer.Option(help="Prefix of your lines, as in the training text.")] = "",
    reply: Annotated[str, typer.Option(help="Prefix of the model's replies.")] = "",
    stop: Stop = None,
    special_tokens: SpecialTokens = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Chat with a model: it continues the conversation.

    Ctrl-C stops a reply, Ctrl-D ends the chat. /reset starts over, /set temperature 0.7 changes a setting,
    /info shows them. The model sees at most the last half of its context length.
    """
    gpt, tokenizer, sampling = _load(ctx, model, device)
    from fusedgpt.train.report.terminal import TerminalWriter, typed_lines
    from fusedgpt.train.tools.chat import Chat, converse

    if not special_tokens:
        _note_special_tokens(tokenizer, user + reply)
    talk = Chat(
        gpt,
        tokenizer,
        user=user,
        reply=reply,
        stop=stop or (),
        special_tokens=special_tokens,
        **sampling,
    )
    if not sys.stdin.isatty():
        converse(talk, (line.rstrip("\n") for line in sys.stdin), TerminalWriter(sys.stdout))
        return
    with suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401 - importing it gives input() line editing and history
    typer.echo(
        f"{model.resolve().name}: a GPT of {gpt.config.parameter_counts()[0]:,} parameters. "
        "/set temperature 0.7, /info, /reset; Ctrl-C stops a reply, Ctrl-D ends."
    )
    converse(talk, typed_lines("> "), TerminalWriter(sys.stdout))
    typer.echo()


def _note_special_tokens(tokenizer: "Tokenizer", prompt: str) -> None:
    if name := tokenizer.find_special(prompt):
        sys.stderr.write(f"{name} in a prompt is ordinary text without --special-tokens\n")


def _load(ctx: typer.Context, folder: Path, device: str) -> tuple["GPT", "Tokenizer", "Sampling"]:
    """The model on its device, its tokenizer, the sampling settings. Raises ValueError."""
    spin_briefly(_SPINS)  # before torch is imported
    from fusedgpt.model.decode import store_for_decoding
    from fusedgpt.model.folder import load_folder
    from fusedgpt.model.generate import check_settings
    from fusedgpt.train.loop.precision import resolve_device

    settings = all_settings(ctx)
    settings["top_k"] = settings["top_k"] or None
    check_settings(**{name: value for name, value in settings.items() if name != "seed"})
    where = resolve_device(device)
    gpt, tokenizer = load_folder(folder)
    return store_for_decoding(gpt.to(where)), tokenizer, cast("Sampling", settings)


def eval_model(
    model: ModelFolder,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="Text, JSON, CSV or .parquet files, folders of them, - for stdin, or a token set, of which "
            "the held-out part is used; may be repeated.",
        ),
    ],
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="half a window")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Context length in tokens.", show_default="the length of training windows"),
    ] = None,
    text_field: TextField = "text",
    errors: Errors = "strict",
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Compute precision.")
    ] = "fp32",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity and bits per byte on a text; every token counts the same."""
    from fusedgpt.model.folder import load_folder
    from fusedgpt.train.config import ConfigError
    from fusedgpt.train.data.text.sources import Source
    from fusedgpt.train.data.tokens.load import is_token_set, load_validation_tokens
    from fusedgpt.train.loop.precision import cast_parameters, resolve_device, resolve_precision
    from fusedgpt.train.tools.evaluate import evaluate_text, evaluate_tokens

    world = join()
    if world.size > 1:
        Source(inputs=tuple(data)).check_rereadable("every rank reads the text")
    gpt, tokenizer = load_folder(model)
    where = resolve_device(world.device(device))
    dtype = resolve_precision(precision, where)
    cast_parameters(gpt.to(where), dtype)
    with progress_bar("evaluating", quiet=quiet or not world.first) as show:
        options: dict[str, Any] = {"window": window, "stride": stride, "dtype": dtype, "world": world}
        if not any(map(is_token_set, data)):
            source = Source(inputs=tuple(data), text_field=text_field, errors=errors, cut=tokenizer.safe_cut)
            result = evaluate_text(gpt, tokenizer, _counted(source, show), **options)
        elif all(map(is_token_set, data)):
            streams = [load_validation_tokens(path, tokenizer) for path in data]
            total = sum(map(len, streams))
            options["report"] = lambda done: show(done, total)
            result = evaluate_tokens(gpt, tokenizer, streams, **options)
        else:
            raise ConfigError("--data: text and token sets cannot be evaluated together; use two commands")
    if not world.first:
        return
    if as_json:
        print_json({"model_path": str(model), "data": list(map(str, data)), **asdict(result)})
        return
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    typer.echo(f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}{bits}")
    typer.echo(
        f"{result.tokens:,} tokens, {result.bytes:,} bytes, "
        f"{result.documents:,} document{'s' * (result.documents != 1)}; "
        f"window {result.window}, stride {result.stride}; {result.tokens / result.seconds:,.0f} tok/s"
    )


def _counted(source: "Source", show: ShowProgress) -> "Source":
    """`source`, which shows how much of it has been read."""
    total, read = source.size, 0

    def count(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes
        show(read, max(total, read))

    return replace(source, on_bytes=count)


def export(
    model: ModelFolder,
    to: Annotated[
        Literal["gguf", "safetensors"], typer.Option(help="Format; gguf is for llama.cpp and Ollama.")
    ],
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (safetensors) to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="gguf: f32, f16 or q8_0; safetensors: bf16, fp16 or fp32.",
            show_default="f16 for gguf, fp32 for safetensors",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model for other tools; for gguf, print a Modelfile for Ollama."""
    from fusedgpt.model import export as exports
    from fusedgpt.model.folder import load_folder

    gpt, tokenizer = load_folder(model)
    dtype = dtype or ("fp32" if to == "safetensors" else "f16")
    if to == "safetensors":
        exports.export_safetensors(gpt, tokenizer, out, dtype=dtype)
    else:
        exports.export_gguf(gpt, tokenizer, out, dtype=dtype, name=model.resolve().name)
    n_bytes = sum(file.stat().st_size for file in (out.iterdir() if out.is_dir() else [out]))
    if as_json:
        print_json({"path": str(out), "format": to, "dtype": dtype, "bytes": n_bytes})
        return
    sys.stderr.write(f"wrote {out}: {to}, {dtype}, {n_bytes / 1e6:,.1f} MB\n")
    typer.echo(exports.modelfile(gpt, tokenizer, out) if to == "gguf" else f"{out}\n", nl=False)

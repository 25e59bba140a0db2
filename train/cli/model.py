"""Commands that take a model folder."""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedgpt.train.cli.common import (
    Debug,
    DecodingErrors,
    Errors,
    Json,
    ModelFolder,
    Quiet,
    TextField,
    print_json,
)
from fusedgpt.train.config import ConfigError
from fusedgpt.train.report.terminal import printable, progress_bar

if TYPE_CHECKING:  # they import what takes long
    from fusedgpt.model.generate import Sampling
    from fusedgpt.train.data.text.sources import Source

MaxNewTokens = Annotated[int, typer.Option(help="The longest continuation, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: among all.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach p.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens that were there become less likely (1.2 is much).")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same texts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class Format(StrEnum):
    """What a model can be exported to."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"


class Precision(StrEnum):
    """What a model computes in."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def sample(
    model: ModelFolder,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The text to continue; empty starts a new one; may be repeated."),
    ] = None,
    n_samples: Annotated[int, typer.Option("--n-samples", "-n", help="How many texts a prompt.")] = 1,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from a model folder. With --json a line for each prompt."""
    from fusedgpt.model.folder import load_folder
    from fusedgpt.model.generate import sample_batch
    from fusedgpt.train.loop.precision import resolve_device
    from fusedgpt.train.report.terminal import TerminalWriter

    gpt, tokenizer = load_folder(model)
    prompts = prompt or [""]
    writer = TerminalWriter(sys.stdout) if len(prompts) * n_samples == 1 and not as_json else None
    sampling = _sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    begun = False

    def tell(text: str) -> None:  # the prompt only once settings and prompt have proved usable
        nonlocal begun
        if writer is not None:
            writer.write(text if begun else prompts[0] + text)
        begun = True

    texts = sample_batch(
        gpt.to(resolve_device(device)).for_sampling(),
        tokenizer,
        prompts,
        n_samples=n_samples,
        stop=stop or (),
        on_text=tell,
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
    model: ModelFolder,
    user: Annotated[str, typer.Option(help="What stands before your lines in the training text.")] = "",
    reply: Annotated[str, typer.Option(help="What stands before the model's.")] = "",
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.1,
    stop: Stop = None,
    seed: Seed = 0,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Talk with a model: it goes on with what was said. Ctrl-C ends a reply, Ctrl-D the chat.

    /forget begins anew. The model sees at most its last half window of the conversation.
    """
    from fusedgpt.model.folder import load_folder
    from fusedgpt.train.loop.precision import resolve_device
    from fusedgpt.train.report.terminal import TerminalWriter, read_line, read_lines_from
    from fusedgpt.train.tools.chat import Chat, converse

    gpt, tokenizer = load_folder(model)
    sampling = _sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    gpt = gpt.to(resolve_device(device)).for_sampling()
    talk = Chat(gpt, tokenizer, user=user, reply=reply, stop=stop or (), **sampling)
    if not sys.stdin.isatty():
        converse(talk, read_lines_from(sys.stdin), TerminalWriter(sys.stdout))
        return
    import readline  # noqa: F401 - importing it gives input() line editing and history

    converse(talk, read_line, TerminalWriter(sys.stdout))
    typer.echo()


def _sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
) -> "Sampling":
    """The settings of `generate`. Raises ValueError for one that is out of range."""
    from fusedgpt.model.generate import Sampling, check_settings

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    check_settings(max_new_tokens, temperature, top_k or None, top_p, repetition_penalty)
    return sampling


def eval_model(
    model: ModelFolder,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text, .jsonl, .parquet, folders of them, - for standard input; or a token set, whose "
            "held-out part counts; may be repeated."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which a window moves on (default: half of it).")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of context (default: what training has seen).")
    ] = None,
    text_field: TextField = "text",
    errors: Errors = DecodingErrors.STRICT,
    precision: Annotated[Precision, typer.Option(help="What to compute in.")] = Precision.FP32,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Loss, perplexity and bits per byte of a model on a text, every token weighed the same."""
    from fusedgpt.model.folder import load_folder
    from fusedgpt.train.data.text.sources import Source
    from fusedgpt.train.data.tokens.mixes import is_prepared, open_held_out
    from fusedgpt.train.loop.precision import resolve_device, resolve_precision, set_precision
    from fusedgpt.train.tools.evaluate import evaluate_text, evaluate_tokens

    if not data:
        raise ConfigError("say what to evaluate on: --data FILE_OR_FOLDER")
    gpt, tokenizer = load_folder(model)
    where = resolve_device(device)
    set_precision(gpt.to(where), resolve_precision(precision.value, where))
    with progress_bar("evaluating", quiet=quiet) as show:
        options: dict[str, Any] = {"window": window, "stride": stride}
        if not any(map(is_prepared, data)):
            source = Source(
                inputs=tuple(data), text_field=text_field, errors=errors.value, cut=tokenizer.safe_cut
            )
            result = evaluate_text(gpt, tokenizer, _counted(source, show), **options)
        elif all(map(is_prepared, data)):
            streams = [open_held_out(path, tokenizer) for path in data]
            total = sum(map(len, streams))
            result = evaluate_tokens(
                gpt, tokenizer, streams, report=lambda done: show(done, total), **options
            )
        else:
            raise ConfigError("evaluate on text and on token sets one after the other, not at once")
    if as_json:
        print_json({"model_path": str(model), "data": list(map(str, data)), **asdict(result)})
        return
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits a byte"
    typer.echo(f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}{bits}")
    typer.echo(
        f"{result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} documents; "
        f"window {result.window}, stride {result.stride}; {result.tokens / result.seconds:,.0f} tok/s"
    )


def _counted(source: "Source", show: Callable[[int, int], None]) -> "Source":
    """`source`, which shows how much of it was read."""
    total, read = source.size, 0

    def count(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes
        show(read, max(total, read))

    return replace(source, on_bytes=count)


def export(
    model: ModelFolder,
    to: Annotated[Format, typer.Option("--to", help="gguf is for llama.cpp and Ollama.")],
    out: Annotated[Path, typer.Option(help="The file (GGUF) or folder (safetensors) to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="GGUF: f32, f16 (default) or q8_0; safetensors: bf16, fp16 or fp32 (default)."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model for other tools: whole or not at all. For GGUF, Ollama's Modelfile is printed."""
    from fusedgpt.model import export as exports
    from fusedgpt.model.folder import load_folder

    gpt, tokenizer = load_folder(model)
    if to is Format.SAFETENSORS:
        dtype = dtype or "fp32"
        exports.export_safetensors(gpt, tokenizer, out, dtype=dtype)
        files = sorted(out.iterdir())
    else:
        dtype = dtype or "f16"
        exports.export_gguf(gpt, tokenizer, out, dtype=dtype, name=model.resolve().name)
        files = [out]
    n_bytes = sum(file.stat().st_size for file in files)
    if as_json:
        print_json({"path": str(out), "format": to.value, "dtype": dtype, "bytes": n_bytes})
        return
    sys.stderr.write(f"wrote {out}: {to.value}, {dtype}, {n_bytes / 1e6:,.1f} MB\n")
    typer.echo(
        exports.modelfile(gpt, tokenizer, out) if to is Format.GGUF else str(out), nl=to is not Format.GGUF
    )

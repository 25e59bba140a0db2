"""`fusedgpt prepare`: text of any size to a token set."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fusedgpt.train.cli.common import Debug, Errors, Json, Quiet, TextField, print_json
from fusedgpt.train.report.terminal import ShowProgress, progress_bar


def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help="Text, JSON, CSV or .parquet files, Hugging Face datasets, folders of them, or - for stdin.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="gpt2, char, byte, or the path of a tokenizer.json.", show_default="gpt2"),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="VOCAB", help="Train a BPE tokenizer with this vocabulary size on the text."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Fraction of the documents held out.")] = 0.1,
    workers: Annotated[
        int | None, typer.Option(help="Tokenizer processes.", show_default="one per core")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens per file.")] = 100_000_000,
    text_field: TextField = "text",
    errors: Errors = "strict",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tokenise text of any size into a token set, a folder that `train --data` maps into memory."""
    from fusedgpt.kernels.cpu.process import return_freed_memory
    from fusedgpt.train.data.text import prepare as prepare_

    return_freed_memory()
    if tokenizer is not None and train_tokenizer is not None:
        raise typer.BadParameter("--tokenizer and --train-tokenizer exclude each other")
    start = time.perf_counter()
    with progress_bar("reading", quiet=quiet) as show:
        index = prepare_.prepare(
            inputs,
            out,
            tokenizer=tokenizer or "gpt2",
            vocab_size=train_tokenizer,
            val_fraction=val_fraction,
            workers=workers,
            shard_tokens=shard_tokens,
            text_field=text_field,
            errors=errors,
            report=_with_speed(show),
            note=lambda text: typer.echo(text, err=True),
        )
    seconds = time.perf_counter() - start
    tokens = index.train.tokens + index.val.tokens
    if as_json:
        print_json(
            {
                "path": str(out),
                "tokenizer": index.tokenizer,
                "vocab_size": index.vocab_size,
                "train_tokens": index.train.tokens,
                "val_tokens": index.val.tokens,
                "train_documents": index.train.documents,
                "val_documents": index.val.documents,
                "text_bytes": index.text_bytes,
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
        )
        return
    plural = "s" * (index.train.documents != 1)
    typer.echo(
        f"{index.train.tokens:,} training tokens in {index.train.documents:,} document{plural}, "
        f"{index.val.tokens:,} validation tokens in {index.val.documents:,}; "
        f"vocabulary {index.vocab_size:,}; {seconds:.1f} s, {tokens / seconds:,.0f} tok/s"
    )
    typer.echo(f"token set: {out}")


def _with_speed(show: ShowProgress) -> Callable[[str, int, int, int], None]:
    """`show` for prepare's reports (phase, done, total, tokens so far), with the tokens per second."""
    started: dict[str, float] = {}

    def report(phase: str, done: int, total: int, tokens: int) -> None:
        seconds = time.monotonic() - started.setdefault(phase, time.monotonic())
        speed = f", {tokens:,} tokens, {tokens / max(seconds, 1e-3):,.0f} tok/s" if tokens else ""
        show(done, total, phase + speed)

    return report

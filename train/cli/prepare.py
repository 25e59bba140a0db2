"""`fusedgpt prepare`: text of any size to a token set."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fusedgpt.train.cli.common import Debug, DecodingErrors, Errors, Json, Quiet, TextField, print_json

_SECONDS_BETWEEN_REDRAWS = 0.1  # on a terminal
_SECONDS_BETWEEN_LINES = 10.0  # where standard error is no terminal


def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="Text, .jsonl, .parquet, saved Hugging Face datasets, folders of them; - is standard input.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="gpt2, char, byte, or the path of a tokenizer.json (default: gpt2)."),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="VOCAB", help="Train a byte-pair tokenizer of that many ids on the text."),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the text held out.")] = 0.1,
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenise (default: a core each).")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens a file.")] = 100_000_000,
    text_field: TextField = "text",
    errors: Errors = DecodingErrors.STRICT,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tokenise text, of any size, into a folder that `train --data` maps into memory."""
    from fusedgpt.train.data.text import prepare as prepare_
    from fusedgpt.train.data.text.encode import return_freed_memory

    return_freed_memory()
    if tokenizer is not None and train_tokenizer is not None:
        raise typer.BadParameter("--tokenizer and --train-tokenizer exclude each other")
    start = time.perf_counter()
    with _progress(quiet) as report:
        index = prepare_.prepare(
            inputs,
            out,
            tokenizer=tokenizer or "gpt2",
            vocab_size=train_tokenizer,
            val_fraction=val_fraction,
            workers=workers,
            shard_tokens=shard_tokens,
            text_field=text_field,
            errors=errors.value,
            report=report,
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
    typer.echo(
        f"{index.train.tokens:,} training tokens in {index.train.documents:,} documents, "
        f"{index.val.tokens:,} validation tokens in {index.val.documents:,}; "
        f"vocabulary {index.vocab_size:,}; {seconds:.1f} s, {tokens / seconds:,.0f} tok/s"
    )
    typer.echo(f"token set: {out}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int, int], None]]:
    """A bar on standard error where that is a terminal, a line now and then where it is not."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # no thread that draws: workers are forked, and would have its locks as they were at that moment
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task("reading")
        interval = _SECONDS_BETWEEN_REDRAWS if console.is_terminal else _SECONDS_BETWEEN_LINES
        begun: dict[str, float] = {}
        last = time.monotonic()

        def report(title: str, done: int, total: int, tokens: int) -> None:
            nonlocal last
            now = time.monotonic()
            seconds = now - begun.setdefault(title, now)
            if now - last < interval:
                return
            last = now
            speed = f", {tokens:,} tokens, {tokens / max(seconds, 1e-3):,.0f} tok/s" if tokens else ""
            bar.update(task, description=title + speed, completed=done, total=total or None, refresh=True)
            if not quiet and not console.is_terminal:
                share = f" {min(done / total, 1):.0%}" if total else ""
                sys.stderr.write(f"{title}{share}{speed}\n")

        yield report

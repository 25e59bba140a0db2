"""sample, chat, eval and export as a user meets them: processes, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import FUSEDGPT, Run, process

from fusedgpt.model import generate
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.folder import load_folder, save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer
from fusedgpt.model.tokenizer_json import CustomTokenizer
from fusedgpt.train.cli import main as cli
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.data.tokens.shards import read_index
from fusedgpt.train.tools import chat


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model folders m (bytes) and chars, book.txt and what cannot be read."""
    root = tmp_path_factory.mktemp("cli_model")
    for name, tokenizer in (("m", byte_tokenizer()), ("chars", char_tokenizer("abc"))):
        config = GPTConfig(
            vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32, dropout=0.0
        )
        save_folder(GPT(config, seed=1), tokenizer, root, name)
    (root / "book.txt").write_text("The cat sat on the mat. Today it rained. " * 20)
    prepare([root / "book.txt"], root / "set", tokenizer="byte")
    prepare([root / "book.txt"], root / "all", tokenizer="byte", val_fraction=0.0)
    (root / "bin").mkdir()
    (root / "bin" / "val.bin").write_bytes(np.arange(9, dtype="<u2").tobytes())
    (root / "blank.txt").write_text(" \n")
    (root / "binary.txt").write_bytes(b"a\0b")
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "lines.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (root / "none").mkdir()
    return root


def test_sample_takes_prompts_in_a_batch(fusedgpt: Run, root: Path) -> None:
    arguments = [
        "sample",
        root / "m",
        "--prompt",
        "The",
        "--prompt",
        "料",
        "-n",
        "2",
        "--max-new-tokens",
        "9",
    ]
    rows = [json.loads(line) for line in fusedgpt(*arguments, "--json").stdout.splitlines()]
    assert [(row["prompt"], len(row["samples"])) for row in rows] == [("The", 2), ("料", 2)]
    assert all(text.startswith(row["prompt"]) for row in rows for text in row["samples"])
    assert fusedgpt(*arguments).stdout.count("---\n") == 3


@pytest.mark.parametrize(("command", "penalty"), [("sample", "1.0"), ("chat", "1.1")])
def test_help_shows_the_commands_own_default(fusedgpt: Run, command: str, penalty: str) -> None:
    text = " ".join(fusedgpt(command, "--help").stdout.replace("│", "").split())
    assert f"less likely to recur. [default: {penalty}]" in text
    assert text.index("Options") < text.index("Sampling") < text.index("--temperature")


def test_sample_streams_what_json_says(fusedgpt: Run, root: Path) -> None:
    arguments = ["sample", root / "m", "--prompt", "The", "--temperature", "0", "--top-k", "0"]
    text = json.loads(fusedgpt(*arguments, "--json").stdout)["samples"][0]
    assert fusedgpt(*arguments).stdout == "".join(c for c in text if c.isprintable() or c in "\n\t") + "\n"
    stop = text[20:23]
    cut = fusedgpt(*arguments, "--stop", stop, "--json").stdout
    assert json.loads(cut)["samples"] == [text[: text.index(stop, 3)]]
    assert fusedgpt(*arguments, "--max-new-tokens", "0").stdout == "The\n"
    penalised = fusedgpt(*arguments, "--repetition-penalty", "1.9", "--json").stdout
    assert json.loads(penalised)["samples"] != [text]


@pytest.fixture(scope="module")
def chat_model(root: Path) -> Path:
    """A folder of bytes and <|im_start|>, <|im_end|>, of which the last ends a text."""
    definition = byte_tokenizer().definition()
    eot = definition["added_tokens"][0]
    definition["added_tokens"] += [
        eot | {"id": i, "content": f"<|im_{k}|>"} for i, k in ((257, "start"), (258, "end"))
    ]
    config = GPTConfig(vocab_size=259, block_size=64, n_layer=1, n_head=2, n_embd=32)
    gpt = GPT(config, seed=1)
    with torch.no_grad():  # it always says <|im_end|>
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.fill_(1.0)
        gpt.wte.weight[258] = 1.0
    return save_folder(gpt, CustomTokenizer(definition, ["<|im_end|>"]), root, "chat")


def test_sample_ends_at_the_folders_own_end_of_text(fusedgpt: Run, chat_model: Path) -> None:
    assert fusedgpt("sample", chat_model, "--prompt", "Hi").stdout == "Hi\n"


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_special_tokens_in_a_prompt(
    fusedgpt: Run, chat_model: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def continue_ids(model: GPT, tokenizer: Tokenizer, rows: list[list[int]], **_: Any) -> list[str]:
        seen.extend(rows)
        return [""]

    monkeypatch.setattr(generate, "continue_ids", continue_ids)
    monkeypatch.setattr(chat, "continue_ids", continue_ids)
    prompt = "<|im_start|>user\n"
    arguments = [command, chat_model, "--prompt" if command == "sample" else "--user", prompt]
    plain = fusedgpt(*arguments, input="Hi\n")
    assert plain.stderr == "<|im_start|> in a prompt is ordinary text without --special-tokens\n"
    special = fusedgpt(*arguments, "--special-tokens", input="Hi\n")
    assert (special.stderr, special.returncode) == ("", 0)
    assert [257 in row for row in seen] == [False, True]
    assert fusedgpt(command, chat_model, input="Hi\n").stderr == ""


def test_a_run_stands_for_the_model_folder_it_wrote(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (run / "config.toml").touch()
    (run / "run.json").write_text('{"command": "train"}')
    for path in (run, checkpoint):
        done = fusedgpt("sample", path)
        remedy = f"`fusedgpt train --resume {run}` finishes the run and writes one"
        assert (done.returncode, done.stderr) == (1, f"fusedgpt: {path} is no model folder: {remedy}\n")
    model = root / "m"
    (run / "run.json").write_text(json.dumps({"command": "train", "result": {"model_path": str(model)}}))
    arguments = ("--prompt", "The", "--max-new-tokens", "3")
    assert fusedgpt("sample", run, *arguments).stdout == fusedgpt("sample", model, *arguments).stdout != ""
    done = fusedgpt("sample", checkpoint)
    assert done.stderr == f"fusedgpt: {checkpoint} is no model folder: its run wrote {model}\n"
    (run / "run.json").write_text(json.dumps({"command": "train", "result": {"model_path": "gone"}}))
    assert "gone is no model folder" in fusedgpt("sample", run).stderr


def test_eval_prints_what_the_api_gives(fusedgpt: Run, root: Path) -> None:
    done = fusedgpt("eval", root / "m", "--data", root / "book.txt", "--stride", "7", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["stride"], result["window"], result["tokens"], result["documents"]) == (7, 32, 820, 1)
    assert result["loss"] == pytest.approx(5.55, abs=0.1)  # ln 257: it has learned nothing
    plain = fusedgpt("eval", root / "m", "--data", root / "book.txt", "--stride", "7").stdout
    assert f"loss {result['loss']:.4f} nats per token" in plain
    assert f"{result['bits_per_byte']:.4f} bits per byte" in plain


def test_eval_takes_what_a_token_set_holds_out(fusedgpt: Run, root: Path) -> None:
    done = fusedgpt("eval", root / "m", "--data", root / "set", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    held_out = read_index(root / "set").val.tokens
    assert result["tokens"] == held_out - 1 > 20  # all but the end-of-text
    bin_file = fusedgpt("eval", root / "m", "--data", root / "bin" / "val.bin", "--json")
    assert json.loads(bin_file.stdout)["tokens"] == 9, bin_file.stderr


def test_eval_may_replace_what_is_no_utf8(fusedgpt: Run, root: Path) -> None:
    done = fusedgpt("eval", root / "m", "--data", root / "latin.txt", "--errors", "ignore", "--json")
    assert json.loads(done.stdout)["tokens"] == len((root / "latin.txt").read_bytes()) - 1, done.stderr


def test_eval_reads_standard_input(root: Path) -> None:
    done = process("eval", root / "m", "--data", "-", "--json", input="The cat")
    assert json.loads(done.stdout)["tokens"] == 7, done.stderr


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_export_safetensors_is_a_model_folder(fusedgpt: Run, root: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    done = fusedgpt("export", root / "m", "--to", "safetensors", "--dtype", dtype, "--out", out, "--json")
    result = json.loads(done.stdout)
    assert (result["dtype"], result["bytes"]) == (dtype, sum(f.stat().st_size for f in out.iterdir()))
    assert load_folder(out)[0].config == load_folder(root / "m")[0].config


def test_export_gguf_prints_a_modelfile(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = fusedgpt("export", root / "m", "--to", "gguf", "--out", out)
    assert done.stdout.startswith(f"FROM {out}\n"), done.stderr
    assert done.stderr == f"wrote {out}: gguf, f16, {out.stat().st_size / 1e6:,.1f} MB\n"
    assert out.stat().st_mode & 0o777 == 0o644


def test_chat_does_without_readline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setitem(sys.modules, "readline", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["chat", str(root / "m")])
    assert not end.value.code


def test_chat_through_a_pipe(root: Path) -> None:
    done = process("chat", root / "m", "--max-new-tokens", "5", input="hello\n/reset\nyou")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") >= 2


@pytest.mark.parametrize("end", [b"\x04", b"\x03"])
def test_chat_on_a_terminal_ends_cleanly(root: Path, end: bytes) -> None:
    """Ctrl-D, and Ctrl-C, at the prompt."""
    ours, theirs = pty.openpty()
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    # A new session's leader that opens a terminal has it as its own: Ctrl-C becomes SIGINT.
    script = 'exec "$0" chat "$1" --max-new-tokens 5 <"$2" >"$2"'
    command = ["sh", "-c", script, FUSEDGPT, root / "m", os.ttyname(theirs)]
    with subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, preexec_fn=heed
    ) as process:
        said = b"\r\n"
        deadline = time.monotonic() + 120
        try:
            for given in (b"hello\r", end):
                while not said.endswith(b"\r\n> "):  # a prompt, not the echo of what was typed at one
                    assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], said
                    said += os.read(ours, 4096)
                os.write(ours, given)
                said = b""
            while process.poll() is None:  # input() misses a Ctrl-C that comes just before it reads: again
                assert time.monotonic() < deadline
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                    break
                os.write(ours, end)
            assert process.returncode == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("sample {root}/m --repetition-penalty 0", 2, "--repetition-penalty: expected more than 0, got 0.0"),
        ("sample {root}/m --stop=", 1, "stop: an empty string would end every text at once"),
        ("sample {root}/chars --prompt z", 1, "the character 'z' (U+007A) is not in this vocabulary"),
        ("sample {root}/m -n 0", 2, "--n-samples: expected 1 or more, got 0"),
        ("chat {root}/m --temperature -1", 2, "--temperature: expected 0 or more, got -1.0"),
        ("chat {root}/none", 1, "is no model folder"),
        ("eval {root}/m", 2, "Missing option '--data'"),
        ("eval {root}/m --data {root}/book.txt --precision fp8", 2, "'fp8' is not one of 'auto', 'bf16', "),
        ("sample {root}/m --temperature hot", 2, "Invalid value for '--temperature'"),
        ("eval {root}/none --data {root}/book.txt", 1, "is no model folder"),
        ("eval {root}/m --data {root}/absent", 1, "there is no file or folder {root}/absent"),
        ("eval {root}/m --data {root}/none", 1, "{root}/none holds no .txt"),
        ("eval {root}/m --data {root}/blank.txt", 1, "there is no text to evaluate"),
        ("eval {root}/m --data {root}/set --data {root}/book.txt", 2, "cannot be evaluated together"),
        ("eval {root}/chars --data {root}/set", 1, "{root}/set was made with another tokenizer"),
        ("eval {root}/m --data {root}/all", 1, "{root}/all holds nothing out"),
        ("eval {root}/m --data {root}/none.bin", 1, "none.bin"),
        ("eval {root}/m --data {root}/binary.txt", 1, "binary.txt is a binary file"),
        ("eval {root}/m --data {root}/latin.txt", 1, "latin.txt is not UTF-8 text (byte 3)"),
        ("eval {root}/m --data {root}/lines.jsonl", 1, "lines.jsonl"),
        ("eval {root}/m --data {root}/book.txt --stride 33", 2, "--stride: expected 1 to the window of 32"),
        ("eval {root}/chars --data {root}/book.txt", 1, "the character 'T'"),
        ("export {root}/m --to gguf --out {root}/book.txt", 1, "book.txt exists: remove it, or choose"),
        ("export {root}/m --to safetensors --out {root}/m", 1, "/m exists: remove it, or choose another"),
        (
            "export {root}/m --to gguf --out {root}/x --dtype bf16",
            1,
            "no dtype 'bf16' for GGUF; there are f32",
        ),
        ("export {root}/chars --to gguf --out {root}/x", 1, "no form of this char tokenizer"),
        ("export {root}/m --to gguf --out /proc/x", 1, "choose another --out"),
        ("export {root}/none --to gguf --out {root}/x", 1, "is no model folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    fusedgpt: Run, root: Path, arguments: str, code: int, message: str
) -> None:
    before = sorted(root.rglob("*"))
    done = fusedgpt(*arguments.format(root=root).split(), input="")
    assert done.returncode == code, done.stderr
    assert message.format(root=root) in done.stderr
    assert (done.stderr.startswith("fusedgpt: "), done.stderr.count("\n")) == (True, 1)
    assert done.stdout == ""
    assert sorted(root.rglob("*")) == before

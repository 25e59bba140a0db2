"""`data generate` and `data refine`: JSONL in and out, one-line errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from ollama_fake import Fake
from typer.testing import CliRunner, Result

from fusedgpt.train.cli.data import Domain, data
from fusedgpt.train.data.synthetic.grammar import DOMAINS
from fusedgpt.train.data.synthetic.jsonl import read_objects
from fusedgpt.train.data.synthetic.llm_config import LLMConfig

QUICK = ["--timeout-connect", "1", "--timeout-generation", "1", "--timeout-interval", "0.01"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


def ollama(fake: Fake) -> list[str]:
    return ["--data-source", "ollama", "--llm-host", fake.url, "--gen-model", "writer", *QUICK]


def texts_in(path: Path) -> list[str]:
    return [record["text"] for record in read_objects(path)]


def test_templates_and_heuristics(tmp_path: Path) -> None:
    raw, kept = tmp_path / "raw.jsonl", tmp_path / "kept.jsonl"
    done = run("generate", "poems about the sea", "--output", raw, "--tokens", "2000", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["path"], result["method"]) == (str(raw), "template")
    assert result["samples"] == len(texts_in(raw))
    done = run("refine", raw, "--output", kept, "--prompt", "poems", "--tokens", "800", "--json", "--quiet")
    result = json.loads(done.stdout)
    assert result["samples"] == result["kept"] == len(texts_in(kept))
    assert set(texts_in(kept)) < set(texts_in(raw))
    assert {file.name for file in tmp_path.iterdir()} == {"raw.jsonl", "kept.jsonl"}


def test_a_model_writes_and_grades_and_goes_on(tmp_path: Path) -> None:
    raw, kept = tmp_path / "raw.jsonl", tmp_path / "kept.jsonl"
    with Fake() as fake:
        done = run("generate", "poems", "--output", raw, "--tokens", "700", *ollama(fake))
        assert done.exit_code == 0, done.output
        before = texts_in(raw)
        done = run("generate", "poems", "--output", raw, "--tokens", "1400", *ollama(fake))
        assert texts_in(raw)[: len(before)] == before
        assert done.stdout == f"{len(texts_in(raw))} texts: {raw}\n"
        assert "already" in done.stderr
        done = run("refine", raw, "--output", kept, "--tokens", "500", "--json", *ollama(fake))
        assert json.loads(done.stdout)["grades"] == {"by the model": len(texts_in(raw))}
        assert len(texts_in(tmp_path / "kept.jsonl")) > 5
    assert (tmp_path / "kept.grades.jsonl").is_file()


def test_the_fallback_leaves_the_models_texts_apart(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    with Fake(fault=lambda path, number: "500" if number > 6 else None) as fake:
        options = [*ollama(fake), "--fallback", "templates", "--json"]
        done = run("generate", "poems", "--output", raw, "--tokens", "3000", *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["path"] == str(tmp_path / "raw.filled.jsonl")
    both = texts_in(tmp_path / "raw.filled.jsonl")
    assert both[: len(texts_in(raw))] == texts_in(raw)
    assert len(both) == len(texts_in(raw)) + result["fallback"]["samples"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "generate x --output {tmp}/exists.jsonl",
            "exists.jsonl exists; remove it, or choose another --output",
        ),
        ("generate x --output {tmp}/o.jsonl --llm-concurrency 0", "--llm-concurrency: should be greater"),
        (
            "generate x --output {tmp}/o.jsonl --llm-host ftp://x",
            "llm_host 'ftp://x' is not an http:// or https://",
        ),
        (
            "generate x --output {tmp}/o.jsonl --data-source ollama {dead}",
            "no Ollama server answers at http://127",
        ),
        ("refine {tmp}/absent.jsonl --output {tmp}/o.jsonl", "there is no file {tmp}/absent.jsonl"),
        ("refine {tmp}/exists.jsonl --output {tmp}/exists.jsonl", "exists; remove it"),
        ("generate x --output {tmp}/o.jsonl --gen-model a", "gen_model is given, but no model is used"),
        (
            "refine {tmp}/exists.jsonl --output {tmp}/o.jsonl",
            "no text is good enough to be kept: kept 0 of 1",
        ),
        ("refine {tmp}/empty.jsonl --output {tmp}/o.jsonl", "empty.jsonl holds no texts"),
        ("refine {tmp}/binary.jsonl --output {tmp}/o.jsonl", "binary.jsonl, line 1: expected a JSON object"),
        ("refine {tmp}/bad.jsonl --output {tmp}/o.jsonl", "bad.jsonl, line 2: expected a JSON object"),
        (
            "refine {tmp}/other.jsonl --output {tmp}/o.jsonl",
            'other.jsonl, line 1: every line needs a "text"; this has only',
        ),
    ],
)
def test_errors(tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "exists.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nb\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    names: dict[str, Any] = {"tmp": tmp_path, "dead": "--llm-host http://127.0.0.1:9 --gen-model a"}
    done = run(*arguments.format(**names).split())
    assert done.exit_code == 1
    assert isinstance(done.exception, (ValueError, OSError))
    assert message.format(**names) in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "o.jsonl").exists()


def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(tmp_path: Path) -> None:
    raw, kept = tmp_path / "raw.jsonl", tmp_path / "kept.jsonl"

    def interrupted(arguments: list[str | Path], growing: Path) -> str:
        """Standard error of a command that got SIGINT once the file `growing` had five lines."""
        command = [Path(sys.executable).with_name("fusedgpt"), "data", *arguments]
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by tests in the background
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
            while not growing.exists() or growing.read_bytes().count(b"\n") < 5:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert errors.endswith("fusedgpt: interrupted\n")
        return errors

    with Fake(delay=0.1) as fake:
        server = [*ollama(fake), "--llm-concurrency", "2"]
        writing = ["generate", "poems", "--output", raw, "--tokens", "1400", *server]
        assert re.match(
            r"\d+ samples .* are kept in .*; run the same command to continue", interrupted(writing, raw)
        )
        before = texts_in(raw)
        assert run(*writing).exit_code == 0
        assert texts_in(raw)[: len(before)] == before
        grading = ["refine", raw, "--output", kept, "--tokens", "500", *server]
        assert "grades so far are kept" in interrupted(grading, tmp_path / "kept.grades.jsonl")
        grades = json.loads(run(*grading, "--json").stdout)["grades"]
    assert grades["from the cache"] >= 5
    assert sum(grades.values()) == len(texts_in(raw))


@pytest.mark.parametrize(
    ("option", "choices"),
    [("--domain sport", "'cooking', 'poetry', "), ("--data-source claude", "'template', 'ollama', 'openai'")],
)
def test_a_choice_that_there_is_not(tmp_path: Path, option: str, choices: str) -> None:
    done = run("generate", "x", "--output", tmp_path / "o.jsonl", *option.split())
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert choices in " ".join(done.output.replace("│", "").split())


def test_every_domain_may_be_chosen() -> None:
    assert get_args(Domain) == DOMAINS


@pytest.mark.parametrize("command", ["generate", "refine"])
def test_every_option_has_a_flag(command: str) -> None:
    text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(data, [command, "--help"]).output
    assert all(f"--{name.replace('_', '-')}" in text for name in LLMConfig.model_fields)

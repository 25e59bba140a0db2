"""The menu: keys go in, a command line comes out that the command line takes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import FUSEDGPT, Run
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.cli import menu
from fusedgpt.train.data.synthetic import llm
from fusedgpt.train.data.synthetic.grammar import unknown_words

ENTER, DOWN, CTRL_C = "\r", "\x1b[B", "\x03"
Press = Callable[..., list[str] | None]


@pytest.fixture
def press(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Press]:
    """menu.choose with these keys pressed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(menu, "_estimates", lambda: {"3M": 2.4, "12M": 7.0, "33M": None})
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def choose(*pressed: str) -> list[str] | None:
            keys.send_text("".join(pressed))
            return menu.choose()

        yield choose


def test_create_asks_for_prompt_size_source_and_epochs(
    press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    assert press(ENTER, DOWN, ENTER, ENTER, ENTER, ENTER) == [
        "create",
        "Vegan recipes for every day",
        "--size",
        "3M",
    ]
    assert capsys.readouterr().out == "$ fusedgpt create 'Vegan recipes for every day' --size 3M\n"
    up = "\x1b[A"
    own = press(ENTER, up, ENTER, "Odes to tea", ENTER, DOWN, ENTER, ENTER, "\x7f3", ENTER)
    assert own == ["create", "Odes to tea", "--size", "12M", "--epochs", "3"]
    server = press(ENTER, ENTER, ENTER, up, ENTER, ENTER, "gpt-4.1-mini", ENTER, ENTER)
    assert server is not None
    assert server[4:] == [
        "--data-source",
        "openai",
        "--llm-host",
        "https://api.openai.com",
        "--gen-model",
        "gpt-4.1-mini",
    ]


def test_ollamas_models_are_listed_or_it_says_what_is_missing(
    press: Press, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llm, "installed_models", lambda: ["llama3.2", "qwen3:8b"])
    chosen = press(ENTER, ENTER, ENTER, DOWN, ENTER, DOWN, ENTER, ENTER)
    assert chosen is not None
    assert chosen[4:] == ["--data-source", "ollama", "--gen-model", "qwen3:8b"]
    monkeypatch.setattr(llm, "installed_models", list)
    assert press(ENTER, ENTER, ENTER, DOWN, ENTER) is None
    assert "ollama pull llama3.2" in capsys.readouterr().err

    def nobody() -> list[str]:
        raise InputError("no Ollama server answers")

    monkeypatch.setattr(llm, "installed_models", nobody)
    assert press(ENTER, ENTER, ENTER, DOWN, ENTER) is None
    assert "no Ollama server answers" in capsys.readouterr().err


def test_the_others_need_a_file_or_a_model(
    press: Press, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert press(DOWN * 2, ENTER) is None
    assert "models/ holds no model yet" in capsys.readouterr().err
    (tmp_path / "book.txt").touch()
    assert press(DOWN, ENTER, "book.txt", ENTER, ENTER) == ["train", "book.txt", "--size", "12M"]
    folder = tmp_path / "models" / "sea"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    shape = '"vocab_size": 300, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 8'
    (folder / "config.json").write_text("{" + shape + ', "model_type": "gpt2"}')
    assert press(DOWN * 2, ENTER, ENTER, "The", ENTER) == ["sample", "models/sea", "The"]
    assert press(DOWN * 3, ENTER, ENTER) == ["chat", "models/sea"]
    assert press(DOWN * 4, ENTER) == ["list"]
    assert press(DOWN * 5, ENTER) == ["doctor"]


@pytest.mark.parametrize("before", [(), (ENTER,), (ENTER, ENTER), (ENTER, ENTER, ENTER), (DOWN, ENTER)])
def test_ctrl_c_leaves_anywhere(press: Press, before: tuple[str, ...]) -> None:
    assert press(*before, CTRL_C) is None


def test_named_prompts_are_known_to_the_templates(fusedgpt: Run) -> None:
    assert len(menu.PROMPTS) == 16
    for prompt in menu.PROMPTS.values():
        assert not unknown_words(prompt), prompt
    estimates = menu._estimates()
    assert all(x is None for x in estimates.values()) or sorted(estimates.values()) == [*estimates.values()]  # type: ignore[type-var]


def test_only_a_terminal_has_a_menu(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([FUSEDGPT], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path) as process:
        said = b""
        while b"Show what this machine has" not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"\x03")
        while b"Cancelled" not in said:
            said += os.read(ours, 4096)
        assert process.wait(timeout=60) == 130
    assert re.search(rb"What shall we do\?", said)

"""A conversation: what the model sees, what it forgets, how it ends, what reaches the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import byte_tokenizer, char_tokenizer
from fusedgpt.train.report.terminal import TerminalWriter, printable, typed_lines
from fusedgpt.train.tools.chat import Chat, converse

EOT = 256


@dataclass
class Script:
    """In place of `generate`: what the model says, reply by reply, and what it was given."""

    replies: list[bytes]
    prompts: list[list[int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    interrupt_after: int = 1000

    def __call__(self, _: GPT, prompt: torch.Tensor, **settings: Any) -> Iterator[torch.Tensor]:
        self.prompts.append(prompt[0].tolist())
        self.seeds.append(settings["seed"])
        for number, byte in enumerate(self.replies.pop(0)):
            if number == self.interrupt_after:
                raise KeyboardInterrupt
            yield torch.tensor([byte])


@pytest.fixture
def gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16), seed=1).eval()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script([])
    monkeypatch.setattr("fusedgpt.model.generate.generate", script)
    return script


def shown(chat: Chat, lines: list[str]) -> str:
    stream = io.StringIO()
    converse(chat, lines, TerminalWriter(stream))
    return stream.getvalue()


def test_the_history_is_what_was_said(gpt: GPT, script: Script) -> None:
    script.replies = [b"one", b"two"]
    chat = Chat(gpt, byte_tokenizer(), seed=5)
    assert shown(chat, ["a", "b"]) == "one\ntwo\n"
    assert script.prompts == [[EOT, *b"a\n"], [EOT, *b"a\none\nb\n"]]
    assert script.seeds == [5, 6]


def test_prefixes_are_put_and_end_a_reply(gpt: GPT, script: Script) -> None:
    script.replies = [b" hi\nQ: more?", b"x"]
    chat = Chat(gpt, byte_tokenizer(), user="Q:", reply="A:", seed=0)
    assert shown(chat, [" a", "b"]) == " hi\n\nx\n"
    assert script.prompts[1] == [EOT, *b"Q: a\nA: hi\nQ:b\nA:"]


def test_the_oldest_is_forgotten_and_half_a_window_left_for_the_reply(gpt: GPT, script: Script) -> None:
    script.replies = [b"r" * 50] * 3
    chat = Chat(gpt, byte_tokenizer(), seed=0)
    shown(chat, ["abc", "def", "g" * 100])
    assert script.prompts[1] == [*b"r" * 27, *b"\ndef\n"]
    assert script.prompts[2] == [*b"g" * 31, *b"\n"]


def test_reset_begins_anew(gpt: GPT, script: Script) -> None:
    script.replies = [b"one", b"two"]
    shown(Chat(gpt, byte_tokenizer(), seed=0), ["a", "/reset", "b"])
    assert script.prompts[1] == [EOT, *b"b\n"]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/set temperature 0.7", "(temperature is 0.7)"),
        ("/set top-k 0", "(top_k is all)"),
        ("/set temperature -1", "(--temperature: expected 0 or more, got -1.0)"),
        ("/set seed many", "(seed: expected a whole number, got many)"),
        ("/set mood 1", "(no setting mood; there are temperature, top_k, seed)"),
        ("/help", "(there are /set NAME VALUE, /info and /reset; NAME is one of temperature, top_k, seed)"),
    ],
)
def test_a_slash_is_a_command(gpt: GPT, script: Script, line: str, answer: str) -> None:
    chat = Chat(gpt, byte_tokenizer(), temperature=1.0, top_k=40, seed=0)
    before = dict(chat.sampling)
    assert shown(chat, [line]) == answer + "\n"
    assert script.prompts == []
    assert (chat.sampling != before) == (line in ("/set temperature 0.7", "/set top-k 0"))


def test_info_shows_what_is_in_use(gpt: GPT, script: Script) -> None:
    script.replies = [b"one"]
    said = shown(Chat(gpt, byte_tokenizer(), temperature=1.0, seed=0), ["a", "/set temperature 0.7", "/info"])
    assert "7 of 64 tokens of context in use; temperature 0.7, seed 1)" in said


def test_an_interrupt_ends_the_reply_and_not_the_chat(gpt: GPT, script: Script) -> None:
    script.replies, script.interrupt_after = [b"one and more", b"two"], 3
    assert shown(Chat(gpt, byte_tokenizer(), seed=0), ["a", "b"]) == "one\ntwo\n"
    assert script.prompts[1] == [EOT, *b"a\none\nb\n"]


def test_what_the_vocabulary_lacks_is_said_and_the_chat_goes_on() -> None:
    tokenizer = char_tokenizer("abc\n")
    gpt = GPT(GPTConfig(vocab_size=5, block_size=16, n_layer=1, n_head=1, n_embd=8), seed=1).eval()
    chat = Chat(gpt, tokenizer, seed=0, max_new_tokens=3)
    first, *_ = shown(chat, ["z", "a"]).splitlines()
    assert "the character 'z'" in first
    assert len(chat.history) > 2


def test_an_empty_stop_is_refused(gpt: GPT) -> None:
    with pytest.raises(ValueError, match="an empty string would end"):
        Chat(gpt, byte_tokenizer(), stop=[""])


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_end_it(end: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[Any] = ["a", "", end]

    def type_in(_: str) -> str:
        line = typed.pop(0)
        if line is end:
            raise end
        return str(line)

    monkeypatch.setattr("builtins.input", type_in)
    assert list(typed_lines("> ")) == ["a", ""]


@pytest.mark.parametrize(
    "text",
    [
        "a\x1b[31mb\x1b[0m",
        "a\x1b]0;title\x07b",
        "\u202eevil\x9b2J",
        "héllo 😀\r\n\tx",
        "\x1b",
        "\x1b[",
        "a\x1b[1",
    ],
)
def test_escape_sequences_are_left_out_in_pieces_as_in_the_whole(text: str) -> None:
    stream = io.StringIO()
    writer = TerminalWriter(stream)
    for character in text:
        writer.write(character)
    writer.end()
    assert stream.getvalue() == printable(text) + "\n"
    assert not set(stream.getvalue()) & set("\x1b\x9b\x07\r\u202e")


def test_an_endless_escape_sequence_is_not_held_for_ever() -> None:
    stream = io.StringIO()
    writer = TerminalWriter(stream)
    for character in "\x1b[" + "0" * 100 + " end":
        writer.write(character)
    assert "end" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()

"""What a language model answered, cleaned, and the errors that are left where there is no answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from fusedgpt.train.report.terminal import strip_escapes

_INVISIBLE = dict.fromkeys(  # C1 controls, bidirectional overrides, byte order mark, lone surrogates
    [0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000)]
)
# The marks around the thoughts of DeepSeek-R1 and QwQ, Seed-OSS, Magistral, Kimi, Sky-T1, Command A, Gemma.
_NAME = r"(?:\w{1,20}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection)"
_OPEN = rf"(?:<{_NAME}>|(?-i:\[THINK\])|◁think▷|<\|(?:begin_of_thought|start_thinking)\|>|<\|channel>thought)"
_CLOSE = rf"(?:</{_NAME}>|(?-i:\[/THINK\])|◁/think▷|<\|(?:end_of_thought|end_thinking)\|>|<channel\|>)"
_THOUGHT = re.compile(rf"{_OPEN}.*?(?:{_CLOSE}|\Z)", re.S | re.I)
_UNOPENED_THOUGHT = re.compile(rf"\A.*{_CLOSE}", re.S | re.I)  # the chat template opens it, in the prompt
# Harmony, gpt-oss's format: its special tokens, and what is left of them if the server drops those.
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_MESSAGE_END = re.compile(r"<\|(?:end|return|start|call)\|>")
_BARE_HARMONY = re.compile(r"\Aanalysis(?=[A-Z]).*?(?:assistantfinal|\Z)", re.S)
# Thoughts without tags: the server cut the answer before it closed them, or has taken the tags away.
_THINKS_ALOUD = re.compile(
    r"\s*(?:(?:okay|ok|alright|all right|hmm|so|well|first|now)[,. ]+)*"
    r"(?:the user (?:wants|asks|asked|is asking|needs|requests?)|(?:we|i) (?:need|have) to (?:write|produce|"
    r"generate|create|come up with)|let(?:['’]s| me) (?:think|start by|break (?:this|it) down))\b",
    re.I,
)


class LLMError(OSError):
    """The server cannot be used; the message says what to do."""


class RequestFailed(LLMError):
    """All attempts of one request failed; others may succeed."""


class RequestRefused(LLMError):
    """The server does not accept what the request holds; the message has its reason."""


class Fault(Exception):
    """One attempt failed for a reason that may be transient."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer(NamedTuple):
    """What the model wrote, and whether it ended by itself rather than at a limit."""

    text: str
    ended: bool
    thoughts: bool = False  # it is nothing but thoughts, of which `text` may hold some


def plain_text(text: str) -> str:
    """`text` without control characters, escape sequences and bidirectional overrides; \\n and \\t stay."""
    text = strip_escapes(text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(c for c in text if c >= " " or c in "\n\t").translate(_INVISIBLE)


def strip_thoughts(text: str) -> str:
    """`text` without what a reasoning model thought, in tags or in harmony's channels; perhaps nothing."""
    if _CHANNEL in text:
        messages = (m.partition(_MESSAGE)[2] for m in text.split(_CHANNEL) if m.startswith("final"))
        return "".join(_MESSAGE_END.split(message, 1)[0] for message in messages)
    return _BARE_HARMONY.sub("", _UNOPENED_THOUGHT.sub("", _THOUGHT.sub("", text)))


def thinks_aloud(text: str) -> bool:
    """Whether a text begins with a model's words about its task."""
    return bool(_THINKS_ALOUD.match(text))

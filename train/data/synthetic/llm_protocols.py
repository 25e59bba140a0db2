"""The parts of Ollama's and OpenAI's APIs that fusedgpt uses, and how their texts are cleaned."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from fusedgpt.train.data.synthetic.jsonl import parse_json
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
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


# What a request can do without, and by what name some servers take it instead.
DISPENSABLE = {"seed": "", "temperature": "", "think": "", "max_tokens": "max_completion_tokens"}


class Answer(NamedTuple):
    """What the model wrote, and whether it ended by itself rather than at a limit."""

    text: str
    ended: bool


class Piece(NamedTuple):
    """A line of a stream: some text; `end`: why the answer ends, if it does."""

    text: str = ""
    end: str | None = None


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


class Ollama:
    """https://docs.ollama.com/api: newline-delimited JSON, the last object has done: true."""

    name = "Ollama"
    model_list = ("/api/tags", "models", "name")  # path, key of the list, key of a model's name

    def request(
        self, config: LLMConfig, model: str, prompt: str, seed: int, max_tokens: int, temperature: float
    ) -> tuple[str, dict[str, Any]]:
        options = {"seed": seed, "num_predict": max_tokens, "temperature": temperature}
        body = {"model": model, "prompt": prompt, "stream": True, "think": False, "options": options}
        return "/api/generate", body

    def piece(self, line: bytes) -> Piece:
        data = json_object(line)
        done = data["done_reason"] if isinstance(data.get("done_reason"), str) else "stop"
        return Piece(_string(data.get("response")), done if data.get("done") is True else None)


class OpenAI:
    """https://platform.openai.com/docs/api-reference: server-sent events, a finish_reason, then [DONE]."""

    name = "OpenAI-compatible"
    model_list = ("/v1/models", "data", "id")

    def request(
        self, config: LLMConfig, model: str, prompt: str, seed: int, max_tokens: int, temperature: float
    ) -> tuple[str, dict[str, Any]]:
        body = {"model": model, "stream": True, "seed": seed, "temperature": temperature}
        if config.llm_endpoint == "completions":
            return "/v1/completions", {**body, "prompt": prompt, "max_tokens": max_tokens}
        limit = "max_completion_tokens" if config.origin.endswith("api.openai.com") else "max_tokens"
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {**body, "messages": messages, limit: max_tokens}

    def piece(self, line: bytes) -> Piece:
        field, _, value = line.partition(b":")
        if field != b"data":
            if field in (b"", b"event", b"id", b"retry"):  # a comment, or a field the API does not use
                return Piece()
            raise Fault("bad JSON", f"expected a server-sent event, found {line[:60]!r}")
        if value.strip() == b"[DONE]":
            return Piece(end="stop")
        choices = json_object(value).get("choices")
        if not choices:
            return Piece()  # the usage statistics
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, dict):
            raise Fault("bad JSON", f"expected choices, found {value[:60]!r}")
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        end = choice.get("finish_reason")
        return Piece(_string(text), end if isinstance(end, str) else None)


def json_object(line: bytes) -> dict[str, Any]:
    """A JSON object from a server. Raises Fault if it is none, or an error message."""
    data = parse_json(line)
    if not isinstance(data, dict):
        raise Fault("bad JSON", f"expected a JSON object, found {line[:60]!r}")
    if data.get("error") or data.get("object") == "error":
        raise Fault("server error", f"the server says {error_text(line)!r}")
    return data


def _string(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise Fault("bad JSON", f"expected text, found {str(value)[:60]!r}")
    return value or ""


def error_text(body: bytes) -> str:
    """The reason in the body of an error: JSON of Ollama, OpenAI, vLLM or FastAPI, or the body itself."""
    data = parse_json(body)
    found = [data.get(key) for key in ("error", "message", "detail")] if isinstance(data, dict) else []
    reasons = [value.get("message") or value if isinstance(value, dict) else value for value in found]
    reason = next((value for value in reasons if value and value is not True), body.decode(errors="replace"))
    return plain_text(str(reason))

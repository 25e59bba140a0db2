"""A conversation in the terminal: the model continues the text so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Unpack, cast

from fusedgpt.model.generate import Sampling, check_settings, continue_ids
from fusedgpt.model.gpt import GPT
from fusedgpt.model.streaming import check_stop
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.report.terminal import TerminalWriter

_WHOLE = ("max_new_tokens", "top_k", "seed")  # settings that are whole numbers


class Chat:
    """A model and the history of a conversation with it, from which the oldest tokens are dropped.

    Each turn is user + line + newline + reply, where `user` and `reply` are prefixes that the model was
    trained on, or empty. The reply ends at end-of-text, a stop string or max_new_tokens. special_tokens:
    their names in the prefixes and lines are those tokens, not ordinary text.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        user: str = "",
        reply: str = "",
        stop: Sequence[str] = (),
        special_tokens: bool = False,
        **sampling: Unpack[Sampling],
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.encode = tokenizer.encode_special if special_tokens else tokenizer.encode
        self.user, self.reply = user, reply
        self.stop = [*stop, *([user] if user else [])]  # the model must not speak for the user
        check_stop(self.stop)
        self.history: list[int] = []

    def turn(self, line: str, on_text: Callable[[str], None]) -> str:
        """The reply to `line`, passed to on_text piece by piece; Ctrl-C ends the reply, not the chat.

        Raises ValueError for text that the tokenizer cannot encode; the history is then unchanged.
        """
        ids = self.encode(f"{self.user}{line}\n{self.reply}")
        prompt = self._within([*(self.history or [self.tokenizer.eot_id]), *ids])
        pieces: list[str] = []

        def pass_on(text: str) -> None:
            pieces.append(text)
            on_text(text)

        options: dict[str, Any] = {"stop": self.stop, "on_text": pass_on, "sampling": self.sampling}
        with suppress(KeyboardInterrupt):
            continue_ids(self.model, self.tokenizer, [prompt], **options)
        text = "".join(pieces)
        self.history = self._within([*prompt, *self._encodable(text.rstrip("\n") + "\n")])
        self.sampling["seed"] = self.sampling.get("seed", 0) + 1
        return text

    def set(self, name: str, value: str) -> str:
        """Change a setting; return what it is now. Raises ValueError for a wrong name or value."""
        name = name.replace("-", "_")
        if name not in self.sampling:
            raise ValueError(f"no setting {name}; there are {', '.join(self.sampling)}")
        try:
            number = int(value) if name in _WHOLE else float(value)
        except ValueError:
            raise ValueError(f"{name}: expected a {'whole ' * (name in _WHOLE)}number, got {value}") from None
        changed: dict[str, Any] = {**self.sampling, name: None if name == "top_k" and number == 0 else number}
        check_settings(**{key: one for key, one in changed.items() if key != "seed"})
        self.sampling = cast(Sampling, changed)
        return f"{name} is {'all' if changed[name] is None else changed[name]}"

    def _within(self, ids: list[int]) -> list[int]:
        """The last ids, leaving half the window for the reply."""
        return ids[-max(1, self.model.config.window // 2) :]

    def _encodable(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except ValueError:  # a character vocabulary may lack U+FFFD or the newline
            return []


def converse(chat: Chat, lines: Iterable[str], writer: TerminalWriter) -> None:
    """Answer each line, or obey it if it begins with a slash."""
    for line in lines:
        try:
            if line.startswith("/"):
                writer.write(_obey(chat, line))
            else:
                chat.turn(line, writer.write)
        except ValueError as error:
            writer.write(f"({error})")
        writer.end()


def _obey(chat: Chat, line: str) -> str:
    """Do what the command `line` says; return what to answer. Raises ValueError for a wrong setting."""
    match line.split():
        case ["/reset"]:
            chat.history = []
            return "(the conversation starts over)"
        case ["/info"]:
            config, sampling = chat.model.config, chat.sampling
            settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
            used = f"{len(chat.history)} of {config.window} tokens of context in use"
            return f"({config.parameter_counts()[0]:,} parameters; {used}; {settings})"
        case ["/set", name, value]:
            return f"({chat.set(name, value)})"
    return f"(there are /set NAME VALUE, /info and /reset; NAME is one of {', '.join(chat.sampling)})"

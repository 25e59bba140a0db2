"""The parts of a template. Each can write a text, and read one: find where it ends in a text that is given.

Writing draws from the alternatives; reading follows all of them at once, as a set of states, so that its time
does not grow with the number of ways to read the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from fusedgpt.train.data.synthetic.words import article, plural

_FOCUS = 0.93  # probability of choosing among the alternatives that match the prompt best
_SMALL_WORDS = ("a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with")
_DIGITS = re.compile(r"\d+")


@dataclass(eq=False, kw_only=True)
class Alternative:
    """An alternative of a rule or an inline choice, or a row of a bank."""

    fields: dict[str, list[Part]]  # the field "" is what the alternative itself writes
    tags: frozenset[str]
    words: frozenset[str]
    refs: list[Choice]
    hits: frozenset[str] = frozenset()


@dataclass(eq=False)
class Choice:
    """A rule, a bank or an inline choice; allowed and preferred follow from the prompt."""

    alternatives: list[Alternative]
    named: bool  # its alternatives are drawn without replacement in a text, until none is left
    allowed: list[Alternative] | None = None
    preferred: list[Alternative] = field(default_factory=list)
    hits: frozenset[str] = frozenset()

    def write(self, run: Run) -> str:
        return run.join(run.pick(self).fields[""])

    def read(self, reader: Reader, states: States) -> States:
        ends: States = set()
        for state in states:
            for one, picked in self.picks(state):
                ends |= reader.follow(one.fields[""], {picked})
        return ends

    def picks(self, state: State) -> Iterable[tuple[Alternative, State]]:
        """The alternatives that may be drawn next, with the state after it."""
        allowed = self.allowed or []
        if not self.named:
            return [(one, state) for one in allowed]
        fresh = [one for one in allowed if one not in state.used] or allowed
        return [(one, State(state.end, state.bound, state.used | {one})) for one in fresh]

    def steer(self, wanted: frozenset[str], excluded: frozenset[str]) -> None:
        """Drop what is excluded or cannot be completed; prefer what reaches most of the wanted tags."""
        if self.allowed is not None:
            return
        self.allowed = []
        for one in self.alternatives:
            for choice in one.refs:
                choice.steer(wanted, excluded)
            if all(choice.allowed for choice in one.refs) and not (one.tags | one.words) & excluded:
                one.hits = (one.tags & wanted).union(*(choice.hits for choice in one.refs))
                self.allowed.append(one)
        self.hits = frozenset().union(*(one.hits for one in self.allowed))
        best = max((len(one.hits) for one in self.allowed), default=0)
        self.preferred = [one for one in self.allowed if len(one.hits) == best]


class Run:
    """One text that is written: its bound rows, and the alternatives used so far."""

    def __init__(self, rng: Random) -> None:
        self.random = rng.random
        self.bound: dict[str, Alternative] = {}
        self.used: set[Alternative] = set()

    def join(self, parts: list[Part]) -> str:
        return "".join([part if isinstance(part, str) else part.write(self) for part in parts])

    def pick(self, choice: Choice) -> Alternative:
        allowed = choice.allowed or []
        pool = choice.preferred if self.random() < _FOCUS else allowed
        one = pool[int(self.random() * len(pool))]
        if choice.named:
            if one in self.used:
                fresh = [other for other in pool if other not in self.used]
                fresh = fresh or [other for other in allowed if other not in self.used] or pool
                one = fresh[int(self.random() * len(fresh))]
            self.used.add(one)
        return one


class State(NamedTuple):
    """How far a text has been read, and what it must then have drawn."""

    end: int  # characters
    bound: frozenset[tuple[str, Alternative | Choice]] = frozenset()  # a Choice: not known yet which row
    used: frozenset[Alternative] = frozenset()

    def bind(self, name: str, value: Alternative | Choice) -> State:
        others = [pair for pair in self.bound if pair[0] != name]
        return State(self.end, frozenset([*others, (name, value)]), self.used)


States = set[State]


@dataclass(frozen=True, kw_only=True)
class Furthest:
    """Where the best of the readings ended, and the texts that could have followed."""

    end: int = 0
    expected: frozenset[str] = frozenset()


class Reader:
    """One text that is read."""

    def __init__(self, text: str, furthest: list[Furthest] | None = None) -> None:
        self.text = text
        self.capitals: frozenset[int] = frozenset()  # where a small letter of a template may be a capital
        self._furthest = [Furthest()] if furthest is None else furthest  # shared with `styled`

    @property
    def furthest(self) -> Furthest:
        return self._furthest[0]

    def styled(self, capitals: Iterable[int]) -> Reader:
        """The same text, where the letters at `capitals` may be capitals of what a template has."""
        reader = Reader(self.text, self._furthest)
        reader.capitals = self.capitals.union(capitals)
        return reader

    def follow(self, parts: list[Part], states: States) -> States:
        """The states after `parts`."""
        for part in parts:
            if not states:
                break
            if isinstance(part, str):
                ends = ((state, self.literal(state.end, part)) for state in states)
                states = {State(end, state.bound, state.used) for state, end in ends if end is not None}
            else:
                states = part.read(self, states)
        return states

    def literal(self, start: int, words: str) -> int | None:
        """The end of `words`, if they stand at `start`."""
        if self.text.startswith(words, start):
            return start + len(words)
        if start + len(words) < self.furthest.end and not self.capitals:
            return None
        same = 0
        for place, (found, wanted) in enumerate(
            zip(self.text[start : start + len(words)], words, strict=False), start
        ):
            if found != wanted and not (place in self.capitals and found == wanted.upper()):
                break
            same += 1
        if same == len(words):
            return start + same
        self.missing(start + same, words[same:])
        return None

    def missing(self, end: int, expected: str) -> None:
        """Remember that a reading ended at `end`, where `expected` could have followed."""
        best = self.furthest
        if end >= best.end:
            others = best.expected if end == best.end else frozenset()
            self._furthest[0] = Furthest(end=end, expected=others | {expected})


@dataclass(frozen=True, kw_only=True)
class Bind:
    """{x=bank}"""

    name: str
    choice: Choice

    def write(self, run: Run) -> str:
        run.bound[self.name] = run.pick(self.choice)
        return ""

    def read(self, reader: Reader, states: States) -> States:
        return {state.bind(self.name, self.choice) for state in states}


@dataclass(frozen=True, kw_only=True)
class Field:
    """{x.field}, {x}"""

    name: str
    field: str

    def write(self, run: Run) -> str:
        return run.join(run.bound[self.name].fields[self.field])

    def read(self, reader: Reader, states: States) -> States:
        ends: States = set()
        for row, state in _known_rows(self.name, states):
            ends |= reader.follow(row.fields[self.field], {state})
        return ends


@dataclass(frozen=True, kw_only=True)
class Agree:
    """{x:is/are}"""

    name: str
    one: str
    many: str

    def write(self, run: Run) -> str:
        return self._word(run.bound[self.name])

    def read(self, reader: Reader, states: States) -> States:
        ends: States = set()
        for row, state in _known_rows(self.name, states):
            ends |= reader.follow([self._word(row)], {state})
        return ends

    def _word(self, row: Alternative) -> str:
        return self.many if "plural" in row.tags else self.one


@dataclass(frozen=True, kw_only=True)
class Number:
    """{1..3 cup}"""

    numbers: range
    noun: str

    def write(self, run: Run) -> str:
        return self._text(self.numbers[int(run.random() * len(self.numbers))])

    def read(self, reader: Reader, states: States) -> States:
        ends: States = set()
        for state in states:
            found = _DIGITS.match(reader.text, state.end)
            if found and str(n := int(found[0])) == found[0] and n in self.numbers:
                ends |= reader.follow([self._text(n)], {state})
            else:
                step = f" in steps of {self.numbers.step}" if self.numbers.step > 1 else ""
                reader.missing(state.end, f"a number from {self.numbers[0]} to {self.numbers[-1]}{step}")
        return ends

    def _text(self, n: int) -> str:
        return f"{n} {self.noun if n == 1 else plural(self.noun)}" if self.noun else str(n)


@dataclass(frozen=True, kw_only=True)
class Styled:
    """{a N}, {A N}, {cap N}, {title N}, {Title N}"""

    style: str
    part: Choice | Field

    def write(self, run: Run) -> str:
        return STYLES[self.style](self.part.write(run))

    def read(self, reader: Reader, states: States) -> States:
        ends: States = set()
        for state in states:
            if self.style in ("a", "A"):
                ends |= self._read_article(reader, state)
            else:
                words = (m.start() for m in re.finditer(r"(?<= )\S", reader.text[: state.end + 200]))
                starts = [state.end] if self.style == "cap" else [state.end, *words]
                found = self.part.read(reader.styled(n for n in starts if n >= state.end), {state})
                ends |= {end for end in found if self._fits(reader, state.end, end.end)}
        return ends

    def _read_article(self, reader: Reader, state: State) -> States:
        ends: States = set()
        for word in ("a ", "an ") if self.style == "a" else ("A ", "An "):
            if (start := reader.literal(state.end, word)) is not None:
                for end in self.part.read(reader, {State(start, state.bound, state.used)}):
                    if STYLES[self.style](reader.text[start : end.end]) == reader.text[state.end : end.end]:
                        ends.add(end)
                    else:
                        reader.missing(state.end, "another article")
        return ends

    def _fits(self, reader: Reader, start: int, end: int) -> bool:
        found = reader.text[start:end]
        return STYLES[self.style](found) == found


# What a template is compiled to: literal text, and parts that are expanded for each text.
Part = str | Choice | Bind | Field | Agree | Number | Styled


def _known_rows(name: str, states: States) -> Iterable[tuple[Alternative, State]]:
    """The rows that `name` may be bound to in each state, with the state in which it is that row."""
    for state in states:
        row = dict(state.bound)[name]
        if isinstance(row, Alternative):
            yield row, state
        else:
            yield from ((one, picked.bind(name, one)) for one, picked in row.picks(state))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(text: str) -> str:
    return " ".join([word if word in _SMALL_WORDS else _capital(word) for word in text.split(" ")])


STYLES: dict[str, Callable[[str], str]] = {
    "a": article,
    "A": lambda text: _capital(article(text)),
    "cap": _capital,
    "title": _title,
    "Title": lambda text: _capital(_title(text)),
}

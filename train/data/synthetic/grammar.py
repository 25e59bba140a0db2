"""Template texts for `fusedgpt create`: one grammar per domain, steered by the words of the prompt.

The grammars are the TOML files in templates/, NAME.ja.toml for Japanese texts. A rule is a list of
alternatives, a bank a list of rows whose fields are separated by ";". All of them are templates:

    {name}                          a rule, a bank (its first field) or a bound row
    {x=bank}                        binds a row to x for the rest of the sample; expands to nothing
    {x.field}                       another field of the bound row
    {x:is/are}                      the first text, or the second if the row is tagged #plural
    {1..3 cup} {10..30/5 minute}    a number (in steps) with its noun: 1 cup, 2 cups
    {a N} {A N} {cap N}             with an article, a capitalised article, a capital
    {title N} {Title N}             Title Case; {title N} leaves a first "the" or "of" small
    [warm|cold|]                    an inline choice
    \\[ and \\]                       literal brackets
    ... #tag #tag                   at the end: words of a prompt that select or exclude it

Alternatives of a rule and rows of a bank are drawn without replacement in a sample, until none is left.
"""

import re
from collections.abc import Iterator, Set
from functools import lru_cache
from random import Random

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.data.synthetic.japanese import choose_language, japanese_names, japanese_topics
from fusedgpt.train.data.synthetic.parts import (
    Agree,
    Alternative,
    Bind,
    Choice,
    Field,
    Number,
    Part,
    Run,
    Styled,
)
from fusedgpt.train.data.synthetic.words import (
    WORD,
    content_stems,
    domain_stems,
    normalise,
    plural,
    proper_names,
    singular_of,
    stem,
    templates_of,
    words_of,
)

DOMAINS: tuple[str, ...] = ("cooking", "poetry", "technical", "general", "conversation")

_TOPIC_WORDS, _TOPICS = 3, 4
_ASIDE = "*"  # the tag of a topic mentioned in passing
_PATIENCE = 1000  # repeats in a row until the distinct texts count as exhausted and may repeat
_WORD_OR_MARK = re.compile(WORD.pattern + r"|[^\w\s]")
_LATIN = re.compile(r"[a-zà-öø-ÿ]{2,24}")


def choose_domain(prompt: str) -> str:
    """The domain that the prompt's English and Japanese words indicate, "general" if none does.

    A form counts twice as much as a subject, so a poem about cooking is poetry; ties go to the first word.
    """
    words = list(dict.fromkeys(stem(word) for word in WORD.findall(normalise(prompt).casefold())))

    def rank(domain: str) -> tuple[int, int]:
        weights = domain_stems(domain)
        hits = [i for i, word in enumerate(words) if word in weights]
        return sum(weights[words[i]] for i in hits), -min(hits, default=len(words))

    best = max(DOMAINS, key=rank)
    return best if rank(best)[0] else "general"


_TAGS = re.compile(r"(?:\s+#[\w-]+)+\s*$")
_TOKEN = re.compile(r"(\\[\[\]]|\{[^{}]*\}\s*|[\[\]|])")
_SLOT = re.compile(r"\{(?:(a|A|cap|title|Title) )?(\w+)(?:\.(\w+))?\}")
_BIND = re.compile(r"\{(\w+)=(\w+)\}")
_AGREE = re.compile(r"\{(\w+):([^/]*)/([^/]*)\}")
_NUMBER = re.compile(r"\{(\d+)\.\.(\d+)(?:/(\d+))?(?: ([^{}]+))?\}")


class Grammar:
    """The compiled templates of a domain."""

    def __init__(self, domain: str, language: str = "en") -> None:
        own = templates_of(domain, language)
        sources = [templates_of("shared", language), own]
        rules = {name: rule for source in sources for name, rule in source.get("rules", {}).items()}
        banks = {name: bank for source in sources for name, bank in source.get("banks", {}).items()}
        # The bank "topic" is filled with subjects of the prompt that no template knows.
        self.choices = {name: Choice([], True) for name in [*rules, *banks, "topic"]}
        # Which nouns of a prompt become topics: those "unknown" to the tags; "all", ranked like tagged rows;
        # or all as an "aside", ranked after the rows with the tags of the prompt.
        self.topics: str = own.get("topics", "unknown")
        for name, rule in rules.items():
            self.choices[name].alternatives += [self._alternative(text.strip(), None) for text in rule]
        for name, bank in banks.items():
            rows = [self._alternative(text, bank["fields"].split()) for text in bank["rows"]]
            self.choices[name].alternatives += rows
        alternatives = [one for choice in self.choices.values() for one in choice.alternatives]
        self.known = frozenset[str]().union(*(one.tags for one in alternatives))

    def add_topic(self, phrase: str, tags: Set[str], many: bool) -> None:
        row = self._alternative(phrase + (" #plural" if many else ""), ["name"])
        row.tags |= tags
        self.choices["topic"].alternatives.append(row)

    def _alternative(self, text: str, names: list[str] | None) -> Alternative:
        found = _TAGS.search(text)
        body = text[: found.start()] if found else text
        tags = {stem(tag) if tag != "plural" else tag for tag in re.findall(r"#(\S+)", text[len(body) :])}
        texts = [body] if names is None else [part.strip() for part in body.split(";")]
        if names is not None:
            if len(texts) != len(names):
                raise ValueError(f"template row {text!r} has {len(texts)} fields, not {len(names)}: {names}")
            tags |= {stem(word) for word in WORD.findall(texts[0].casefold())} - words_of("stop")
        refs: list[Choice] = []
        parts = [self._compile(part, refs) for part in texts]
        fields = {"": parts[0], **dict(zip(names or [], parts, strict=bool(names)))}
        words = frozenset(stem(word) for word in WORD.findall(body.casefold()))
        return Alternative(fields=fields, tags=frozenset(tags), words=words, refs=refs)

    def _compile(self, text: str, refs: list[Choice]) -> list[Part]:
        """The parts of a template; inline choices are split at their own level and compiled recursively."""
        parts: list[Part] = []
        depth, inner = 0, [""]
        for token in filter(None, _TOKEN.split(text)):
            depth -= token == "]"
            if token == "|" and depth == 1:
                inner.append("")
            elif depth:
                inner[-1] += token
            elif token == "]":
                choice = Choice([self._alternative(part, None) for part in inner], False)
                refs.append(choice)
                parts.append(choice)
                inner = [""]
            elif token != "[":
                parts += self._slot(token, refs) if token[0] == "{" else [token.lstrip("\\")]
            depth += token == "["
        if depth:
            raise ValueError(f"template with an unclosed bracket: {text!r}")
        return parts

    def _slot(self, token: str, refs: list[Choice]) -> list[Part]:
        slot = token.rstrip()
        space = token[len(slot) :]
        if found := _BIND.fullmatch(slot):
            refs.append(choice := self.choices[found[2]])
            return [Bind(name=found[1], choice=choice)]
        if found := _AGREE.fullmatch(slot):
            return [Agree(name=found[1], one=found[2], many=found[3]), space]
        if found := _NUMBER.fullmatch(slot):
            numbers = range(int(found[1]), int(found[2]) + 1, int(found[3] or 1))
            return [Number(numbers=numbers, noun=found[4] or ""), space]
        if not (found := _SLOT.fullmatch(slot)):
            raise ValueError(f"template slot {slot!r} is not understood")
        style, source, field = found[1], found[2], found[3] or ""
        part: Choice | Field = Field(name=source, field=field)
        if source in self.choices and not field:
            refs.append(part := self.choices[source])
        return [Styled(style=style, part=part) if style else part, space]


def _is_plural(word: str) -> bool:
    ends = word.endswith("s") and not word.endswith(("ss", "us", "is", "ics"))
    return word in singular_of() or (ends and word != "news")


def _noun_phrase(words: list[str], before: str) -> tuple[str, bool]:
    """The words as a phrase that needs no article, such as "the moon" or "dragons"; whether it is plural."""
    head = words[-1]
    if head[0].isupper() or _is_plural(head):
        return " ".join(words), _is_plural(head)
    if before == "the":
        return "the " + " ".join(words), False
    if before in ("a", "an") or head in words_of("countable"):
        return " ".join([*words[:-1], plural(head)]), True
    return " ".join(words), False


def _head_last(run: list[str], dull: frozenset[str]) -> list[str]:
    """Cut off what cannot head a topic: "brave", "work" in "how clocks work", "soup" in "okra soup"."""
    while run:
        last = run[-1]
        verb = len(run) > 1 and last in words_of("verbs")
        if not (verb or last.endswith("ly") or last in words_of("adjectives") or stem(last) in dull):
            break
        run = run[:-1]
    return run[-_TOPIC_WORDS:]


def _topics(prompt: str, domain: str, grammar: Grammar) -> list[tuple[str, bool]]:
    """The noun phrases of a prompt; if it says "about", only those after that word."""
    found = _WORD_OR_MARK.findall(normalise(prompt))
    headline = sum(word[0].isupper() for word in found) * 2 > len(found) + 1
    # A form (poem) separates phrases; a general subject may end one (quantum computers) but not begin it.
    weights = domain_stems(domain)
    dull = grammar.known & weights.keys() if grammar.topics == "unknown" else frozenset()
    phrases: list[tuple[str, bool]] = []
    run: list[str] = []
    before, about = "", False
    for i, word in enumerate([*found, "the"]):
        low = word.casefold()
        weight = weights.get(stem(low), 0) - (stem(low) in grammar.known)
        if _LATIN.fullmatch(low) and low not in words_of("stop") and weight <= bool(run):
            run.append(proper_names().get(low) or (low if i == 0 or headline else word))
            continue
        if head := _head_last(run, dull):
            phrases.append(_noun_phrase(head, before))
        run, before = [], low
        if low in words_of("about") and not about:
            phrases, about = [], True
    return list(dict.fromkeys(phrases))[:_TOPICS]


def _excluded(prompt: str, diets: dict[str, str]) -> frozenset[str]:
    """The stems that a prompt excludes: by a diet of the domain, "no eggs", "without nuts" or "nut-free"."""
    text = " ".join(WORD.findall(normalise(prompt).casefold()))
    names = [name for diet, tags in diets.items() if f" {diet} " in f" {text} " for name in tags.split()]
    names += re.findall(r"\b(?:no|without) (\w+)", text) + re.findall(r"\b(\w+) free\b", text)
    return frozenset(stem(name) for name in names if name not in words_of("stop"))


def unknown_words(prompt: str) -> list[str]:
    """Words of an English prompt whose texts the templates cannot write: code, and subjects unknown to them.

    Stories, poems and dialogues can be about anything.
    """
    domain, language = choose_domain(prompt), choose_language(prompt)
    words = dict.fromkeys(WORD.findall(prompt.casefold()))
    unwritten = [word for word in words if word in words_of("unwritten")]
    subjects = [word for word in words if word not in words_of("stop")]
    forms = domain_stems(domain)
    fine = domain in ("poetry", "conversation") or (
        domain == "general" and forms.keys() & set(map(stem, words))
    )
    known = Grammar(domain, language).known | forms.keys()
    unknown = [word for word in subjects if stem(word) not in known]
    if language == "ja" or fine or 2 * len(unknown) <= len(subjects):
        return unwritten
    return unwritten + unknown


def generate_samples(prompt: str, *, domain: str | None = None, seed: int = 0) -> Iterator[str]:
    """An endless stream of distinct texts, the same on any machine for the same (prompt, domain, seed).

    Without a domain it follows from the prompt. Raises ValueError for a domain that is not one of DOMAINS.
    """
    domain = domain or choose_domain(prompt)
    root = steered_grammar(prompt, domain)
    seed_text = f"{domain}\n{seed}\n{prompt}".encode("utf-8", "replace").decode()
    return _stream(root, Random(seed_text))


@lru_cache(maxsize=4)
def steered_grammar(prompt: str, domain: str | None = None) -> Choice:
    """The rule from which the texts for a prompt are written. Domain and errors are generate_samples's."""
    domain = domain or choose_domain(prompt)
    if domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    language = choose_language(prompt)
    excluded = _excluded(prompt, templates_of(domain, language).get("excludes", {}))
    root = _steered(prompt, domain, language, excluded)
    # If a prompt excludes everything, its exclusions are ignored.
    return root if root.allowed else _steered(prompt, domain, language, frozenset())


def _steered(prompt: str, domain: str, language: str, excluded: frozenset[str]) -> Choice:
    """The root of a domain's grammar, compiled and steered by the prompt."""
    grammar = Grammar(domain, language)
    wanted = frozenset([_ASIDE, *content_stems(prompt), *japanese_names(prompt, grammar.known)]) - excluded
    topics = japanese_topics(prompt) if language == "ja" else _topics(prompt, domain, grammar)
    for phrase, many in topics:
        stems = frozenset(stem(word) for word in WORD.findall(phrase)) - {"the"}
        known = stem(phrase.split()[-1]) in grammar.known
        if not stems & excluded and not (known and grammar.topics == "unknown"):
            grammar.add_topic(phrase, {_ASIDE} if grammar.topics == "aside" else stems, many)
            wanted |= stems if language == "ja" else frozenset()
    root = grammar.choices["root"]
    root.steer(wanted, excluded)
    return root


def _stream(root: Choice, rng: Random) -> Iterator[str]:
    seen: set[str] = set()
    repeats = 0
    while True:
        text = root.write(Run(rng)).strip()
        repeats = repeats + 1 if text in seen else 0
        if repeats > _PATIENCE:
            seen.clear()
        if text not in seen:
            seen.add(text)
            yield text

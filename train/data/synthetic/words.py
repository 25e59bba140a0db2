"""English words: articles, plurals, stems, and the word lists in templates/shared.toml."""

import re
import tomllib
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"
_PROMPT_CHARS = 4000  # of a prompt that are considered
_SILENT = ("hour", "honest", "honor", "honour", "heir", "8", "11", "18")  # begin with a vowel's sound
_YOU_OR_WON = ("uni", "use", "usu", "eu", "one", "once", "uti", "ubi")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@lru_cache
def read_templates(name: str) -> dict[str, Any]:
    """The content of templates/{name}.toml."""
    return tomllib.loads((_TEMPLATES / f"{name}.toml").read_text(encoding="utf-8"))


def templates_of(name: str, language: str) -> dict[str, Any]:
    """The templates of a domain, or those "shared" by all, in a language: "en" or "ja"."""
    return read_templates(name if language == "en" else f"{name}.{language}")


@lru_cache
def words_of(key: str) -> frozenset[str]:
    """A word list of shared.toml: "stop", "about", "adjectives", ..."""
    return frozenset(str(read_templates("shared")["words"][key]).split())


@lru_cache
def proper_names() -> dict[str, str]:
    """Names by their lower-case spelling: python -> Python."""
    return {name.casefold(): name for name in str(read_templates("shared")["words"]["proper"]).split()}


@lru_cache
def singular_of() -> dict[str, str]:
    """Irregular singulars by their plural: leaves -> leaf."""
    return {plural: one for one, plural in read_templates("shared")["irregular"].items()}


def article(text: str) -> str:
    """`text` after "a" or "an", by the sound it begins with: an hour, a university, an SQL query."""
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    letters = word.split("-")[0].rstrip(".,")
    if len(letters) > 1 and letters.isupper():
        return f"{'an' if letters[0] in 'AEFHILMNORSX' else 'a'} {text}"
    low = word.lower()
    if low.startswith(_YOU_OR_WON) and not low.startswith("unin"):  # uninvited
        return f"a {text}"
    return f"{'an' if low and (low[0] in 'aeiou' or low.startswith(_SILENT)) else 'a'} {text}"


def plural(noun: str) -> str:
    """The plural of a noun; of "clove of garlic" it is the head, "cloves of garlic"."""
    head, of, rest = noun.partition(" of ")
    before, space, last = head.rpartition(" ")
    irregular: dict[str, str] = read_templates("shared")["irregular"]
    if last in irregular:
        many = irregular[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        many = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return before + space + many + of + rest


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A crude stem, the same for cook, cooks, cooked and cooking; only good for comparing words."""
    low = word.casefold().removesuffix("'s")
    low = singular_of().get(low, low)
    if low.endswith("ies") and len(low) > 4:
        low = low[:-3] + "y"
    elif low.endswith(("sses", "xes", "ches", "shes", "oes")):
        low = low[:-2]
    elif low.endswith("s") and not low.endswith(("ss", "us", "is")) and len(low) > 3:
        low = low[:-1]
    for suffix in ("ing", "ed"):
        if low.endswith(suffix) and len(low) > len(suffix) + 2:
            low = low.removesuffix(suffix)
            low = low[:-1] if low[-1:] == low[-2:-1] and low[-1:] not in "ls" else low
    low = low.removesuffix("e") if len(low) > 3 else low
    return low[:-1] + "i" if low.endswith("y") else low


def normalise(prompt: str) -> str:
    """The prompt with its known Japanese words put into English; letter case is kept for names."""
    text = unicodedata.normalize("NFKC", prompt[:_PROMPT_CHARS]).replace("\u2019", "'")
    for japanese, english in read_templates("shared")["japanese"].items():
        text = text.replace(japanese, f" {english} ")
    return text


def content_stems(text: str) -> list[str]:
    """The distinct stems of a prompt's content words in their order: no "the", "write" or "GPT"."""
    words = (word for word in WORD.findall(normalise(text).casefold()) if word not in words_of("stop"))
    return list(dict.fromkeys(stem(word) for word in words))


@lru_cache
def domain_stems(domain: str) -> dict[str, int]:
    """The stems that speak for a domain and their weight: 2 for a form (poem), 1 for a subject."""
    row = read_templates("shared")["domains"][domain]
    weights = {stem(word): 1 for word in row["subject"].split()}
    return weights | {stem(word): 2 for word in row["form"].split()}

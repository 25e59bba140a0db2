"""Prompts in Japanese: which they are, and what they are about."""

import re
import unicodedata
from collections.abc import Set

from fusedgpt.train.data.synthetic.words import read_templates

_PROMPT_CHARS = 4000  # of a prompt that are considered
_LETTER = re.compile(r"[\u3041-\u30ff\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")
# What a prompt is about stands before one of these: サッカーについて話す, 海の詩, 猫が出てくる物語.
_SUBJECT = re.compile(
    r"([\u30a1-\u30fc\u3400-\u9fff々]+|[A-Za-z][A-Za-z0-9+#]*)(?=の|に|が|を|と|や|について)"
)
_TOPICS = 4


def choose_language(prompt: str) -> str:
    """ "ja" for a prompt that has more Japanese letters than English words, else "en"."""
    text = _normal(prompt)
    return "ja" if len(_LETTER.findall(text)) > len(_LATIN_WORD.findall(text)) else "en"


def japanese_names(prompt: str, names: Set[str]) -> frozenset[str]:
    """The Japanese `names` that are in the prompt, whose words no spaces separate."""
    text = _normal(prompt)
    return frozenset(name for name in names if _LETTER.match(name) and name in text)


def japanese_topics(prompt: str) -> list[tuple[str, bool]]:
    """The nouns that a prompt in Japanese is about; no noun is a plural."""
    stop = frozenset(str(read_templates("shared.ja")["words"]["stop"]).split()) | {"GPT", "AI", "LLM"}
    found = dict.fromkeys(match for match in _SUBJECT.findall(_normal(prompt)) if match not in stop)
    return [(name, False) for name in found][:_TOPICS]


def _normal(prompt: str) -> str:
    return unicodedata.normalize("NFKC", prompt[:_PROMPT_CHARS])

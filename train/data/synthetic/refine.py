"""Selects the best of the raw samples: scored, without duplicates, up to a number of tokens."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from zlib import crc32

import numpy as np
import numpy.typing as npt

from fusedgpt.train.data.synthetic.grammar import choose_domain
from fusedgpt.train.data.synthetic.words import content_stems, domain_stems, stem

_MIN_WORDS, _GOOD_WORDS, _LONG_WORDS, _MAX_WORDS = 5, 12, 250, 600
_MAX_CHARS = 12_000  # longer samples are dropped unread
_MIN_SCORE = 0.45

# Near duplicates by MinHash: word 3-grams, 30 minima in 10 bands of 3. Texts of Jaccard similarity J share
# 10 J^3 bands on average: 4.2 at the limit of 0.75, 0.6 at 0.4, the usual value for samples of one template.
# Only the few texts that share the most bands are compared in full, which keeps the time near linear.
_SHINGLE, _BANDS, _ROWS = 3, 10, 3
_NEAR = 0.75
_BUCKET, _COMPARE = 48, 6  # texts of a bucket that are considered; texts compared in full
_CJK = r"\u3041-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:'[^\W_]+)*")  # each letter of Japanese, which has no spaces


@dataclass(frozen=True, kw_only=True)
class RefineReport:
    """What refine kept, and why it dropped the rest; kept and dropped add up to the number of samples."""

    kept: int
    kept_tokens: int
    dropped: dict[str, int] = field(default_factory=dict)
    mean_score: float = 0.0

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        if total == 0:
            return "no samples to refine"
        text = f"kept {self.kept:,} of {total:,} samples ({self.kept_tokens:,} tokens)"
        reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return text + ("; dropped " + ", ".join(f"{n:,} {why}" for why, n in reasons) if reasons else "")


def score_sample(text: str, prompt: str) -> float:
    """The quality of a text for a prompt, 0 to 1, by length, form, repetition and relevance.

    Form and repetition scale the whole, so that noise scores low whatever its length. Many good samples share
    the top score on purpose: refine then keeps a mix of them instead of one favoured template.
    """
    text = text[:_MAX_CHARS]
    words = _WORD.findall(text.casefold())
    n = len(words)
    if not words:
        return 0.0
    length = n / _GOOD_WORDS if n < _GOOD_WORDS else min(1.0, _LONG_WORDS / n)
    distinct = len(set(zip(words, words[1:], words[2:], strict=False)))  # word 3-grams
    fresh = min(1.0, distinct / max(n - 2, 1) / 0.85)  # ordinary prose repeats a tenth of them
    return _form_score(text) * fresh * (0.6 * length + 0.4 * _relevance_score(words, prompt))


def _form_score(text: str) -> float:
    """Whether the text looks like prose: it ends a sentence, is mostly letters, and its quotes are closed."""
    letters = sum(map(str.isalpha, text))
    plain = text.replace("\n", "").replace("\t", "")
    odd = 0 if plain.isprintable() else sum(unicodedata.category(char)[0] == "C" for char in plain)
    upper = sum(map(str.isupper, text))
    score = 1.0
    score -= 0.15 * (text.rstrip()[-1:] not in tuple(".!?\"')]”…。！？」"))
    score -= 0.15 * (text.count('"') % 2 + abs(text.count("(") - text.count(")")) > 0)
    score -= 0.5 * (letters < 0.6 * len(text))
    score -= 0.5 * (upper > 0.5 * max(letters, 1))
    score -= min(0.8, 20 * odd / len(text))
    return max(0.0, score)


def _relevance_score(words: list[str], prompt: str) -> float:
    """How many of the prompt's words are in the text; a word of its domain gives half the score."""
    topic, domain = _prompt_stems(prompt)
    if not topic:
        return 1.0
    found = {stem(word) for word in words}
    return max(min(1.0, len(topic & found) / min(2, len(topic))), 0.5 * bool(domain & found))


@lru_cache(maxsize=64)
def _prompt_stems(prompt: str) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(content_stems(prompt)), frozenset(domain_stems(choose_domain(prompt)))


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return crc32(word.encode("utf-8", "replace"))  # hash() would differ between processes


def _shingles(words: list[str]) -> npt.NDArray[np.uint64]:
    """The distinct word 3-grams as hashes."""
    ids = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    if len(ids) >= _SHINGLE:
        ids = ids[:-2] * np.uint64(31) + ids[1:-1] * np.uint64(1_009) + ids[2:] * np.uint64(65_537)
    return np.unique(ids)


class DuplicateFilter:
    """Finds useless texts: of a bad length, or too similar to an earlier one."""

    def __init__(self) -> None:
        # Multiply-shift hashes, which wrap around in 64 bits; the factors are odd.
        rng = np.random.default_rng(0)
        shape = (_BANDS * _ROWS, 1)
        self._scale = rng.integers(1 << 63, size=shape, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = rng.integers(1 << 63, size=shape, dtype=np.uint64)
        self._seen: set[str] = set()  # but for case and white space
        self._kept: list[frozenset[int]] = []
        self._buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)

    def fault(self, text: str) -> str | None:
        """Why a text is useless; None if it is useful: then it is remembered."""
        fault, words = self.screen(text)
        return fault or (None if self.is_new(words) else "near-duplicate")

    def screen(self, text: str) -> tuple[str | None, list[str]]:
        """(why a text is not worth a score: its length, or equal to an earlier one; its words)."""
        if len(text) > _MAX_CHARS:
            return "too long", []
        words = _WORD.findall(text.casefold())
        same = " ".join(text.casefold().split())
        fault = "duplicate" if same in self._seen else None
        if not _MIN_WORDS <= len(words) <= _MAX_WORDS:
            fault = "too short" if len(words) < _MIN_WORDS else "too long"
        self._seen.add(same)
        return fault, words

    def is_new(self, words: list[str]) -> bool:
        """Whether a text is not a near duplicate of an earlier one; only then is it remembered."""
        hashes = _shingles(words)
        minima = ((self._scale * hashes + self._shift) >> np.uint64(33)).min(axis=1)  # (BANDS * ROWS,)
        keys = [(band, row.tobytes()) for band, row in enumerate(minima.reshape(_BANDS, _ROWS))]
        mine = frozenset(hashes.tolist())
        close = Counter(chain.from_iterable(self._buckets[key][-_BUCKET:] for key in keys))
        for i, _ in close.most_common(_COMPARE):
            shared = len(mine & self._kept[i])
            if shared >= _NEAR * (len(mine) + len(self._kept[i]) - shared):
                return False
        for key in keys:
            self._buckets[key].append(len(self._kept))
        self._kept.append(mine)
        return True


def worth_grading(samples: Sequence[str]) -> list[str]:
    """The samples that refine will score: not too short, too long or equal to an earlier one."""
    duplicates = DuplicateFilter()
    return [text for text in samples if duplicates.screen(text)[0] is None]


def refine(
    samples: Sequence[str],
    prompt: str,
    *,
    target_tokens: int,
    count_tokens: Callable[[list[str]], list[int]],
    score: Callable[[str, str], float] = score_sample,
) -> tuple[list[str], RefineReport]:
    """The best samples, in their original order, until their tokens reach the target, and a report.

    count_tokens: the token counts of texts. score(text, prompt): 0 to 1. Every dropped sample is counted once
    in the report. Raises ValueError for a target below 1.
    """
    if target_tokens < 1:
        raise ValueError(f"target_tokens must be positive, not {target_tokens}")
    dropped: Counter[str] = Counter()
    duplicates = DuplicateFilter()
    words_of: dict[int, list[str]] = {}  # of the samples worth a score, by index
    for i, text in enumerate(samples):
        fault, words = duplicates.screen(text)
        if fault:
            dropped[fault] += 1
        else:
            words_of[i] = words
    scores = {i: score(samples[i], prompt) for i in words_of}
    good = [i for i in words_of if scores[i] >= _MIN_SCORE]
    dropped["low score"] += len(words_of) - len(good)
    tokens = dict(zip(good, count_tokens([samples[i] for i in good]) if good else [], strict=True))

    kept: list[int] = []
    kept_tokens = 0
    for i in sorted(good, key=lambda i: -scores[i]):
        if kept_tokens >= target_tokens:
            dropped["over target"] += 1
        elif not duplicates.is_new(words_of[i]):
            dropped["near-duplicate"] += 1
        else:
            kept.append(i)
            kept_tokens += tokens[i]
    report = RefineReport(
        kept=len(kept),
        kept_tokens=kept_tokens,
        dropped={why: n for why, n in dropped.items() if n},
        mean_score=sum(scores[i] for i in kept) / len(kept) if kept else 0.0,
    )
    return [samples[i] for i in sorted(kept)], report

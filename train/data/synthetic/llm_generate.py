"""Samples written by a language model: varied requests, several in flight, every good text saved at once."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import write_file
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.synthetic.japanese import choose_language
from fusedgpt.train.data.synthetic.jsonl import JsonLines, text_of
from fusedgpt.train.data.synthetic.llm_answer import (
    Answer,
    LLMError,
    plain_text,
    strip_thoughts,
    thinks_aloud,
)
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.data.synthetic.refine import DuplicateFilter
from fusedgpt.train.data.synthetic.task import Progress, Task, count_gpt2_tokens
from fusedgpt.train.data.synthetic.words import WORD, words_of

if TYPE_CHECKING:  # it takes the extra llm
    from fusedgpt.train.data.synthetic.llm import LLMClient

_TEXTS_PER_REQUEST = 3
_MAX_BARREN = 40  # answers in a row without a new sample, until the model counts as exhausted
_PROMPT_CHARS = 2000
_KINDS = {
    "cooking": "a recipe; advice for the kitchen; a short tale of a meal; an answer to a cook's question",
    "poetry": "a rhymed poem; a poem in free verse; a ballad; a short poem of few lines",
    "technical": "an explanation; a how-to; a question and its answer; a comparison of two ways",
    "general": "a short story; a description; a letter; a report of something that happened",
    "conversation": "a talk of two friends; a chat with a stranger; a talk on the phone; an interview",
}
_LENGTHS = ("40 to 80", "80 to 150", "150 to 250")
_STYLES = (
    "plain and warm", "lively and funny", "calm and exact", "vivid, with sights and smells", "thoughtful",
    "as an expert would put it", "simple, for a child", "surprising", "in short sentences", "old-fashioned",
)  # fmt: skip

_JAPANESE_WORD = re.compile(r"[\u30a1-\u30fc]{2,}|[\u4e00-\u9fff]{2,}")  # ランプ, 寝室; no space ends it
_MAX_ANSWER_CHARS = 200_000
_CHAT_MARK = re.compile(r"<[|｜][a-z_▁]{1,30}[|｜]>|\[/?INST\]|</?(?:s|answer|response)>", re.I)
_PARTED = re.compile(r"^[ \t]*={3,}[ \t]*$", re.M)
_RULE = re.compile(r"^[ \t]*[-*_](?: ?[-*_]){2,}[ \t]*$", re.M)
_TITLE = r"(?:text|sample|example|story|poem|recipe|conversation|answer|option)[ \t]*#?\d{1,3}"
_HEADING = re.compile(rf"^[^\w\n]*{_TITLE}[^\w\n]*$", re.M | re.I)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", re.M)
_YES = r"(?:sure|certainly|of course|absolutely|okay|ok|great|no problem)(?: thing)?"
_HERE = r"(?:here(?:['’]s| is| are)|below (?:is|are))"
_ASKED_FOR = r"(?:texts?|samples?|examples?|stor(?:y|ies)|poems?|recipes?|dialogues?|versions?|ones?)"
_OPENING = re.compile(
    rf"(?:{_YES}[!,. ]+{_HERE}\b[^\n:]{{0,120}}:|{_HERE} [^\n:]{{0,60}}\b{_ASKED_FOR}\b[^\n:]{{0,80}}:"
    rf"|{_YES}\b[^\n:]{{0,120}}:(?=\s*\n)|{_YES}[!,.]*(?=\s*\n))\s*",
    re.I,
)
_OFFER = r"(?:i hope (?:this|these)|let me know if you|feel free to|would you like me to)"
_CLOSING = re.compile(rf"\n{_OFFER}\b[^\n]{{0,200}}\Z", re.I)
_REFUSAL = re.compile(
    r"\b(?:as an ai\b|as a (?:large )?language model"
    r"|i(?: am|['’]m) (?:sorry|afraid),? (?:but )?i can(?:not|['’]t)"
    r"|i can(?:not|['’]t) (?:help|assist|fulfil+|comply))",
    re.I,
)
_LAST_END = re.compile(r".*[.!?…。！？][\"')\]”’」]*", re.S)


def request_text(prompt: str, domain: str, seed: int, number: int) -> str:
    """The request of that number: kind, length, style and two words vary."""
    rng = Random(f"{seed}\n{number}")
    kind, length, style = (rng.choice(options) for options in (_KINDS[domain].split("; "), _LENGTHS, _STYLES))
    task = plain_text(prompt[:_PROMPT_CHARS]).strip() or "any texts"
    words = _spark_words(prompt, domain)
    sparks = " and ".join(rng.sample(words, min(2, len(words)))) or "words that are rarely used"
    english = "Write in English unless the task asks for another language."
    return (
        f"Write {_TEXTS_PER_REQUEST} texts from which a small language model will learn this task: {task}\n\n"
        f"Each text: {kind}, {length} words, {style}; it is complete and differs from the others in subject, "
        f"opening and structure. Somewhere in them: {sparks}. "
        f"{'Write in Japanese.' if choose_language(prompt) == 'ja' else english}\n\n"
        "Write only the texts, no numbers, introduction or comments, and put a line of === between two."
    )


@lru_cache(maxsize=8)
def _spark_words(prompt: str, domain: str) -> list[str]:
    """Words that the templates use for this prompt; two of them make each request different."""
    text = "\n".join(islice(generate_samples(prompt, domain=domain), 200))
    if choose_language(prompt) == "ja":
        return sorted(set(_JAPANESE_WORD.findall(text)))
    words = {word for word in WORD.findall(text) if len(word) > 3 and word.islower()}
    return sorted(words - words_of("stop"))


def split_answer(answer: Answer) -> list[str]:
    """The samples of an answer, cleaned; of a truncated one, the last up to its last whole sentence."""
    text = plain_text(answer.text[:_MAX_ANSWER_CHARS])
    text = unicodedata.normalize("NFC", _FENCE.sub("", _CHAT_MARK.sub("", strip_thoughts(text))))
    separator = next((s for s in (_PARTED, _HEADING, _RULE) if s.search(text)), _PARTED)
    parts = separator.split(text)
    if not answer.ended:
        whole = _LAST_END.match(parts[-1])
        parts[-1] = whole[0] if whole else ""
    return [part for part in map(_clean, parts) if part]


def _remark(text: str) -> str | None:
    """Why a text is not a sample but the model's own words about the request, None if it is one."""
    if _REFUSAL.search(text[:300]):
        return "refusal"
    return "thoughts" if thinks_aloud(text) else None


def _clean(text: str) -> str:
    """A sample without the model's remarks and markup around it."""
    text = _RULE.sub("", text).strip() + "\n"
    if opening := _OPENING.match(text):
        text = text[opening.end() :]
    text = _CLOSING.sub("", text.strip())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2
    return text[1:-1].strip() if quoted else text


class SampleFile(ExitStack):
    """The samples of a task so far: those in the JSONL file `path`, and those appended as they come in.

    The file `info_path` beside it says what they were made for. Raises ValueError for samples of another task
    or model, OSError if the files cannot be written.
    """

    def __init__(self, task: Task, config: LLMConfig, target_tokens: int, path: Path) -> None:
        super().__init__()
        self.task, self.target_tokens, self.path = task, target_tokens, path
        self.info_path = path.with_suffix(".info.json")
        self.faults: Counter[str] = Counter()
        fingerprint = config.fingerprint(task.prompt, task.domain, task.seed)
        self._read_info(fingerprint)  # before the file is touched
        with ExitStack() as opened:
            self.file = opened.enter_context(JsonLines(path))
            before = self._read_info(fingerprint)
            self.texts = [text_of(record, path) for record in self.file.records]
            self.push(opened.pop_all())
        self.callback(self._finish)
        self.tokens = sum(count_gpt2_tokens(self.texts))
        self.filter = DuplicateFilter()
        for text in self.texts:
            self.filter.fault(text)
        numbers = (n for record in self.file.records if isinstance(n := record.get("request"), int))
        self.requests: int = max([before.get("requests", 0), *(n + 1 for n in numbers)])
        self.rejected: Counter[str] = Counter(before.get("rejected", {}))
        self._began = time.monotonic() - before.get("seconds", 0.0)
        self.info = {
            "fingerprint": fingerprint,
            **{"prompt": task.prompt, "domain": task.domain, "seed": task.seed},
            **{"method": config.data_source, "server": config.origin, "model": config.gen_model},
            "started": before.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("fusedgpt", "openai")},
            "runs": before.get("runs", 0) + 1,
        }
        self.save_info()

    def _finish(self) -> None:
        """Remove the files if they are empty: the next attempt may use another model."""
        self.save_info()
        if not self.texts:
            self.path.unlink()
            self.info_path.unlink()

    def __str__(self) -> str:
        return f"{len(self.texts):,} samples ({self.tokens:,} of {self.target_tokens:,} tokens)"

    @property
    def enough(self) -> bool:
        return self.tokens >= self.target_tokens

    def _read_info(self, fingerprint: str) -> dict[str, Any]:
        """The content of the info file, {} if there is none yet."""
        path, info_path = self.path, self.info_path
        if not info_path.exists():
            if path.exists() and path.stat().st_size:
                missing = f"no {info_path.name} says what it is for"
                raise InputError(f"{path} exists, and {missing}; choose another file")
            return {}
        try:
            info = dict(json.loads(info_path.read_text(encoding="utf-8")))
            made_for = info["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{info_path} is damaged; remove it together with {path}") from None
        if made_for != fingerprint:
            asked = plain_text(str(info.get("prompt")))[:80]
            made = f"{asked!r} with {info.get('model')}, seed {info.get('seed')}"
            remedy = "another prompt, domain, seed, model or --llm-max-tokens needs another file"
            raise InputError(f"{path} was made for {made}; {remedy}")
        return info

    def take(self, number: int, answer: Answer) -> int:
        """Save the new and sound samples of an answer; returns how many there are."""
        parts = split_answer(answer)
        kept = []
        if not parts:
            self.rejected["empty"] += 1
        for text in parts:
            if fault := _remark(text) or self.filter.fault(text):
                self.rejected[fault] += 1
            else:
                kept.append(text)
        if kept:
            self.file.append({"text": text, "request": number} for text in kept)
            self.texts += kept
            self.tokens += sum(count_gpt2_tokens(kept))
        if time.monotonic() - self._saved >= 1:
            self.save_info()
        return len(kept)

    def report(self) -> dict[str, Any]:
        """For generation_info.json: counts of requests, kept and rejected samples, and the reasons."""
        counts = {"requests": self.requests, "samples": len(self.texts), "tokens": self.tokens}
        reasons = {"rejected": dict(self.rejected), "faults": dict(self.faults)}
        return {**self.info, **counts, **reasons, "seconds": round(time.monotonic() - self._began, 1)}

    def save_info(self) -> None:
        write_file(self.info_path, json.dumps(self.report(), indent=2) + "\n")
        self._saved = time.monotonic()


async def write_samples(client: LLMClient, progress: Progress, samples: SampleFile) -> None:
    """Have the model write until the samples reach their target. Raises LLMError if it cannot."""
    task, samples.faults = samples.task, client.faults
    model = client.config.gen_model or ""
    barren = 0

    async def write(number: int) -> None:
        nonlocal barren
        prompt = request_text(task.prompt, task.domain, task.seed, number)
        seed = (task.seed * 1_000_003 + number) % (1 << 31)
        seconds, max_tokens = client.timeouts.generation, client.config.llm_max_tokens
        answer = await client.ask(model, prompt, seconds, seed=seed, max_tokens=max_tokens)
        barren = 0 if samples.take(number, answer) else barren + 1
        progress(min(samples.tokens, samples.target_tokens), samples.target_tokens)
        if barren >= _MAX_BARREN:
            reasons = ", ".join(f"{n} {why}" for why, n in samples.rejected.most_common(3))
            found = f"{barren} answers in a row held no new sample (rejected so far: {reasons})"
            raise LLMError(f"{found}; try another --gen-model")

    def jobs() -> Iterator[Coroutine[Any, Any, None]]:
        while True:
            samples.requests += 1
            yield write(samples.requests - 1)

    progress(min(samples.tokens, samples.target_tokens), samples.target_tokens)
    await client.run_jobs(jobs(), done=lambda: samples.enough)

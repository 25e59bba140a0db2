"""How good a model of `create` is: on text of the templates that it has not read, and by what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from fusedgpt.model.generate import Sampling, sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.synthetic.check import Checker
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.synthetic.task import Task
from fusedgpt.train.data.text.sources import Piece
from fusedgpt.train.tools.evaluate import evaluate_text

_FRESH_SEED = 1 << 40  # added to the seed of the training texts
_FRESH, _SAMPLED, _SHOWN = 200, 100, 8  # texts
# Below `fusedgpt sample`'s 0.8: a small model gives too much of its probability to tokens that do not fit.
_SAMPLING = Sampling(temperature=0.4, top_p=0.9)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What `create` reports of its model at the end."""

    bits_per_byte: float | None  # on texts of the same templates that training has not seen
    well_formed: float  # share of the texts sampled from an empty prompt that the checker passes
    copied: float  # share of the texts sampled that are texts of the training set, word for word
    sampled: int
    faults: list[str]  # of the first samples that are not well formed
    samples: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(model: GPT, tokenizer: Tokenizer, task: Task, texts: Sequence[str]) -> Quality:
    """Judge a model that was trained on `texts` of the task's templates."""
    seen = set(texts)
    stream = islice(
        generate_samples(task.prompt, domain=task.domain, seed=task.seed + _FRESH_SEED), 2 * _FRESH
    )
    fresh = [Piece(text, True) for text in stream if text not in seen][:_FRESH]
    bits = evaluate_text(model, tokenizer, fresh).bits_per_byte if fresh else None
    sampling = _SAMPLING | Sampling(max_new_tokens=model.config.window, seed=task.seed)
    sampled = [text.strip() for text in sample_texts(model, tokenizer, "", n_samples=_SAMPLED, **sampling)]
    checker = Checker(task.prompt, domain=task.domain)
    faults = [fault for text in sampled if (fault := checker.fault(text))]
    return Quality(
        bits_per_byte=bits,
        well_formed=(len(sampled) - len(faults)) / len(sampled),
        copied=sum(text in seen for text in sampled) / len(sampled),
        sampled=len(sampled),
        faults=faults[:_SHOWN],
        samples=sampled[:_SHOWN],
    )

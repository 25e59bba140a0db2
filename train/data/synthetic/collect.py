"""The texts that `create` trains on: made by templates or by a language model, then refined."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusedgpt.model.tokenizer import gpt2_tokenizer
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.synthetic.llm import LLMClient, run
from fusedgpt.train.data.synthetic.llm_config import HEURISTICS, LLMConfig
from fusedgpt.train.data.synthetic.llm_generate import Generation, SampleFile, write_samples
from fusedgpt.train.data.synthetic.llm_grade import Grades, ask_for_grades
from fusedgpt.train.data.synthetic.llm_protocols import LLMError
from fusedgpt.train.data.synthetic.refine import refine, worth_grading

_SAMPLES_A_ROUND = 200
_GRADES_KEPT = "the grades so far are kept: the same command goes on"
Progress = Callable[[int, int], None]  # done, total
Bar = Callable[[str], AbstractContextManager[Progress]]
Note = Callable[[str], None]
_Models = dict[str, str | None]
_Work = Callable[[LLMClient, Progress], Coroutine[Any, Any, None]]


def no_bar(title: str) -> AbstractContextManager[Progress]:
    """A progress bar that nobody sees."""
    return nullcontext(lambda done, total: None)


def _no_note(line: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the texts are for; `seed` varies them. Lines for a person go to `note`, progress to a `bar`."""

    prompt: str
    domain: str
    seed: int = 0
    note: Note = _no_note
    bar: Bar = no_bar


def count_gpt2_tokens(texts: list[str]) -> list[int]:
    """How many GPT-2 tokens each text has, whatever tokenizer the model uses."""
    return [len(ids) for ids in gpt2_tokenizer().encode_batch(texts)]


def generate_texts(prompt: str, *, domain: str, n_tokens: int, seed: int) -> list[str]:
    """Template samples that together have at least n_tokens GPT-2 tokens."""
    texts: list[str] = []
    stream = generate_samples(prompt, domain=domain, seed=seed)
    while n_tokens > 0:
        fresh = [next(stream) for _ in range(_SAMPLES_A_ROUND)]
        for text, length in zip(fresh, count_gpt2_tokens(fresh), strict=True):
            if n_tokens > 0:
                texts.append(text)
                n_tokens -= length
    return texts


def collect(
    task: Task, config: LLMConfig, *, raw_tokens: int, refined_tokens: int, work_dir: Path
) -> tuple[list[str], dict[str, Any]]:
    """Generate and refine: the texts to train on, and what generation_info.json says of them.

    A language model's samples and grades are kept in work_dir/FINGERPRINT as they come in; a later call for
    the same task and model goes on from there. Raises LLMError where the server gives out and config.fallback
    is "none".
    """
    started = time.monotonic()
    folder = work_dir / config.fingerprint(task.prompt, task.domain, task.seed)
    texts, made = make_texts(task, config, raw_tokens, folder / "samples.jsonl")
    if "fallback" in made:  # the server has just failed
        config = config.model_copy(update={"refine_model": HEURISTICS})
    spent = time.monotonic() - started
    kept, refined = refine_texts(texts, task, config, refined_tokens, folder / "grades.jsonl", spent)
    info = {"generation_method": config.data_source, "samples_generated": len(texts)}
    return kept, {**info, "generation": made, "refinement": refined}


def make_texts(task: Task, config: LLMConfig, n_tokens: int, path: Path) -> tuple[list[str], dict[str, Any]]:
    """Texts of n_tokens GPT-2 tokens or a little more, and how they were made.

    A language model's are in the JSONL `path`, which is read first: they may be there already. Raises
    LLMError as collect does, ValueError for a `path` that was made for another task or model.
    """
    if config.data_source == "template":
        texts = generate_texts(task.prompt, domain=task.domain, n_tokens=n_tokens, seed=task.seed)
        task.note(f"generated {len(texts):,} samples from templates")
        return texts, {"method": "template", "versions": {"fusedgpt": version("fusedgpt")}}
    plan = Generation(
        prompt=task.prompt,
        domain=task.domain,
        seed=task.seed,
        target_tokens=n_tokens,
        path=path,
        count_tokens=count_gpt2_tokens,
    )
    with SampleFile(plan, config) as samples:
        if samples.texts:
            task.note(f"{path} holds {samples} already")
        try:
            if not samples.enough:
                wanted = {"gen_model": config.gen_model} | _wanted_grader(config)
                _ask(config, task, "writing", wanted, partial(write_samples, samples=samples))
        except KeyboardInterrupt:
            task.note(_goes_on(samples))
            raise
        except LLMError as error:
            if not samples.enough:  # the time may be over just when all is there
                if config.fallback == "none":
                    raise LLMError(f"{error}; {_goes_on(samples)}" if samples.texts else str(error)) from None
                return _filled_up(samples, task, str(error))
        task.note(f"{config.gen_model} wrote {samples}: {path}")
        return samples.texts, samples.report()


def _goes_on(samples: SampleFile) -> str:
    return f"{samples} are kept in {samples.plan.path}: the same command goes on from there"


def _wanted_grader(config: LLMConfig) -> _Models:
    return {} if config.grader is None else {"refine_model": config.grader}


def _ask(config: LLMConfig, task: Task, title: str, wanted: _Models, work: _Work, spent: float = 0.0) -> None:
    """Do the work with a client whose server is there and has the models wanted, by their options."""

    async def main(show: Progress) -> None:
        async with LLMClient(config, task.note, spent) as client:

            async def check_and_work() -> None:
                await client.check_models(**wanted)
                await work(client, show)

            await client.until_deadline(check_and_work())

    with task.bar(title) as show:
        run(main(show))


def _filled_up(samples: SampleFile, task: Task, why: str) -> tuple[list[str], dict[str, Any]]:
    missing = samples.plan.target_tokens - samples.tokens
    filling = generate_texts(task.prompt, domain=task.domain, n_tokens=missing, seed=task.seed)
    task.note(f"{why}; falling back to templates for {len(filling):,} samples")
    fallback = {"to": "templates", "why": why, "samples": len(filling)}
    return samples.texts + filling, {**samples.report(), "fallback": fallback}


def refine_texts(
    texts: Sequence[str], task: Task, config: LLMConfig, n_tokens: int, cache: Path, spent: float = 0.0
) -> tuple[list[str], dict[str, Any]]:
    """The best of the texts, up to n_tokens GPT-2 tokens, and how they were chosen.

    A language model's grades are kept in the JSONL `cache`. Raises LLMError where the server gives out and
    config.fallback is "none", ValueError where no text is left.
    """
    info: dict[str, Any] = {"grader": config.grader or HEURISTICS}
    with Grades(cache, config.grader, task.prompt) as grades:
        started = time.monotonic()
        todo = grades.missing(worth_grading(texts))
        try:
            if todo:
                work = partial(ask_for_grades, grades=grades, texts=todo)
                _ask(config, task, "grading", _wanted_grader(config), work, spent)
        except KeyboardInterrupt:
            task.note(_GRADES_KEPT)
            raise
        except LLMError as error:
            if config.fallback == "none":
                raise LLMError(f"{error}; {_GRADES_KEPT}" if grades.report() else str(error)) from None
            task.note(f"{error}; falling back to heuristic grades")
            info["fallback"] = {"to": HEURISTICS, "why": str(error)}
        kept, report = refine(
            texts,
            task.prompt,
            target_tokens=n_tokens,
            count_tokens=count_gpt2_tokens,
            score=grades.score,
        )
    if config.grader:
        info |= {"grades": grades.report(), "seconds": round(time.monotonic() - started, 1)}
        task.note("grades: " + (", ".join(f"{n:,} {why}" for why, n in info["grades"].items()) or "none"))
    if not kept:
        raise ValueError(f"no text is good enough to be kept: {report}")
    task.note(str(report))
    return kept, {**asdict(report), **info}

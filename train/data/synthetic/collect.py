"""The texts that `create` trains on: made by templates or by a language model, then refined."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusedgpt.kernels.errors import InputError, installs
from fusedgpt.train.data.synthetic.grammar import generate_samples, unknown_words
from fusedgpt.train.data.synthetic.llm_answer import LLMError
from fusedgpt.train.data.synthetic.llm_config import HEURISTICS, LLMConfig
from fusedgpt.train.data.synthetic.llm_generate import SampleFile, write_samples
from fusedgpt.train.data.synthetic.llm_grade import Grades, ask_for_grades
from fusedgpt.train.data.synthetic.refine import refine, worth_grading
from fusedgpt.train.data.synthetic.task import Task, count_gpt2_tokens

_BATCH = 200  # samples whose tokens are counted at once
_CONTINUE = "run the same command to continue"


def generate_texts(task: Task, n_tokens: int) -> list[str]:
    """Template samples that together have at least n_tokens GPT-2 tokens."""
    texts: list[str] = []
    stream = generate_samples(task.prompt, domain=task.domain, seed=task.seed)
    while n_tokens > 0:
        batch = [next(stream) for _ in range(_BATCH)]
        for text, length in zip(batch, count_gpt2_tokens(batch), strict=True):
            if n_tokens > 0:
                texts.append(text)
                n_tokens -= length
    return texts


def collect(
    task: Task, config: LLMConfig, *, raw_tokens: int, refined_tokens: int, work_dir: Path
) -> tuple[list[str], dict[str, Any]]:
    """Generate and refine: the texts to train on, and their part of generation_info.json.

    Where all texts of templates are to be kept, they stay as they are: distinct and well formed.

    A language model's samples and grades are saved in work_dir/FINGERPRINT as they come in; a later call for
    the same task and model continues from there. Raises LLMError if the server fails and config.fallback is
    "none".
    """
    started = time.monotonic()
    folder = work_dir / config.fingerprint(task.prompt, task.domain, task.seed)
    texts, made = make_texts(task, config, raw_tokens, folder / "samples.jsonl")
    info = {"generation_method": config.data_source, "samples_generated": len(texts), "generation": made}
    if config.data_source == "template" and raw_tokens <= refined_tokens:
        return texts, {**info, "refinement": {"kept": len(texts), "dropped": {}, "grader": "none"}}
    if "fallback" in made:  # the server has just failed
        config = config.model_copy(update={"refine_model": HEURISTICS})
    spent = time.monotonic() - started
    kept, refined = refine_texts(texts, task, config, refined_tokens, folder / "grades.jsonl", spent)
    return kept, {**info, "refinement": refined}


def make_texts(task: Task, config: LLMConfig, n_tokens: int, path: Path) -> tuple[list[str], dict[str, Any]]:
    """Texts of n_tokens GPT-2 tokens or a little more, and how they were made.

    A language model's are saved in the JSONL `path`, which may hold some or all of them already. Raises
    LLMError as collect does, ValueError if `path` was made for another task or model.
    """
    if config.data_source == "template":
        texts = generate_texts(task, n_tokens)
        task.note(f"generated {len(texts):,} samples from templates")
        if unknown := unknown_words(task.prompt):
            about = ", ".join(unknown[:3])
            remedy = "--data-source has a language model write, `fusedgpt train FILE` reads your own text"
            task.note(f"the templates know little of {about}: {remedy}")
        return texts, {"method": "template", "versions": {"fusedgpt": version("fusedgpt")}}
    models = {"gen_model": config.gen_model}
    if config.grader is not None:  # checked now, as it is needed later
        models["refine_model"] = config.grader
    with SampleFile(task, config, n_tokens, path) as samples:
        if samples.texts:
            task.note(f"{path} already holds {samples}")
        try:
            if not samples.enough:
                with task.bar("writing") as show:
                    _use_server(config, lambda c: write_samples(c, show, samples), models, task.note)
        except KeyboardInterrupt:
            task.note(f"{samples} are kept in {path}; {_CONTINUE}")
            raise
        except LLMError as error:
            if not samples.enough:  # the time may be over just when all samples are there
                if config.fallback == "none":
                    kept = f"; {samples} are kept in {path}; {_CONTINUE}" if samples.texts else ""
                    raise LLMError(f"{error}{kept}") from None
                filling = generate_texts(task, n_tokens - samples.tokens)
                task.note(f"{error}; falling back to templates for {len(filling):,} samples")
                fallback = {"to": "templates", "why": str(error), "samples": len(filling)}
                return samples.texts + filling, {**samples.report(), "fallback": fallback}
        task.note(f"{config.gen_model} wrote {samples}: {path}")
        return samples.texts, samples.report()


def refine_texts(
    texts: Sequence[str], task: Task, config: LLMConfig, n_tokens: int, cache: Path, spent: float = 0.0
) -> tuple[list[str], dict[str, Any]]:
    """The best of the texts, up to n_tokens GPT-2 tokens, and how they were chosen.

    A language model's grades are saved in the JSONL `cache`; `spent` seconds of --timeout-total are used up.
    Raises LLMError if the server fails and config.fallback is "none", ValueError if no text is left.
    """
    info: dict[str, Any] = {"grader": config.grader or HEURISTICS}
    models = {"refine_model": config.grader}
    saved = f"the grades so far are kept; {_CONTINUE}"
    started = time.monotonic()
    with Grades(cache, config.grader, task.prompt) as grades:
        try:
            if todo := grades.missing(worth_grading(texts)):
                with task.bar("grading") as show:
                    _use_server(
                        config, lambda c: ask_for_grades(c, show, grades, todo), models, task.note, spent
                    )
        except KeyboardInterrupt:
            task.note(saved)
            raise
        except LLMError as error:
            if config.fallback == "none":
                raise LLMError(f"{error}; {saved}" if grades.report() else str(error)) from None
            task.note(f"{error}; falling back to heuristic grades")
            info["fallback"] = {"to": HEURISTICS, "why": str(error)}
        kept, report = refine(
            texts, task.prompt, target_tokens=n_tokens, count_tokens=count_gpt2_tokens, score=grades.score
        )
    if config.grader:
        info |= {"grades": grades.report(), "seconds": round(time.monotonic() - started, 1)}
        task.note("grades: " + (", ".join(f"{n:,} {why}" for why, n in info["grades"].items()) or "none"))
    if not kept:
        raise InputError(f"no text is good enough to be kept: {report}")
    task.note(str(report))
    return kept, {**asdict(report), **info}


def _use_server(*arguments: Any) -> None:
    """llm.use_server, whose packages are an extra."""
    try:
        from fusedgpt.train.data.synthetic.llm import use_server
    except ModuleNotFoundError as error:
        what = f"--data-source ollama and openai need the package {error.name}"
        raise InputError(f"{what}: {installs('llm')}") from None
    use_server(*arguments)

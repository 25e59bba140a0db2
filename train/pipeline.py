"""From a prompt, or from text files, to a model folder: the steps in order."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import sync, to_json, write_file
from fusedgpt.model.folder import check_writable, safe_name, save_folder
from fusedgpt.model.generate import sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.initialise import init_from
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, well_formed
from fusedgpt.train.config import ConfigError, RunConfig
from fusedgpt.train.data.synthetic.collect import collect
from fusedgpt.train.data.synthetic.grammar import choose_domain
from fusedgpt.train.data.synthetic.japanese import choose_language
from fusedgpt.train.data.synthetic.task import Bar, Task, no_bar
from fusedgpt.train.data.text.sources import Piece, Source
from fusedgpt.train.data.text.tokenizer_training import fitting_tokenizer
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.data.tokens.load import is_token_set, kept, load_data, tokenise
from fusedgpt.train.defaults import create_config, text_tokens
from fusedgpt.train.loop.precision import resolve_device
from fusedgpt.train.loop.sampling import Sampler
from fusedgpt.train.loop.trainer import TrainingSummary, count_steps, train
from fusedgpt.train.report.model_card import model_card
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.run.directory import TEXTS, Run, run_path, versions
from fusedgpt.train.run.follower import opened_run
from fusedgpt.train.run.signals import Stopped, StopSignals
from fusedgpt.train.run.world import ALONE, World
from fusedgpt.train.tools import estimate, scaling
from fusedgpt.train.tools.quality import Quality, judge

GENERATION_METHODS = ("template", "ollama", "openai")
TEST_PROMPTS = {"en": ("", "The", "Today"), "ja": ("", "今日は")}
_TEST_SAMPLING: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 40}
_OPENING = 24  # tokens, and then characters
_DATA_DIR = ".data"  # in the output directory: what a language model wrote and graded, kept for a restart


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The model folder, how training went, and what the model writes after the test prompts.

    Of several ranks all have the same.
    """

    model_path: Path
    run_path: Path
    summary: TrainingSummary
    samples: dict[str, str]  # test prompt -> prompt and continuation
    opening: str = ""  # how the training text begins, and a longer continuation
    quality: dict[str, Any] | None = None  # Quality.as_dict, of `create` with templates

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        paths = {"model_path": str(self.model_path), "run_path": str(self.run_path)}
        return {
            **paths,
            **self.summary.as_dict(),
            "samples": self.samples,
            "opening": self.opening,
            "quality": self.quality,
        }


def run_full_pipeline(
    prompt: str,
    config: RunConfig | None = None,
    output_dir: Path = Path("models"),
    generation_method: str | None = None,
    monitor: Monitor | None = None,
    *,
    name: str | None = None,
    run_dir: Path | None = None,
    resume: Path | None = None,
    profile: bool = False,
    bar: Bar = no_bar,
    world: World = ALONE,
) -> TrainingResult:
    """Prompt -> data, refinement, tokenizer, dataset, GPT, training, test samples, model folder.

    generation_method: "template", "ollama" or "openai", in place of config.llm.data_source. name: of the
    folders of run and model, else domain and time. run_dir: where checkpoints and metrics go, else a new
    folder in runs/; the model's is called like it. resume: a run directory or checkpoint, see find_run.
    profile: trace a few steps. world: the ranks that train together. Raises ValueError for options
    that exclude each other, OSError where output_dir cannot be written (before training), LLMError where the
    language model's server fails, and what train raises.
    """
    config = _with_source(config or create_config({}), generation_method)
    monitor = monitor or Monitor(quiet=True)
    resolve_device(world.device(config.train.device))  # raises before anything is written
    if world.first:
        check_writable(output_dir)
    domain = choose_domain(prompt)
    command = {"command": "create", "prompt": prompt}
    path = run_path(domain, name, run_dir, resume) if world.first else Path()
    with opened_run(world, path, config, command, resume, output_dir) as run:
        monitor.note(f"domain: {domain}")
        task = Task(prompt=prompt, domain=domain, seed=config.train.seed, note=monitor.note, bar=bar)
        texts, provenance = world.from_first(lambda: _texts_of_run(run, task, config, output_dir / _DATA_DIR))
        prompts = TEST_PROMPTS[choose_language(prompt)]
        tokenizer = _tokenizer_for(texts, prompts, config)
        monitor.note(f"tokenizer: {tokenizer.vocab_size:,} ids")
        dataset_json = json.dumps({**provenance, "samples": texts}, ensure_ascii=False, indent=1) + "\n"
        if world.first:
            write_file(run.path / TEXTS, dataset_json)
        dataset = tokenise((Piece(text, True) for text in texts), tokenizer, config)
        model = _new_model(config, tokenizer, monitor)
        by_templates = config.llm.data_source == "template"
        job = _Job(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            config=config,
            run=run,
            monitor=monitor,
            output_dir=output_dir,
            world=world,
            provenance=provenance,
            files={TEXTS: dataset_json, "dataset.txt": "\n\n".join(texts) + "\n"},
            test_prompts=prompts,
            judged=(lambda: judge(model, tokenizer, task, texts)) if by_templates else None,
        )
        return _train_and_save(job, profile=profile)


def _with_source(config: RunConfig, method: str | None) -> RunConfig:
    """config with this source of texts, if it is given."""
    if method is None:
        return config
    if method not in GENERATION_METHODS:
        methods = ", ".join(GENERATION_METHODS)
        raise InputError(f"no generation method {method!r}; there are {methods}")
    return config.model_copy(update={"llm": config.llm.model_copy(update={"data_source": method})})


def _tokenizer_for(texts: Sequence[str], prompts: Sequence[str], config: RunConfig) -> Tokenizer:
    if config.data.tokenizer == "auto":
        return fitting_tokenizer(texts)
    return build_tokenizer(config.data.tokenizer, text="\n".join([*texts, *prompts]))


def _texts_of_run(
    run: Run, task: Task, config: RunConfig, work_dir: Path
) -> tuple[list[str], dict[str, Any]]:
    """(the refined texts, how they were made); a resumed run keeps those it began with."""
    kept = run.path / TEXTS
    if run.resumed is not None and kept.is_file():
        provenance = json.loads(kept.read_text(encoding="utf-8"))
        return provenance.pop("samples"), provenance
    raw, refined = text_tokens(config, choose_language(task.prompt))
    texts, made = collect(task, config.llm, raw_tokens=raw, refined_tokens=refined, work_dir=work_dir)
    return texts, {"prompt": task.prompt, "domain": task.domain, **made}


def train_on_files(
    paths: Sequence[Path],
    config: RunConfig,
    output_dir: Path = Path("models"),
    monitor: Monitor | None = None,
    *,
    name: str | None = None,
    run_dir: Path | None = None,
    resume: Path | None = None,
    profile: bool = False,
    world: World = ALONE,
) -> TrainingResult:
    """Text files, folders of them, or token sets -> dataset, GPT, training, test samples, model folder.

    name, run_dir, resume, profile, world: as in run_full_pipeline. Raises FileNotFoundError or ValueError for
    unusable text, OSError where output_dir cannot be written, and what train raises.
    """
    monitor = monitor or Monitor(quiet=True)
    if world.size > 1:
        Source(inputs=tuple(paths)).check_rereadable("every rank reads the text")
    resolve_device(world.device(config.train.device))  # raises before anything is read
    with ExitStack() as stack:
        files = stack.enter_context(kept(paths))
        dataset, tokenizer = load_data(files, config, monitor.note)
        if world.first:
            check_writable(output_dir)
        documents = dataset.train_documents + dataset.val_documents
        provenance = {"data": [well_formed(str(path)) for path in paths], "documents": documents}
        count_steps(dataset, config.train)  # raises before anything is written or allocated
        model = _new_model(config, tokenizer, monitor)
        path = run_path(config.model.name, name, run_dir, resume) if world.first else Path()
        copies = {file: path / file.name for file in files if file not in paths}  # a resume reads them
        command = {"command": "train", "data": [str(copies.get(file, file).resolve()) for file in files]}
        run = stack.enter_context(opened_run(world, path, config, command, resume, output_dir))
        for file, copy in copies.items():
            if run.resumed is None or not copy.exists():
                shutil.move(file, copy)
                sync(copy)
        job = _Job(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            config=config,
            run=run,
            monitor=monitor,
            output_dir=output_dir,
            world=world,
            provenance=provenance,
        )
        return _train_and_save(job, profile=profile)


def _new_model(config: RunConfig, tokenizer: Tokenizer, monitor: Monitor) -> GPT:
    """A model with random weights, or with those of --init-from."""
    gpt_config = config.model.gpt_config(tokenizer.vocab_size, trained_length=config.max_length)
    if config.model.init_from is None:
        return GPT(gpt_config, seed=config.train.seed)
    return init_from(Path(config.model.init_from), gpt_config, tokenizer, note=monitor.note)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What both pipelines train and save."""

    model: GPT
    tokenizer: Tokenizer
    dataset: TokenDataset
    config: RunConfig
    run: Run
    monitor: Monitor
    output_dir: Path  # of the model's folder
    world: World
    provenance: dict[str, Any]  # for generation_info.json
    files: dict[str, str] = field(default_factory=dict)  # further ones for the model's folder: name -> text
    test_prompts: Sequence[str] = TEST_PROMPTS["en"]
    judged: Callable[[], Quality] | None = None  # after training


def _train_and_save(job: _Job, *, profile: bool) -> TrainingResult:
    config, run, world, monitor = job.config, job.run, job.world, job.monitor
    settings = {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }
    fingerprint = {"training text": job.dataset.fingerprint}
    world.check_alike({**versions(), **settings, **fingerprint}, config.train.device)
    started = datetime.now(UTC)
    monitor.note(f"run directory: {run.path}")
    monitor.note(f"dataset: {job.dataset}")
    total, without_embeddings = job.model.config.parameter_counts()
    monitor.note(f"model: {total:,} parameters, {without_embeddings:,} without embeddings")
    sampler = Sampler.from_config(config, job.tokenizer)
    options: dict[str, Any] = {"sampler": sampler, "profile": profile and world.first, "world": world}
    summary = train(job.model, job.dataset, config.train, monitor, run, **options)
    if summary.best_step not in (None, summary.steps):
        monitor.note(f"kept the weights of step {summary.best_step}, the best validated")
    if summary.final_loss > (guessing := math.log(job.tokenizer.vocab_size)) + 1.0:
        monitor.note(f"the loss is above {guessing:.2f}, that of a guess: it diverged; lower --learning-rate")
    result = world.from_first(lambda: _save(job, summary, started))
    rest: dict[str, Any] = {name: result[name] for name in ("samples", "opening", "quality")}
    rest |= {name: Path(result[name]) for name in ("model_path", "run_path")}
    return TrainingResult(summary=summary, **rest)


def _save(job: _Job, summary: TrainingSummary, started: datetime) -> dict[str, Any]:
    """Write the model folder and end the run; the result as TrainingResult.as_dict."""
    model, tokenizer, config, run = job.model, job.tokenizer, job.config, job.run
    total, without_embeddings = model.config.parameter_counts()
    with StopSignals() as stop:  # from here on a signal costs the samples, not the model
        samples = _test_samples(model, tokenizer, job.test_prompts, config.train.seed, stop)
        opening = "" if stop.requested() else _opening(model, tokenizer, job.dataset, config.train.seed)
        quality = job.judged().as_dict() if job.judged is not None and not stop.requested() else None
        info = {
            **job.provenance,
            "created": started.isoformat(timespec="seconds"),
            "config": config.model_dump(),
            "parameters": {"total": total, "without_embeddings": without_embeddings},
            "tokens": {"train": len(job.dataset.train), "validation": len(job.dataset.val)},
            "training": summary.as_dict(),
            "samples": samples,
            "opening": opening,
            **({} if quality is None else {"quality": quality}),
            "versions": versions(),
        }
        generation_info = to_json(info, ensure_ascii=False, indent=2) + "\n"
        files = {**job.files, "generation_info.json": generation_info, "README.md": model_card(info, config)}
        with run.model_not_lost():
            path = save_folder(model, tokenizer, job.output_dir, safe_name(run.path.name), extra=files)
        made = TrainingResult(
            model_path=path,
            run_path=run.path,
            summary=summary,
            samples=samples,
            opening=opening,
            quality=quality,
        )
        result = made.as_dict()
        for problem in run.finish(result):
            job.monitor.note(problem)
    if stop.received is not None:
        raise Stopped(f"stopped after training; the model folder is {path}", stop.received)
    return result


def _test_samples(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], seed: int, stop: StopSignals
) -> dict[str, str]:
    """Continuations of the test prompts, by prompt, until a signal comes."""
    samples: dict[str, str] = {}
    for prompt in prompts:
        try:
            tokenizer.encode(prompt)
        except ValueError:  # a character vocabulary may lack a letter
            continue
        if not stop.requested():
            samples[prompt] = sample_texts(model, tokenizer, prompt, seed=seed, **_TEST_SAMPLING)[0]
    return samples


def _opening(model: GPT, tokenizer: Tokenizer, dataset: TokenDataset, seed: int) -> str:
    """The first line or few words of the training text, and how the model goes on."""
    ids = [int(one) for one in dataset.train[:_OPENING] if int(one) != tokenizer.eot_id]
    first = tokenizer.decode(ids).strip().partition("\n")[0][:_OPENING].rstrip()
    return sample_texts(model, tokenizer, first, seed=seed, **{**_TEST_SAMPLING, "max_new_tokens": 150})[0]


def draw_schedule(config: RunConfig, paths: Sequence[Path], png: Path) -> Path:
    """Plot a run's learning rates into `png`. Raises ConfigError where the number of steps is unknown."""
    from fusedgpt.train.report.plots import plot_schedule

    steps = config.train.steps
    if steps is None and not paths:
        raise ConfigError("how long is the run? give --steps, or --data to count its epochs")
    if steps is None:
        steps, _ = count_steps(load_data(paths, config)[0], config.train)
    return plot_schedule(config.train, steps, png)


def estimates(config: RunConfig, paths: Sequence[Path]) -> tuple[list[estimate.Row], list[scaling.Scaled]]:
    """What `train --estimate` shows: a step on one card, on several.

    Raises ConfigError for a character vocabulary without text.
    """
    if config.data.tokenizer == "char" and not paths:
        raise ConfigError("how many characters are there? give --data")
    from_data = config.data.tokenizer == "char" or any(map(is_token_set, paths))
    tokenizer = load_data(paths, config)[1] if from_data else build_tokenizer(config.data.tokenizer)
    device = resolve_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    gpt_config = config.model.gpt_config(tokenizer.vocab_size, trained_length=config.max_length)
    step = gpt_config, config.train, config.max_length
    card_bytes = math.inf
    if device.type == "cuda":
        card_bytes = scaling.USABLE_MEMORY * torch.cuda.get_device_properties(device).total_memory
    card = name if device.type == "cuda" else scaling.ASSUMED
    return estimate.estimate(*step, name), scaling.scale(*step, card, card_bytes=card_bytes)

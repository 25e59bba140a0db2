"""From a prompt, or from text files, to a model folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fusedgpt.model.folder import check_writable, safe_name, save_folder
from fusedgpt.model.generate import sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.initialise import init_from
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer
from fusedgpt.train.config import ConfigError, RunConfig, create_config
from fusedgpt.train.data.synthetic.collect import collect
from fusedgpt.train.data.synthetic.grammar import choose_domain
from fusedgpt.train.data.synthetic.task import Bar, Task, no_bar
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.data.tokens.load import is_token_set, load_data, tokenise
from fusedgpt.train.loop.precision import resolve_device
from fusedgpt.train.loop.trainer import TrainingSummary, count_steps, train
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.run.directory import Run, directory_of, new_run_path, open_run, versions
from fusedgpt.train.run.signals import Stopped, StopSignals
from fusedgpt.train.tools.estimate import estimate, table

GENERATION_METHODS = ("template", "ollama", "openai")
TEST_PROMPTS = ("", "The", "Today")
_TEST_SAMPLING: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 40}
# GPT-2 tokens to generate and to keep, by preset; larger presets take the last.
_TOKEN_TARGETS = {"12M": (30_000, 15_000), "33M": (50_000, 25_000), "117M": (100_000, 50_000)}
_DATA_DIR = ".data"  # in the output directory: what a model wrote and graded, so that it goes on from there


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a pipeline made: the folder, how training went, and what the model says to the test prompts."""

    model_path: Path
    run_path: Path
    summary: TrainingSummary
    samples: dict[str, str]  # test prompt -> prompt and continuation

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        paths = {"model_path": str(self.model_path), "run_path": str(self.run_path)}
        return {**paths, **self.summary.as_dict(), "samples": self.samples}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run keeps its checkpoints, and whether it goes on with an older one."""

    run_dir: Path | None = None  # None: a new one below runs/
    resume: Path | None = None  # see run.find_run
    profile: bool = False

    def path(self, name: str) -> Path:
        """The run's directory; `name` names a new one."""
        if self.resume is not None:
            return directory_of(self.resume)
        return self.run_dir or new_run_path(name)


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What a model is made of."""

    model: GPT
    tokenizer: Tokenizer
    dataset: TokenDataset
    name: str  # of the model folder
    provenance: dict[str, Any]  # for generation_info.json
    files: dict[str, str]  # for the model folder, name -> text


def run_full_pipeline(
    prompt: str,
    config: RunConfig | None = None,
    output_dir: Path = Path("models"),
    generation_method: str | None = None,
    monitor: Monitor | None = None,
    options: RunOptions = RunOptions(),
    bar: Bar = no_bar,
) -> TrainingResult:
    """Prompt -> tokenizer, data, refinement, dataset, GPT, training, test samples, model folder.

    generation_method: "template", "ollama" or "openai" in place of config.llm.data_source, which must be a
    server's already where config.llm has settings of one. Returns where the
    model is and how it did. Raises ValueError for options at odds, OSError where output_dir cannot be written
    (before training), LLMError where a language model's server gives out, and what train raises.
    """
    config = config or create_config({})
    if generation_method is not None:
        config = _with_method(config, generation_method)
    monitor = monitor or Monitor(quiet=True)
    check_writable(output_dir)
    domain = choose_domain(prompt)
    told = {"command": "create", "prompt": prompt}
    with open_run(options.path(domain), config, told, resume=options.resume) as run:
        monitor.note(f"domain: {domain}")
        task = Task(prompt=prompt, domain=domain, seed=config.train.seed, note=monitor.note, bar=bar)
        texts, provenance = _texts_of_run(run, task, config, output_dir / _DATA_DIR)
        tokenizer = build_tokenizer(config.data.tokenizer, text="\n".join([*texts, *TEST_PROMPTS]))
        dataset_json = json.dumps({**provenance, "samples": texts}, ensure_ascii=False, indent=1) + "\n"
        files = {"dataset.json": dataset_json, "dataset.txt": "\n\n".join(texts) + "\n"}
        (run.path / "dataset.json").write_text(dataset_json, encoding="utf-8")
        dataset = tokenise(texts, tokenizer, config)
        material = _Material(
            model=_begin_model(config, tokenizer, monitor),
            tokenizer=tokenizer,
            dataset=dataset,
            name=domain,
            provenance=provenance,
            files=files,
        )
        return _train_and_save(material, config, output_dir, run, monitor, profile=options.profile)


def _texts_of_run(
    run: Run, task: Task, config: RunConfig, work_dir: Path
) -> tuple[list[str], dict[str, Any]]:
    """The refined texts and where they are from: those the run was begun with, or new ones."""
    kept = run.path / "dataset.json"
    if run.resumed is not None and kept.is_file():
        provenance = json.loads(kept.read_text(encoding="utf-8"))
        return provenance.pop("samples"), provenance
    raw_tokens, refined_tokens = _token_targets(config)
    texts, made = collect(
        task, config.llm, raw_tokens=raw_tokens, refined_tokens=refined_tokens, work_dir=work_dir
    )
    return texts, {"prompt": task.prompt, "domain": task.domain, **made}


def _with_method(config: RunConfig, method: str) -> RunConfig:
    if method not in GENERATION_METHODS:
        raise ValueError(f"no generation method {method!r}; there are {', '.join(GENERATION_METHODS)}")
    return config.model_copy(update={"llm": config.llm.model_copy(update={"data_source": method})})


def train_on_files(
    paths: Sequence[Path],
    config: RunConfig,
    output_dir: Path = Path("models"),
    monitor: Monitor | None = None,
    options: RunOptions = RunOptions(),
) -> TrainingResult:
    """Text files, folders of them, or token sets -> dataset, GPT, training, test samples, model folder.

    Raises FileNotFoundError or ValueError for unusable text, OSError where output_dir cannot be written, and
    what train raises.
    """
    monitor = monitor or Monitor(quiet=True)
    dataset, tokenizer = load_data(paths, config)
    check_writable(output_dir)
    name = config.model.name
    documents = dataset.train_documents + dataset.val_documents
    provenance = {"data": [str(path) for path in paths], "documents": documents}
    told = {"command": "train", "data": [str(path.resolve()) for path in paths]}
    count_steps(dataset, config.train)  # before anything is written or allocated
    material = _Material(
        model=_begin_model(config, tokenizer, monitor),
        tokenizer=tokenizer,
        dataset=dataset,
        name=name,
        provenance=provenance,
        files={},
    )
    with open_run(options.path(name), config, told, resume=options.resume) as run:
        return _train_and_save(material, config, output_dir, run, monitor, profile=options.profile)


def _train_and_save(
    material: _Material,
    config: RunConfig,
    output_dir: Path,
    run: Run,
    monitor: Monitor,
    *,
    profile: bool,
) -> TrainingResult:
    started = datetime.now(UTC)
    model, dataset, tokenizer, seed = material.model, material.dataset, material.tokenizer, config.train.seed
    monitor.note(f"run directory: {run.path}")
    monitor.note(f"dataset: {dataset}")
    total, without_embeddings = model.config.parameter_counts()
    monitor.note(f"model: {total:,} parameters, {without_embeddings:,} without embeddings")
    summary = train(model, dataset, config.train, monitor, run, profile=profile)
    if summary.best_step not in (None, summary.steps):
        monitor.note(f"kept the weights of step {summary.best_step}, the best validated")
    with StopSignals() as stop:  # from here on a signal costs the samples, not the model
        samples = _test_samples(model, tokenizer, seed, stop)
        info = {
            **material.provenance,
            "created": started.isoformat(timespec="seconds"),
            "config": config.model_dump(),
            "parameters": {"total": total, "without_embeddings": without_embeddings},
            "tokens": {"train": len(dataset.train), "validation": len(dataset.val)},
            "training": summary.as_dict(),
            "samples": samples,
            "versions": versions(),
        }
        files = {
            **material.files,
            "generation_info.json": json.dumps(info, ensure_ascii=False, indent=2) + "\n",
            "README.md": model_card(info, config),
        }
        folder_name = f"{safe_name(material.name)}_{time.strftime('%Y%m%d_%H%M%S')}"
        path = save_folder(model, tokenizer, output_dir, folder_name, extra=files)
        run.finish()
    if stop.received is not None:
        raise Stopped(f"stopped after training; the model folder is {path}", stop.received)
    return TrainingResult(model_path=path, run_path=run.path, summary=summary, samples=samples)


def _begin_model(config: RunConfig, tokenizer: Tokenizer, monitor: Monitor) -> GPT:
    """A new model, or that of --init-from."""
    gpt_config = config.model.gpt_config(tokenizer.vocab_size, trained_length=config.max_length)
    if config.model.init_from is None:
        return GPT(gpt_config, seed=config.train.seed)
    return init_from(Path(config.model.init_from), gpt_config, tokenizer, note=monitor.note)


def _test_samples(model: GPT, tokenizer: Tokenizer, seed: int, stop: StopSignals) -> dict[str, str]:
    samples: dict[str, str] = {}
    for prompt in _encodable(TEST_PROMPTS, tokenizer):
        if not stop.requested():
            samples[prompt] = sample_texts(model, tokenizer, prompt, seed=seed, **_TEST_SAMPLING)[0]
    return samples


def draw_schedule(config: RunConfig, paths: Sequence[Path], png: Path) -> Path:
    """The learning rate over the run, drawn into `png`. Raises ConfigError where its length is not known."""
    from fusedgpt.train.report.plots import plot_schedule

    steps = config.train.steps
    if steps is None and not paths:
        raise ConfigError("how long is the run? give --steps, or --data to count its epochs")
    if steps is None:
        steps, _ = count_steps(load_data(paths, config)[0], config.train)
    return plot_schedule(config.train, steps, png)


def estimate_rows(config: RunConfig, paths: Sequence[Path]) -> list[dict[str, str]]:
    """What `train --estimate` prints. Raises ConfigError for a vocabulary that needs text and has none."""
    if config.data.tokenizer == "char" and not paths:
        raise ConfigError("how many characters are there? give --data")
    from_data = config.data.tokenizer == "char" or any(map(is_token_set, paths))
    tokenizer = load_data(paths, config)[1] if from_data else build_tokenizer(config.data.tokenizer)
    vocab_size = tokenizer.vocab_size
    device = resolve_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    gpt_config = config.model.gpt_config(vocab_size, trained_length=config.max_length)
    return table(estimate(gpt_config, config.train, config.max_length, name))


def _token_targets(config: RunConfig) -> tuple[int, int]:
    raw, refined = _TOKEN_TARGETS.get(config.model.preset, _TOKEN_TARGETS["117M"])
    return config.data.raw_tokens or raw, config.data.refined_tokens or refined


def _encodable(prompts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The prompts that the tokenizer has ids for: a character vocabulary may lack a letter."""
    usable = []
    for prompt in prompts:
        try:
            tokenizer.encode(prompt)
        except ValueError:
            continue
        usable.append(prompt)
    return usable


def loss_text(loss: float | None) -> str:
    """A validation loss for people, who may have held nothing out."""
    return "none held out" if loss is None else f"{loss:.4f} nats a token"


def _source(info: dict[str, Any]) -> str:
    """What a model was trained on, in words."""
    if "prompt" not in info:
        return f"{info['documents']:,} document(s) of its maker's"
    made = info["generation"]
    writers = [f"`{made['model']}`"] if "model" in made else []
    writers += ["templates"] if "fallback" in made or not writers else []
    return f"text that {' and '.join(writers)} wrote for the prompt `{info['prompt'][:200]!r}`"


def model_card(info: dict[str, Any], config: RunConfig) -> str:
    """The README.md of a model folder."""
    training, tokens, parameters = info["training"], info["tokens"], info["parameters"]
    folder = config.model.init_from
    beginning = "from scratch" if folder is None else f"on from the weights of `{Path(folder).name}`"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, fusedgpt]
---
# A small GPT-2 made with fusedgpt

Trained {beginning} on {_source(info)}.

| | |
|---|---|
| parameters | {parameters["total"]:,}, {parameters["without_embeddings"]:,} of them outside the embeddings |
| training | {tokens["train"]:,} tokens, {training["steps"]:,} steps |
| validation loss | {loss_text(training["best_val_loss"])} |
| window | {config.max_length} tokens; positions past it were never trained |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("PATH") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=40)[0]))
```
"""

"""From a prompt, or from text files, to a model folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusedgpt.model.folder import check_writable, safe_name, save_folder
from fusedgpt.model.generate import sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, gpt2_tokenizer
from fusedgpt.train.config import RunConfig, build_config
from fusedgpt.train.data.generate import choose_domain, generate_samples
from fusedgpt.train.data.prepare import read_documents, tokenise
from fusedgpt.train.data.refine import refine
from fusedgpt.train.monitor import Monitor
from fusedgpt.train.trainer import TrainingSummary, train

GENERATION_METHODS = ("template",)
TEST_PROMPTS = ("", "The", "Today")
_TEST_SAMPLING: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 40}
# GPT-2 tokens to generate and to keep, by preset; larger presets take the last.
_TOKEN_TARGETS = {"12M": (30_000, 15_000), "33M": (50_000, 25_000), "117M": (100_000, 50_000)}
_SAMPLES_A_ROUND = 200


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a pipeline made: the folder, how training went, and what the model says to the test prompts."""

    model_path: Path
    summary: TrainingSummary
    samples: dict[str, str]  # test prompt -> prompt and continuation

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"model_path": str(self.model_path), **self.summary.as_dict(), "samples": self.samples}


def create_config(options: Mapping[str, Any]) -> RunConfig:
    """The configuration of `create` for flat options: short windows and a higher rate suit its short texts.

    Raises ConfigError as build_config does.
    """
    block_size = options.get("block_size")
    max_length = min(128, max(1, block_size)) if isinstance(block_size, int) else 128
    return build_config(options, {"max_length": max_length, "learning_rate": 6e-4})


def run_full_pipeline(
    prompt: str,
    config: RunConfig | None = None,
    output_dir: Path = Path("models"),
    generation_method: str = "template",
    monitor: Monitor | None = None,
) -> TrainingResult:
    """Prompt -> tokenizer, data, refinement, dataset, GPT, training, test samples, model folder.

    generation_method: "template", the grammars that ship with fusedgpt. Returns where the model is and how it
    did. Raises ValueError for options at odds, OSError where output_dir cannot be written (before training).
    """
    if generation_method not in GENERATION_METHODS:
        raise ValueError(f"no generation method {generation_method!r}; there is {GENERATION_METHODS[0]}")
    config = config or create_config({})
    monitor = monitor or Monitor(quiet=True)
    check_writable(output_dir)
    raw_tokens, refined_tokens = _token_targets(config)

    domain = choose_domain(prompt)
    monitor.note(f"domain: {domain}")
    raw = generate_texts(prompt, domain=domain, n_tokens=raw_tokens, seed=config.train.seed)
    monitor.note(f"generated {len(raw):,} samples from templates")
    texts, report = refine(raw, prompt, target_tokens=refined_tokens, count_tokens=count_gpt2_tokens)
    monitor.note(str(report))
    tokenizer = build_tokenizer(config.data.tokenizer, text="\n".join([*texts, *TEST_PROMPTS]))
    provenance = {
        "prompt": prompt,
        "domain": domain,
        "generation_method": generation_method,
        "samples_generated": len(raw),
        "refinement": asdict(report),
    }
    dataset_json = json.dumps({**provenance, "samples": texts}, ensure_ascii=False, indent=1) + "\n"
    files = {"dataset.json": dataset_json, "dataset.txt": "\n\n".join(texts) + "\n"}
    return _train_and_save(texts, tokenizer, config, output_dir, domain, provenance, files, monitor)


def train_on_files(
    paths: Sequence[Path],
    config: RunConfig,
    output_dir: Path = Path("models"),
    monitor: Monitor | None = None,
) -> TrainingResult:
    """Text files, or folders of them -> dataset, GPT, training, test samples, model folder.

    Raises FileNotFoundError or ValueError for unusable text, OSError where output_dir cannot be written.
    """
    monitor = monitor or Monitor(quiet=True)
    texts = read_documents(paths)
    check_writable(output_dir)
    tokenizer = build_tokenizer(config.data.tokenizer, text="".join(texts))
    provenance = {"data": [str(path) for path in paths], "documents": len(texts)}
    return _train_and_save(texts, tokenizer, config, output_dir, config.model.name, provenance, {}, monitor)


def _train_and_save(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    config: RunConfig,
    output_dir: Path,
    name: str,
    provenance: dict[str, Any],
    files: dict[str, str],
    monitor: Monitor,
) -> TrainingResult:
    started = datetime.now(UTC)
    dataset = tokenise(texts, tokenizer, config)
    monitor.note(f"dataset: {dataset}")
    gpt_config = config.model.gpt_config(tokenizer.vocab_size, trained_length=config.max_length)
    total, without_embeddings = gpt_config.parameter_counts()
    monitor.note(f"model: {total:,} parameters, {without_embeddings:,} without embeddings")
    model = GPT(gpt_config, seed=config.train.seed)
    summary = train(model, dataset, config.train, monitor)
    samples = {
        p: sample_texts(model, tokenizer, p, seed=config.train.seed, **_TEST_SAMPLING)[0]
        for p in _encodable(TEST_PROMPTS, tokenizer)
    }
    info = {
        **provenance,
        "created": started.isoformat(timespec="seconds"),
        "config": config.model_dump(),
        "parameters": {"total": total, "without_embeddings": without_embeddings},
        "tokens": {"train": len(dataset.train), "validation": len(dataset.val)},
        "training": summary.as_dict(),
        "samples": samples,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("fusedgpt", "torch")},
    }
    files = {
        **files,
        "generation_info.json": json.dumps(info, ensure_ascii=False, indent=2) + "\n",
        "README.md": model_card(info, config),
    }
    folder_name = f"{safe_name(name)}_{time.strftime('%Y%m%d_%H%M%S')}"
    path = save_folder(model, tokenizer, output_dir, folder_name, extra=files)
    return TrainingResult(model_path=path, summary=summary, samples=samples)


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


def count_gpt2_tokens(texts: list[str]) -> list[int]:
    """How many GPT-2 tokens each text has, whatever tokenizer the model uses."""
    return [len(ids) for ids in gpt2_tokenizer().encode_batch(texts)]


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


def model_card(info: dict[str, Any], config: RunConfig) -> str:
    """The README.md of a model folder."""
    training, tokens, parameters = info["training"], info["tokens"], info["parameters"]
    source = (
        f"the prompt `{info['prompt'][:200]!r}`" if "prompt" in info else f"{info['documents']} text file(s)"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, fusedgpt]
---
# A small GPT-2 made with fusedgpt

Trained from scratch on {source}.

| | |
|---|---|
| parameters | {parameters["total"]:,}, {parameters["without_embeddings"]:,} of them outside the embeddings |
| training | {tokens["train"]:,} tokens, {training["steps"]:,} steps |
| validation loss | {loss_text(training["val_loss"])} |
| window | {config.max_length} tokens; positions past it were never trained |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("PATH") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=40)[0]))
```
"""

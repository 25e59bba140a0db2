"""The README.md of a model folder, and what a list of models says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusedgpt.train.config import RunConfig


def loss_text(loss: float | None) -> str:
    """A validation loss in words; None where nothing was held out."""
    return "none held out" if loss is None else f"{loss:.4f} nats per token"


def quality_text(quality: dict[str, Any]) -> str:
    """What `create` found at the end, in words; quality: as Quality.as_dict."""
    bits, well_formed = quality["bits_per_byte"], round(quality["well_formed"] * quality["sampled"])
    unseen = "" if bits is None else f"{bits:.3f} bits per byte of unseen text, "
    copied = round(quality["copied"] * quality["sampled"])
    return (
        f"{unseen}{well_formed} of {quality['sampled']} sampled texts well formed, {copied} seen in training"
    )


def origin(folder: Path) -> dict[str, Any]:
    """val_loss and prompt of a model folder; None for what its generation_info.json does not say."""
    try:
        info = json.loads((folder / "generation_info.json").read_text(encoding="utf-8"))
        return {"val_loss": info["training"]["best_val_loss"], "prompt": info.get("prompt")}
    except (OSError, ValueError, TypeError, KeyError):  # saved by transformers, or changed by hand
        return {"val_loss": None, "prompt": None}


def model_card(info: dict[str, Any], config: RunConfig) -> str:
    """The text of README.md; info: the content of generation_info.json."""
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
{_quality_row(info)}| window | {config.max_length} tokens; positions past it were never trained |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("PATH") for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=40)[0]))
```
"""


def _quality_row(info: dict[str, Any]) -> str:
    return f"| quality | {quality_text(info['quality'])} |\n" if "quality" in info else ""


def _source(info: dict[str, Any]) -> str:
    """The training text in words."""
    if "prompt" not in info:
        return f"{info['documents']:,} document(s)"
    made = info["generation"]
    writers = [f"`{made['model']}`"] if "model" in made else []
    writers += ["templates"] if "fallback" in made or not writers else []
    return f"text that {' and '.join(writers)} wrote for the prompt `{info['prompt'][:200]!r}`"

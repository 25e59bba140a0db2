"""Initial weights from any GPT-2 folder in Hugging Face's layout, fitted to the run's settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.folder import load_model
from fusedgpt.model.gpt import GPT, Embedding
from fusedgpt.model.hf_config import ModelFolderError, read_config
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.model.tokenizer_json import load_tokenizer

# settings that a run may change; the weights determine the others
_CHANGEABLE = ("block_size", "trained_length", "dropout", "layer_norm_epsilon")
_MAX_PADDING = 1024  # ids that other tools may add to a vocabulary


def init_from(
    folder: Path,
    config: GPTConfig,  # of fitted_config
    tokenizer: Tokenizer,
    *,
    note: Callable[[str], None] = warnings.warn,
) -> GPT:
    """The folder's model with its context cropped or extended to config.block_size, in fp32 on the CPU.

    An extended context repeats the position embeddings (Beltagy et al. 2020, section 5), which then need
    training; `note` gets a line about it. Raises ModelFolderError for a damaged folder, or a tokenizer other
    than the one its weights were trained with.
    """
    stored = read_config(folder)
    check_tokenizer(folder, stored, tokenizer)
    model = load_model(folder)
    if config.block_size < stored.block_size:
        note(f"{folder}: context cropped from {stored.block_size} to {config.block_size} positions")
    elif config.block_size > stored.block_size:
        note(
            f"{folder}: context extended from {stored.block_size} to {config.block_size} positions; "
            f"the new ones repeat the old until they are trained"
        )
    model.config = config
    rows = torch.arange(config.block_size) % stored.block_size
    positions = model.wpe.weight.detach()[rows]
    model.wpe = Embedding(config.block_size, config.n_embd, _weight=positions)
    return model


def fitted_config(folder: Path, overrides: Mapping[str, Any]) -> GPTConfig:
    """The folder's GPTConfig with the fields of `overrides` that are not None.

    Raises ModelFolderError for a damaged config.json or a shape that is not the folder's, ValueError for a
    context below 1.
    """
    stored = read_config(folder)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    for name, value in overrides.items():
        if name not in _CHANGEABLE and value != getattr(stored, name):
            raise ModelFolderError(
                f"{folder}: its weights have {name} {getattr(stored, name)}, not {value}: "
                f"leave that setting out"
            )
    merged = {**stored.model_dump(), **overrides}
    seen = min(stored.window, merged["block_size"])  # shorter training windows keep longer ones usable
    merged["trained_length"] = max(seen, overrides.get("trained_length") or 0)
    return GPTConfig(**merged)


def check_tokenizer(folder: Path, config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Raise ModelFolderError if the ids of `tokenizer` are not those of the folder's weights."""
    if not config.vocab_size - _MAX_PADDING < tokenizer.vocab_size <= config.vocab_size:
        raise ModelFolderError(
            f"{folder}: its weights are for {config.vocab_size} ids, the tokenizer has "
            f"{tokenizer.vocab_size}: use --tokenizer {folder}"
        )
    try:
        its_own = load_tokenizer(folder)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ModelFolderError(f"{folder}: {error}") from None
    ids = range(max(tokenizer.vocab_size, its_own.vocab_size))
    wrong = next((i for i in ids if _text(tokenizer, i) != _text(its_own, i)), None)
    if wrong is not None:
        raise ModelFolderError(
            f"{folder}: token {wrong} is {_text(its_own, wrong)!r} to its weights, but "
            f"{_text(tokenizer, wrong)!r} to the tokenizer: use --tokenizer {folder}"
        )


def _text(tokenizer: Tokenizer, i: int) -> str | None:
    try:
        return tokenizer.decode([i])
    except ValueError:  # no such id
        return None

"""Defaults of commands: of `train` by optimizer, of `create` by the texts' source and the model's size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fusedgpt.train.config import RunConfig, Sections, build_config, windows_per_step

# Where they differ from the settings' own. Muon's were found on small models: docs/experiments.md.
_MUON: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "schedule": "linear",
    "min_learning_rate": 0.0,
    "weight_decay": 0.1,
    "beta2": 0.99,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "train": _MUON,
    "create": {
        **_MUON,
        "learning_rate": 6e-3,  # a short run takes higher rates
        "muon_learning_rate": 0.03,
        "muon_momentum": 0.9,
        "preset": "1M",
        "tokenizer": "auto",
        "max_length": 208,  # room for a whole recipe, so that its title stays in sight
        "packing": True,
        "val_fraction": 0.01,
        "epochs": 1,
        "batch_size": 6,
        "dropout": 0.0,
        "keep_last": 0,
    },
    "chat": {"repetition_penalty": 1.1},
}
# Windows per micro-batch of `train`, for one large card; with them AdamW's beta2 is 0.95, as GPT-3's was.
_LARGE = {"117M": 8, "gpt2": 8, "gpt2-medium": 8, "gpt2-large": 4, "gpt2-xl": 4}


class _Size(NamedTuple):
    learning_rate: float  # of AdamW
    read_tokens: int  # that training reads where templates write the text
    raw_tokens: int  # GPT-2 tokens that a language model writes, and how many of them are kept
    refined_tokens: int


_SIZES = {
    "1M": _Size(2e-3, 720_000, 30_000, 15_000),
    "3M": _Size(2e-3, 330_000, 30_000, 15_000),
    "12M": _Size(1e-3, 600_000, 30_000, 15_000),
    "33M": _Size(6e-4, 600_000, 50_000, 25_000),
}
_LARGER = _Size(4e-4, 1_000_000, 100_000, 50_000)
_MOST_TOKENS = 5_000_000  # of templates; longer runs read them again

# A language model's text is dear: it is read many times, and held-out text says when to stop.
_FROM_LANGUAGE_MODEL: dict[str, Any] = {
    "preset": "3M",
    "batch_size": 4,
    "epochs": 20,
    "patience": 3,
    "val_fraction": 0.1,
    "dropout": 0.1,
    "optimizer": "adamw",
    "schedule": "cosine",
    "min_learning_rate": None,
}


def train_config(options: Mapping[str, Any], layers: Iterable[Sections] = ()) -> RunConfig:
    """The configuration of `train`: Muon and what suits it, or AdamW and the settings' own defaults.

    Large presets have larger micro-batches, and a beta2 that forgets sooner. AdamW is the default where a
    learning rate is given, as most that are known are AdamW's, and for a model that was trained before.
    Arguments and errors are build_config's.
    """
    layers = list(layers)
    given = {name for layer in layers for section in layer.values() for name in section}
    given |= {name for name, value in options.items() if value is not None}
    by_default = "adamw" if given & {"learning_rate", "init_from"} else "muon"
    defaults: dict[str, Any] = {"optimizer": by_default}
    config = build_config(options, defaults, layers=layers)
    if config.train.optimizer == "muon":
        defaults = dict(_MUON)
    if config.model.preset in _LARGE:
        defaults |= {"batch_size": _LARGE[config.model.preset], "beta2": 0.95}
    return build_config(options, defaults, layers=layers)


def create_config(options: Mapping[str, Any], layers: Iterable[Sections] = ()) -> RunConfig:
    """The configuration of `create`. Arguments and errors are build_config's."""
    layers = list(layers)
    defaults = DEFAULTS["create"] | {"max_length": 1}
    if build_config(options, defaults, layers=layers).llm.data_source != "template":
        defaults |= _FROM_LANGUAGE_MODEL
    given = build_config(options, defaults, layers=layers)
    defaults["max_length"] = min(DEFAULTS["create"]["max_length"], given.model.gpt_config(1).block_size)
    if given.train.optimizer == "adamw":
        defaults["learning_rate"] = _size(given).learning_rate
    return build_config(options, defaults, layers=layers)


def text_tokens(config: RunConfig, language: str = "en") -> tuple[int, int]:
    """GPT-2 tokens of text to generate and to keep.

    Templates write as much as training reads in one of its epochs. GPT-2's tokenizer makes twice as many
    tokens of Japanese as one that was trained on it.
    """
    size, train = _size(config), config.train
    if config.llm.data_source == "template":
        per_step = windows_per_step(train, config.max_length) * config.max_length
        read = train.steps * per_step if train.steps else size.read_tokens // train.epochs
        wanted = min(read, _MOST_TOKENS) * (2 if language == "ja" else 1)
        kept = config.data.refined_tokens or wanted
        return config.data.raw_tokens or kept, kept
    return config.data.raw_tokens or size.raw_tokens, config.data.refined_tokens or size.refined_tokens


def _size(config: RunConfig) -> _Size:
    return _SIZES.get(config.model.preset, _LARGER)

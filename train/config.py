"""What a run is made of: the model's size, the data, the training. Frozen and checked on construction."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fusedgpt.model.config import PRESETS, GPTConfig


class ConfigError(ValueError):
    """Options that are unknown, out of range or at odds with each other."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """A preset, and what deviates from it."""

    preset: str = Field(default="12M", description=f"Model size: {', '.join(PRESETS)}.")
    n_layer: int | None = Field(default=None, description="Number of blocks.")
    n_head: int | None = Field(default=None, description="Attention heads a block.")
    n_embd: int | None = Field(default=None, description="Width of the residual stream.")
    block_size: int | None = Field(default=None, description="The model's context, in tokens.")
    dropout: float | None = Field(default=None, description="Dropout probability.")

    @model_validator(mode="after")
    def _preset_exists(self) -> Self:
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        return self

    def gpt_config(self, vocab_size: int, trained_length: int | None = None) -> GPTConfig:
        """The GPTConfig these settings mean for a vocabulary and a training window. Raises ConfigError."""
        changed = {k: v for k, v in self.model_dump(exclude={"preset"}).items() if v is not None}
        known = {"vocab_size": vocab_size, "trained_length": trained_length}
        try:
            return GPTConfig(**{**PRESETS[self.preset].model_dump(), **changed, **known})
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @property
    def name(self) -> str:
        """The preset's name, or "custom" where its shape was changed."""
        custom = any(v is not None for v in (self.n_layer, self.n_head, self.n_embd))
        return "custom" if custom else self.preset


class DataConfig(_Frozen):
    """How text becomes token windows, and how much of it `create` makes."""

    tokenizer: str = Field(default="gpt2", description="gpt2, char, byte, or the path of a tokenizer.json.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens a training window (default: the block size; create: 128)."
    )
    val_fraction: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of the text held out.")
    raw_tokens: int | None = Field(
        default=None, ge=1, description="create: GPT-2 tokens to generate (default: by preset)."
    )
    refined_tokens: int | None = Field(
        default=None, ge=1, description="create: GPT-2 tokens to keep (default: by preset)."
    )


class TrainConfig(_Frozen):
    """The optimisation. `steps` ends it where given, else `epochs`."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; goes before --epochs.")
    epochs: int = Field(default=20, ge=1, description="Passes over the training text.")
    batch_size: int = Field(default=2, ge=1, description="Windows a step.")
    learning_rate: float = Field(default=3e-4, gt=0.0, description="Peak learning rate (create: 0.0006).")
    min_learning_rate: float | None = Field(
        default=None, ge=0.0, description="Where the cosine ends (default: a tenth of --learning-rate)."
    )
    warmup: float = Field(
        default=0.05, ge=0.0, description="Warm-up: a share of the run below 1, steps from 1 on."
    )
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="cosine or constant.")
    weight_decay: float = Field(default=0.01, ge=0.0, description="AdamW's, on matrices only.")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0, description="AdamW's second moment.")
    eps: float = Field(default=1e-8, gt=0.0, description="AdamW's epsilon.")
    grad_clip: float = Field(default=1.0, ge=0.0, description="Largest gradient norm; 0: no clipping.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between validations (default: a tenth of the run)."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="auto, bf16 or fp32.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of data, weights, order and dropout.")

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Self:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}"
            )
        return self


class RunConfig(_Frozen):
    """Everything one run needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @property
    def max_length(self) -> int:
        """Tokens a training window."""
        return self.data.max_length or self.model.gpt_config(1).block_size

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        block_size = self.model.gpt_config(1).block_size
        if self.max_length > block_size:
            raise ValueError(f"max_length {self.max_length} is longer than block_size {block_size}")
        return self


_SECTIONS: dict[str, type[_Frozen]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def option_fields() -> dict[str, FieldInfo]:
    """Every setting of a run by its flat name ("n_layer", "learning_rate", ...)."""
    return {name: field for kind in _SECTIONS.values() for name, field in kind.model_fields.items()}


def build_config(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> RunConfig:
    """A RunConfig from flat option names; None means not given.

    Raises ConfigError for an unknown name, a value out of range, or values at odds.
    """
    values = {**(defaults or {}), **{name: value for name, value in options.items() if value is not None}}
    for name in values.keys() - option_fields().keys():
        close = difflib.get_close_matches(name, option_fields(), n=1)
        raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    sections = {
        section: {name: values[name] for name in kind.model_fields if name in values}
        for section, kind in _SECTIONS.items()
    }
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """pydantic's findings as one line, e.g. "batch_size: Input should be greater than 0 (got 0)"."""
    findings = []
    for e in error.errors():
        where = f"{e['loc'][-1]}: " if e["loc"] and e["type"] != "value_error" else ""
        got = "" if e["type"] == "value_error" else f" (got {e['input']!r})"
        findings.append(where + e["msg"].removeprefix("Value error, ") + got)
    return "; ".join(findings)

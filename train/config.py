"""What a run is made of: the model's size, the data, the training. Frozen and checked on construction."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.train.data.synthetic.llm_config import LLMConfig


class ConfigError(ValueError):
    """Options that are unknown, out of range or at odds with each other."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """A preset, and what deviates from it."""

    preset: str = Field(default="12M", description=f"Model size: {', '.join(PRESETS)}.")
    n_layer: int | None = Field(default=None, description="Number of blocks.")
    n_head: int | None = Field(default=None, description="Attention heads a block.")
    n_embd: int | None = Field(default=None, description="Width of the residual stream.")
    block_size: int | None = Field(default=None, description="The model's context, in tokens.")
    dropout: float | None = Field(default=None, description="Dropout probability.")
    init_from: str | None = Field(
        default=None, description="A GPT-2 folder to start from, in place of --preset: weights and shape."
    )

    @model_validator(mode="after")
    def _preset_exists(self) -> Self:
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        return self

    def gpt_config(self, vocab_size: int, trained_length: int | None = None) -> GPTConfig:
        """The GPTConfig these settings mean for a vocabulary and a training window.

        With init_from the folder's vocabulary counts. Raises ValueError where it is no GPT-2's.
        """
        changed = self.model_dump(exclude={"preset", "init_from"}, exclude_none=True)
        known = {"vocab_size": vocab_size, "trained_length": trained_length}
        try:
            if self.init_from is not None:
                from fusedgpt.model.initialise import fitted_config  # it imports torch

                return fitted_config(Path(self.init_from), {**changed, "trained_length": trained_length})
            return GPTConfig(**{**PRESETS[self.preset].model_dump(), **changed, **known})
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @property
    def name(self) -> str:
        """The preset's name, "custom" where its shape was changed, or that of the folder it begins with."""
        if self.init_from is not None:
            return Path(self.init_from).resolve().name
        custom = any(v is not None for v in (self.n_layer, self.n_head, self.n_embd))
        return "custom" if custom else self.preset


class DataConfig(_Frozen):
    """How text becomes token windows, and how much of it `create` makes."""

    tokenizer: str = Field(default="gpt2", description="gpt2, char, byte, or the path of a tokenizer.json.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens a training window (default: the block size; create: 128)."
    )
    packing: bool = Field(
        default=False, description="Windows end where documents end: whole ones share a window."
    )
    document_masks: bool = Field(
        default=False, description="A token attends to its own document only, not to all of its window."
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
    batch_size: int = Field(
        default=2, ge=1, description="Windows a forward pass; without --batch-tokens a step."
    )
    batch_tokens: int | None = Field(
        default=None, ge=1, description="Tokens a step, gathered from as many forward passes as it takes."
    )
    learning_rate: float = Field(default=3e-4, gt=0.0, description="Peak learning rate (create: 0.0006).")
    min_learning_rate: float | None = Field(
        default=None, ge=0.0, description="Where the schedule ends (default: a tenth of --learning-rate)."
    )
    warmup: float = Field(
        default=0.05, ge=0.0, description="Warm-up: a share of the run below 1, steps from 1 on."
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        default="cosine", description="constant, linear, cosine, wsd (trapezoid) or inverse_sqrt."
    )
    decay: float = Field(
        default=0.2,
        ge=0.0,
        description="wsd's last, falling part: a share of the run below 1, steps from 1 on.",
    )
    weight_decay: float = Field(default=0.01, ge=0.0, description="AdamW's, on matrices only.")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="AdamW's first moment.")
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0, description="AdamW's second moment.")
    eps: float = Field(default=1e-8, gt=0.0, description="AdamW's epsilon.")
    grad_clip: float = Field(default=1.0, ge=0.0, description="Largest gradient norm; 0: no clipping.")
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0, description="Of the training loss.")
    z_loss: float = Field(
        default=0.0,
        ge=0.0,
        description="Weight of logsumexp^2 in the training loss, against drifting logits.",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between validations (default: a tenth of the run)."
    )
    eval_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of a validation, the first held out (default: all)."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many validations without improvement (default: never)."
    )
    min_improvement: float = Field(
        default=0.0, ge=0.0, description="How much lower a validation loss must be to be an improvement."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="auto, bf16, fp16 (with loss scaling) or fp32."
    )
    compile: Literal["auto", "off", "block", "model"] = Field(
        default="auto", description="torch.compile: off, block by block, the whole model, or auto."
    )
    cuda_graphs: Literal["auto", "off", "on"] = Field(
        default="auto", description="Replay the whole step as one CUDA graph: auto, off or on."
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        default="none", description="Gradient checkpointing: none, selective or full; less memory, more time."
    )
    log_every: int | None = Field(
        default=None, ge=1, description="Steps between looks at the loss (default: 10 on a GPU, 1 on a CPU)."
    )
    max_skipped_steps: int = Field(
        default=10, ge=1, description="Skipped steps in a row (loss or gradient not finite) that end the run."
    )
    deterministic: bool = Field(
        default=False, description="On a GPU, keep torch's own ops deterministic too (ours always are)."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of data, weights, order and dropout.")

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Self:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}"
            )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        phases = [self.warmup, self.decay] if self.schedule == "wsd" else [self.warmup]
        shares, counted = sum(x for x in phases if x < 1), sum(x for x in phases if x >= 1)
        if shares > 1 or (self.steps and counted + shares * self.steps > self.steps):
            what = "warmup and decay together are" if len(phases) > 1 else "warmup is"
            raise ValueError(f"{what} longer than the run ({' and '.join(f'{x:g}' for x in phases)})")
        return self


class SavingConfig(_Frozen):
    """What a run leaves on disk while it is going on."""

    save_every: str = Field(
        default="10m", description="Between checkpoints: steps (500) or a time (90s, 10m, 2h)."
    )
    keep_last: int = Field(
        default=1, ge=0, description="Checkpoints kept; 0: none once the run is done (create: 0)."
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard files into the run directory.")

    @field_validator("save_every")
    @classmethod
    def _steps_or_time(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*|\d*\.?\d+[smh]", value):
            raise ValueError(f"save_every: expected steps (500) or a time (90s, 10m, 2h), got {value!r}")
        return value

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints, None where they are made by the clock."""
        return int(self.save_every) if self.save_every.isdigit() else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between checkpoints, None where they are counted in steps."""
        if self.save_steps is not None:
            return None
        return float(self.save_every[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.save_every[-1]]


class RunConfig(_Frozen):
    """Everything one run needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    saving: SavingConfig = SavingConfig()
    llm: LLMConfig = LLMConfig()

    @property
    def max_length(self) -> int:
        """Tokens a training window."""
        return self.data.max_length or self.model.gpt_config(1).block_size

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        block_size = self.model.gpt_config(1).block_size
        if self.max_length > block_size:
            raise ValueError(f"max_length {self.max_length} is longer than block_size {block_size}")
        batch_tokens = self.train.batch_tokens
        if batch_tokens is not None and batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens {batch_tokens} is less than one window of {self.max_length}")
        return self

    @model_validator(mode="after")
    def _patience_has_something_to_watch(self) -> Self:
        if self.train.patience and not self.data.val_fraction:
            raise ValueError("patience needs held-out text: set val_fraction above 0")
        return self

    def windows_per_step(self) -> int:
        """Windows an optimizer step takes."""
        return windows_per_step(self.train, self.max_length)

    def to_toml(self) -> str:
        """What --config reads back; settings without a value are left out."""
        lines = []
        for section, values in self.model_dump(exclude_none=True).items():
            lines += [f"[{section}]", *(f"{name} = {json.dumps(v)}" for name, v in values.items()), ""]
        return "\n".join(lines)


def windows_per_step(config: TrainConfig, max_length: int) -> int:
    """Windows of max_length tokens that an optimizer step takes."""
    return config.batch_tokens // max_length if config.batch_tokens else config.batch_size


Sections = dict[str, dict[str, Any]]
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "saving": SavingConfig,
    "llm": LLMConfig,
}


def option_fields(*, llm: bool = False) -> dict[str, FieldInfo]:
    """Every setting of a run by its flat name ("n_layer", ...); `llm`: those of `create` alone, too."""
    kinds = [kind for kind in _SECTIONS.values() if llm or kind is not LLMConfig]
    return {name: field for kind in kinds for name, field in kind.model_fields.items()}


def build_config(
    options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, *, layers: Iterable[Sections] = ()
) -> RunConfig:
    """A RunConfig from flat option names, where None means not given.

    Later ones win: defaults, each of layers (section -> name -> value, as read_toml gives them), options.
    Raises ConfigError for an unknown name, a value out of range, or values at odds.
    """
    merged: Sections = {section: {} for section in _SECTIONS}
    for layer in (_by_section(defaults or {}), *layers, _by_section(options)):
        for section, values in layer.items():
            merged[_known(section, _SECTIONS, "section")] |= values
    if merged["model"].get("init_from"):
        _begin_from_folder(merged, options)
    for section, values in merged.items():
        for name in values:
            _known(name, _SECTIONS[section].model_fields, f"option in [{section}]")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def create_config(options: Mapping[str, Any], layers: Iterable[Sections] = ()) -> RunConfig:
    """The configuration of `create`: short windows and a higher rate suit its short texts.

    options, layers and errors are build_config's.
    """
    layers = list(layers)
    defaults = {"learning_rate": 6e-4, "keep_last": 0}
    block_size = (
        build_config(options, {**defaults, "max_length": 1}, layers=layers).model.gpt_config(1).block_size
    )
    return build_config(options, {**defaults, "max_length": min(128, block_size)}, layers=layers)


def _begin_from_folder(merged: Sections, options: Mapping[str, Any]) -> None:
    """Its absolute path, so that a resume finds it; and its tokenizer, unless another one was named."""
    if options.get("preset"):
        raise ConfigError("--init-from says what shape the model has: leave --preset out")
    folder = Path(merged["model"]["init_from"]).expanduser().resolve()
    merged["model"]["init_from"] = str(folder)
    if (folder / "tokenizer.json").is_file():
        merged["data"].setdefault("tokenizer", str(folder))


def _by_section(options: Mapping[str, Any]) -> Sections:
    section_of = {name: section for section, kind in _SECTIONS.items() for name in kind.model_fields}
    layer: Sections = {}
    for name, value in options.items():
        if value is not None:
            layer.setdefault(section_of[_known(name, section_of, "option")], {})[name] = value
    return layer


def _known(name: str, names: Iterable[str], what: str) -> str:
    """`name`; raises ConfigError, with the nearest of `names`, if it is none of them."""
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return name


def read_toml(path: Path) -> Sections:
    """The sections of a --config file. Raises ConfigError where it is no such file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for section, values in content.items():
        _known(section, _SECTIONS, f"section in {path}:")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: [{section}] is no section but {values!r}")
    return content


def parse_set(assignment: str) -> Sections:
    """A --set "section.name=value", the value as in TOML or plain text. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", assignment, re.DOTALL)
    if match is None:
        raise ConfigError(f"--set {assignment!r}: expected section.name=value, such as train.beta2=0.99")
    section, name, text = match[1], match[2], match[3].strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return {section: {name: value}}


def explain(error: ValidationError) -> str:
    """pydantic's findings as one line, e.g. "batch_size: Input should be greater than 0 (got 0)"."""
    findings = []
    for e in error.errors():
        where = f"{e['loc'][-1]}: " if e["loc"] and e["type"] != "value_error" else ""
        got = "" if e["type"] == "value_error" else f" (got {e['input']!r})"
        findings.append(where + e["msg"].removeprefix("Value error, ") + got)
    return "; ".join(findings)

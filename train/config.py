"""Every setting of a run: default, range, help text. The models are frozen and checked on construction."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from fusedgpt.kernels.errors import UsageError
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.tokenizer import BUILT_IN
from fusedgpt.train.data.synthetic.llm_config import LLMConfig


class ConfigError(UsageError):
    """A setting that is unknown, out of range or in conflict with another."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _setting(default: Any, text: str, *, panel: str | None = None, unset: str = "", **limits: Any) -> Any:
    """A field with the help text `text`.

    panel: the part of --help that shows it; None for the first, which has what people use first.
    unset: what happens without a value, for a setting whose default is None. limits: ge, gt, le, lt.
    """
    shown: Any = {"panel": panel, "unset": unset}
    return Field(default=default, description=text, json_schema_extra=shown, **limits)


RECIPES = Path(__file__).with_name("recipes")  # settings that --config knows by name
_FILES, _TEXTS = "Text files", "Generated texts"
_model = partial(_setting, panel="Model")
_data = partial(_setting, panel="Data")
_files = partial(_setting, panel=_FILES)
_texts = partial(_setting, panel=_TEXTS)
_optim = partial(_setting, panel="Optimizer and schedule")
_val = partial(_setting, panel="Validation")
_speed = partial(_setting, panel="Speed, memory, reproducibility")
_logs = partial(_setting, panel="Checkpoints and logs")
_sampling = partial(_setting, panel="Sampling")


class ModelConfig(_Frozen):
    """A preset, and what deviates from it."""

    preset: Literal["1M", "3M", "12M", "33M", "117M", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        _setting("12M", "Model size.")
    )
    n_layer: int | None = _model(None, "Number of transformer blocks.", unset="the preset's")
    n_head: int | None = _model(None, "Attention heads per block.", unset="the preset's")
    n_embd: int | None = _model(None, "Width of the residual stream.", unset="the preset's")
    block_size: int | None = _model(None, "Context length in tokens.", unset="the preset's")
    dropout: float | None = _model(None, "Dropout probability.", unset="0.1")
    init_from: str | None = _model(None, "GPT-2 model folder that replaces the preset: weights and shape.")

    def gpt_config(self, vocab_size: int, trained_length: int | None = None) -> GPTConfig:
        """The GPTConfig these settings mean for a vocabulary and a training window.

        With init_from the folder's vocabulary counts. Raises ValueError if the folder is not a GPT-2's.
        """
        changed = self.model_dump(exclude={"preset", "init_from"}, exclude_none=True)
        known = {"vocab_size": vocab_size, "trained_length": trained_length}
        try:
            if self.init_from is not None:
                from fusedgpt.model.initialise import fitted_config  # it imports torch

                return fitted_config(Path(self.init_from), {**changed, "trained_length": trained_length})
            return GPTConfig(**{**PRESETS[self.preset].model_dump(), **changed, **known})
        except ValidationError as error:
            raise ConfigError(explain(error, "--")) from None

    @property
    def name(self) -> str:
        """The preset's name, "custom" if its shape was changed, or the name of the init_from folder."""
        if self.init_from is not None:
            return Path(self.init_from).resolve().name
        custom = any(v is not None for v in (self.n_layer, self.n_head, self.n_embd))
        return "custom" if custom else self.preset


class DataConfig(_Frozen):
    """How text becomes training windows, and how much text `create` generates."""

    tokenizer: str = _setting(
        "gpt2", "Tokenizer: gpt2, char, byte, the path of a tokenizer.json; for create also auto."
    )
    max_length: int | None = _data(None, "Tokens per training window.", unset="the context length", ge=1)
    packing: bool = _data(False, "Pack whole documents into windows instead of cutting them.")
    document_masks: bool = _data(False, "Let tokens attend only within their own document.")
    val_fraction: float = _data(0.1, "Fraction of the documents held out for validation.", ge=0.0, lt=1.0)
    text_field: str = _files("text", "Field that holds the text, in JSON, CSV and tables.")
    errors: Literal["strict", "replace", "ignore"] = _files(
        "strict", "Bytes that are not UTF-8: refuse the file, replace them by U+FFFD, or skip them."
    )
    raw_tokens: int | None = _texts(
        None, "GPT-2 tokens of text to generate.", unset="by preset and source", ge=1
    )
    refined_tokens: int | None = _texts(
        None, "GPT-2 tokens of text to keep.", unset="by preset and source", ge=1
    )


class TrainConfig(_Frozen):
    """Everything that the training loop needs to know; `steps` overrides `epochs`."""

    steps: int | None = _setting(None, "Optimizer steps; overrides --epochs.", ge=1)
    epochs: int = _setting(20, "Passes over the training text, rounded up to a whole step.", ge=1)
    batch_size: int = _setting(2, "Windows per micro-batch, and per step without --batch-tokens.", ge=1)
    batch_tokens: int | None = _optim(
        None, "Tokens per optimizer step, reached by gradient accumulation.", unset="one micro-batch", ge=1
    )
    learning_rate: float = _setting(3e-4, "Peak learning rate.", gt=0.0)
    min_learning_rate: float | None = _optim(
        None, "Learning rate at the end of the schedule.", unset="a tenth of the peak", ge=0.0
    )
    warmup: float = _optim(0.05, "Warmup length: a fraction of the run if below 1, else steps.", ge=0.0)
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = _optim(
        "cosine", "Learning rate schedule after the warmup; wsd: constant, then a decay."
    )
    decay: float = _optim(0.2, "Decay length of wsd: a fraction of the run if below 1, else steps.", ge=0.0)
    optimizer: Literal["adamw", "muon"] = _optim(
        "adamw",
        "muon: Muon for the matrices of the blocks, AdamW for the rest. "
        "train: adamw, cosine, if --learning-rate or --init-from is given.",
    )
    muon_learning_rate: float = _optim(0.02, "Peak learning rate of Muon.", gt=0.0)
    muon_momentum: float = _optim(0.95, "Muon's decay rate of the gradients' mean.", ge=0.0, lt=1.0)
    weight_decay: float = _optim(0.01, "Weight decay, applied to matrices only.", ge=0.0)
    beta1: float = _optim(0.9, "AdamW decay rate of the first moment.", ge=0.0, lt=1.0)
    beta2: float = _optim(0.999, "AdamW decay rate of the second moment.", ge=0.0, lt=1.0)
    eps: float = _optim(1e-8, "AdamW epsilon.", gt=0.0)
    grad_clip: float = _optim(1.0, "Maximum gradient norm; 0 disables clipping.", ge=0.0)
    label_smoothing: float = _optim(0.0, "Label smoothing of the training loss.", ge=0.0, lt=1.0)
    z_loss: float = _optim(0.0, "Weight of logsumexp(logits)^2 in the training loss.", ge=0.0)
    eval_every: int | None = _val(None, "Steps between validations.", unset="a tenth of the run", ge=1)
    eval_tokens: int | None = _val(None, "Held-out tokens per validation, the first ones.", unset="all", ge=1)
    patience: int | None = _val(None, "Validations without improvement before stopping.", unset="never", ge=1)
    min_improvement: float = _val(0.0, "Decrease in validation loss that counts as improvement.", ge=0.0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _speed(
        "auto", "Compute precision; fp16 with dynamic loss scaling."
    )
    compile: Literal["auto", "off", "block", "model"] = _speed(
        "auto", "What torch.compile compiles: nothing, each block, or the whole model."
    )
    cuda_graphs: Literal["auto", "off", "on"] = _speed(
        "auto", "Replay the training step as a CUDA graph; auto: on a GPU, unless --profile."
    )
    checkpointing: Literal["none", "selective", "full"] = _speed(
        "none", "Gradient checkpointing: saves memory, costs time."
    )
    parallel: Literal["auto", "ddp", "fsdp"] = _speed(
        "auto", "How torchrun's processes share a step; auto: fsdp where the states do not fit a GPU."
    )
    reduce_dtype: Literal["fp32", "bf16"] = _speed(
        "fp32", "Precision in which torchrun's processes add up gradients."
    )
    log_every: int | None = _logs(
        None, "Steps between reads of the loss from the device.", unset="10 on a GPU, 1 on a CPU", ge=1
    )
    max_skipped_steps: int = _optim(10, "Non-finite steps in a row before stopping.", ge=1)
    deterministic: bool = _speed(False, "Make PyTorch's CUDA ops deterministic; ours always are.")
    device: str = _speed("auto", "auto, cpu, cuda or cuda:N.")
    seed: int = _speed(0, "Random seed for data, weights, sample order and dropout.", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_learning_rate is not None and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min-learning-rate {self.min_learning_rate} is above --learning-rate {self.learning_rate}"
            )
        self.check_phases(self.steps)
        return self

    def check_phases(self, steps: int | None) -> None:
        """Raise ConfigError if a run of `steps` is shorter than its warmup, with wsd also its decay."""
        phases = {"--warmup": self.warmup} | ({"--decay": self.decay} if self.schedule == "wsd" else {})
        shares, counted = (sum(x for x in phases.values() if (x < 1) == share) for share in (True, False))
        if shares > 1 or (steps and counted + shares * steps > steps):
            run = f"a run of {steps} steps" if steps else "the run"
            given = " and ".join(f"{name} {x:g}" for name, x in phases.items())
            raise ConfigError(f"{run} has no room for {given}: lower that or train longer")


class Logger(StrEnum):  # typer takes no list of Literals
    """Where metrics and samples go besides metrics.jsonl."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"


class SavingConfig(_Frozen):
    """What a run leaves on disk while it is going on."""

    save_every: str = _logs("10m", "Time or steps between checkpoints: 90s, 10m, 2h, or 500 for steps.")
    keep_last: int = _logs(1, "Number of checkpoints to keep; 0 keeps none of a finished run.", ge=0)
    logger: list[Logger] | None = _logs(
        None, "Where metrics and samples go too; may be repeated.", unset="only metrics.jsonl"
    )
    sample_every: int | None = _logs(None, "Steps between samples of the model.", unset="never", ge=1)
    sample_prompt: list[str] | None = _logs(
        None, "Text that the samples continue; may be repeated.", unset="empty"
    )

    @field_validator("save_every")
    @classmethod
    def _steps_or_time(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*|\d*\.?\d+[smh]", value):
            raise ValueError(f"save_every: expected steps (500) or a time (90s, 10m, 2h), got {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sample_prompt and self.sample_every is None:
            raise ValueError("--sample-prompt needs --sample-every, the steps between samples")
        return self

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints, None if they are saved by time."""
        return int(self.save_every) if self.save_every.isdigit() else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between checkpoints, None if they are saved by steps."""
        if self.save_steps is not None:
            return None
        return float(self.save_every[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.save_every[-1]]


class SamplingConfig(_Frozen):
    """How `sample` and `chat` choose tokens; model/generate.py checks the values."""

    max_new_tokens: int = _setting(100, "Maximum number of tokens to generate.")
    temperature: float = _sampling(0.8, "Sampling temperature; 0 always takes the most likely token.")
    top_k: int = _sampling(40, "Sample from the k most likely tokens; 0: from all.")
    top_p: float = _sampling(1.0, "Sample from the most likely tokens whose probabilities add up to p.")
    repetition_penalty: float = _sampling(1.0, "Above 1, makes tokens of the text less likely to recur.")
    seed: int = _sampling(0, "Random seed; the same seed gives the same text.")


class RunConfig(_Frozen):
    """Everything one run needs."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    saving: SavingConfig = SavingConfig()
    llm: LLMConfig = LLMConfig()

    @property
    def max_length(self) -> int:
        """Tokens per training window."""
        return self.data.max_length or self.model.gpt_config(1).block_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        block_size = self.model.gpt_config(1).block_size
        if self.max_length > block_size:
            raise ValueError(f"--max-length {self.max_length} is longer than --block-size {block_size}")
        batch_tokens = self.train.batch_tokens
        if batch_tokens is not None and batch_tokens < self.max_length:
            raise ValueError(f"--batch-tokens {batch_tokens} is less than one window of {self.max_length}")
        if self.train.patience and not self.data.val_fraction:
            raise ValueError("--patience needs held-out text: set --val-fraction above 0")
        return self

    def to_toml(self) -> str:
        """The settings as --config reads them; those without a value are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def windows_per_step(config: TrainConfig, max_length: int) -> int:
    """Windows of max_length tokens per optimizer step."""
    return config.batch_tokens // max_length if config.batch_tokens else config.batch_size


Sections = dict[str, dict[str, Any]]
_SECTIONS: dict[str, Any] = {name: field.annotation for name, field in RunConfig.model_fields.items()}


def settings_of(command: str) -> dict[str, FieldInfo]:
    """The settings that are options of a command, by flat name ("n_layer", ...)."""
    if command in ("sample", "chat"):
        return SamplingConfig.model_fields
    if command in ("generate", "refine"):
        return LLMConfig.model_fields
    fields = {name: field for kind in _SECTIONS.values() for name, field in kind.model_fields.items()}
    other = _FILES if command == "create" else _TEXTS  # what only the other command reads
    return {name: field for name, field in fields.items() if panel_of(field)[0] != other}


def panel_of(field: FieldInfo) -> tuple[str | None, str]:
    """(the panel of --help that shows a setting, what happens without a value); LLMConfig's have no panel."""
    extra: Any = field.json_schema_extra
    return extra.get("panel", _TEXTS), extra["unset"]


def build_config(
    options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, *, layers: Iterable[Sections] = ()
) -> RunConfig:
    """A RunConfig from options by flat name; None stands for an option that was not given.

    The last value wins: defaults, then each of layers (section -> name -> value, as from read_toml), options.
    Raises ConfigError for an unknown name, a value out of range, or values in conflict.
    """
    merged: Sections = {section: {} for section in _SECTIONS}
    for layer in (_by_section(defaults or {}), *layers, _by_section(options)):
        for section, values in layer.items():
            merged[_known(section, _SECTIONS, "section")] |= values
    if merged["model"].get("init_from"):
        _begin_from_folder(merged, options)
    tokenizer = merged["data"].get("tokenizer")
    if isinstance(tokenizer, str) and tokenizer not in BUILT_IN and Path(tokenizer).exists():
        merged["data"]["tokenizer"] = str(Path(tokenizer).resolve())  # so that a resume finds it
    for section, values in merged.items():
        for name in values:
            _known(name, _SECTIONS[section].model_fields, f"option in [{section}]")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, "--")) from None


def _begin_from_folder(merged: Sections, options: Mapping[str, Any]) -> None:
    """Make init_from absolute, so that a resume finds it, and use its tokenizer if none is given."""
    if options.get("preset"):
        raise ConfigError("--init-from sets the shape of the model: leave out --preset")
    folder = Path(merged["model"]["init_from"]).expanduser().resolve()
    merged["model"]["init_from"] = str(folder)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if has_tokenizer and merged["data"].get("tokenizer", "auto") == "auto":
        merged["data"]["tokenizer"] = str(folder)


def _by_section(options: Mapping[str, Any]) -> Sections:
    section_of = {name: section for section, kind in _SECTIONS.items() for name in kind.model_fields}
    layer: Sections = {}
    for name, value in options.items():
        if value is not None:
            layer.setdefault(section_of[_known(name, section_of, "option")], {})[name] = value
    return layer


def _known(name: str, names: Iterable[str], what: str) -> str:
    """`name`; raises ConfigError, with the closest of `names`, if it is none of them."""
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(f"unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return name


def read_toml(path: Path) -> Sections:
    """The sections of a --config file, or of a recipe by its name. Raises ConfigError if it is unreadable."""
    recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.toml"))}
    try:
        found = path if path.exists() else recipes.get(str(path), path)
        content = tomllib.loads(found.read_text(encoding="utf-8-sig"))
    except OSError as error:
        names = ", ".join(recipes)
        raise ConfigError(f"cannot read {path}: {error.strerror}; the recipes are {names}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for section, values in content.items():
        _known(section, _SECTIONS, f"section in {path}:")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a section [{section}], got {section} = {values!r}")
    if content.get("saving", {}).pop("tensorboard", False):  # of a run before there were other loggers
        content["saving"]["logger"] = ["tensorboard"]
    return content


def parse_set(assignment: str) -> Sections:
    """A --set "section.name=value"; the value is TOML or plain text. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", assignment, re.DOTALL)
    if match is None:
        raise ConfigError(f"--set {assignment!r}: expected section.name=value, such as train.beta2=0.99")
    section, name, text = match[1], match[2], match[3].strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return {section: {name: value}}


def explain(error: ValidationError, prefix: str = "") -> str:
    """pydantic's errors in one line, "batch_size: should be greater than 0, got 0". prefix: -- of options."""
    findings = []
    for e in error.errors():
        if e["type"] == "value_error":
            findings.append(e["msg"].removeprefix("Value error, "))
        else:
            name = next((part for part in reversed(e["loc"]) if isinstance(part, str)), "")
            where = prefix + name.replace("_", "-") if prefix else name
            message = e["msg"].removeprefix("Input ")
            findings.append(f"{where}: {message}, got {e['input']!r}" if name else message)
    return "; ".join(findings)

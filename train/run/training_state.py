"""The state of a training: copied into a checkpoint and restored from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.batches import Cursor
from fusedgpt.train.loop.distributed import named_parameters, whole
from fusedgpt.train.loop.optimizer import AdamW, is_muon
from fusedgpt.train.loop.precision import LossScale
from fusedgpt.train.loop.validation import ValidationState
from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointError
from fusedgpt.train.run.world import ALONE, World

Tensors = dict[str, Tensor]
_SMOOTHED_STEPS = 10


@dataclass(kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    recent_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validation: ValidationState = field(default_factory=ValidationState)

    def add(self, loss: float, *, skipped: bool) -> None:
        """Note a step's outcome."""
        if math.isfinite(loss):
            self.recent_losses = [*self.recent_losses[1 - _SMOOTHED_STEPS :], loss]
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def smoothed_loss(self) -> float:
        """Mean of the last 10 finite losses, NaN before the first."""
        return sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else math.nan


@dataclass(kw_only=True)
class Training:
    """Everything that changes while a model is trained."""

    model: GPT  # what is trained: the caller's, or a sharded copy of it
    dtype: torch.dtype  # of activations
    optimizer: AdamW
    loss_scale: LossScale | None  # fp16's
    fingerprint: dict[str, Any]  # what must not change between a checkpoint and its resume
    progress: Progress = field(default_factory=Progress)
    execution: dict[str, Any] = field(default_factory=dict)  # what "auto" chose; a resume goes on with it
    best: Tensors = field(default_factory=dict)  # fp32 parameters of the best validation, on the first's host
    world: World = ALONE

    def snapshot(self) -> Checkpoint:
        """A copy of all of it on the host, which training does not change.

        Of several ranks all must ask, and only the first gets the tensors.
        """
        state = {
            "progress": asdict(self.progress),
            "dropout": {"seed": int(self.model.dropout_seed), "windows": int(self.model.dropout_windows)},
            "loss_scale": self.loss_scale.state() if self.loss_scale else None,
            "fingerprint": self.fingerprint,
            "execution": self.execution,
        }
        state_of = self.optimizer.state
        moments = {f"{n}.{k}": v for n, p in self._named() for k, v in state_of.get(p, {}).items()}
        tensors = {"model": self._on_host(named_parameters(self.model)), "optimizer": self._on_host(moments)}
        if self.best and self.progress.validation.best_step != self.progress.step:
            tensors["best"] = self.best
        return Checkpoint(step=self.progress.step, tensors=tensors, state=state)

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a snapshot: parameters, masters of 16-bit ones, moments, the best weights."""
        total = 0
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                copies = 2 + (p.element_size() < 4) + (not is_muon(group))  # master, moments, best
                total += p.numel() * (p.element_size() + 4 * copies)
        return total

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load what snapshot() copied, in any precision. Raises CheckpointError if it does not fit."""
        state = checkpoint.state
        for name, value in self.fingerprint.items():
            then = state["fingerprint"].get(name)
            if then != value:
                change = "" if name == "training text" else f" ({then}, now {value})"
                made = f"step {checkpoint.step} was made with another {name}{change}"
                raise CheckpointError(f"{made}: give the same, or leave out --resume to train anew")
        values = dict(checkpoint.tensors.get("model", {}))
        moments = dict(checkpoint.tensors.get("optimizer", {}))
        wanted = named_parameters(self.model)
        _check_alike(values, wanted)
        for name, parameter in wanted.items():
            if values[name].dtype != parameter.dtype:  # another precision now: continue from the fp32 weights
                values[name] = moments.pop(f"{name}.master", values[name]).float()
                if moments and parameter.element_size() < 4:
                    moments[f"{name}.master"] = values[name]
        self._load_optimizer(moments)
        _copy(values, self.model)
        self.execution = state.get("execution", {})
        dropout, progress = state["dropout"], dict(state["progress"])
        self.model.seed_dropout(dropout["seed"], dropout["windows"])
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load(state["loss_scale"])
        self.progress = Progress(
            cursor=Cursor(**progress.pop("cursor")),
            validation=ValidationState(**progress.pop("validation")),
            **progress,
        )
        self.best = checkpoint.tensors.get("best", {})
        if not self.best and self.progress.validation.best_step == self.progress.step > 0:
            self.keep_best()

    def keep_best(self) -> None:
        """Copy the weights: they are the best so far."""
        self.best = self._on_host(self.parameters())

    def parameters(self) -> Tensors:
        """The parameters by name, in fp32 where the optimizer has master weights."""
        state = self.optimizer.state
        return {
            n: state.get(p, {}).get("master", p).detach() for n, p in named_parameters(self.model).items()
        }

    def finish(self, model: GPT) -> None:
        """Leave `model`, the caller's, in fp32 and eval mode, with the best validation's weights if any.

        Of several ranks the first one's has them.
        """
        kept = self.world.from_first(lambda: bool(self.best))
        values = self.best if kept else self._on_host(self.parameters())
        model.float().eval()
        if self.world.first:
            _copy(values, model)

    def gathered(self, model: GPT) -> GPT:
        """The trained model: sharded, as a copy in `model`, the caller's, of the first rank; all must ask."""
        if model is not self.model:
            values = self._on_host(self.parameters())
            if self.world.first:
                _copy(values, model)
        return model

    def _on_host(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Copies on the host of the first rank, none on others; a sharded one is gathered after the other."""
        copies: Tensors = {}
        for name, x in tensors.items():
            full = whole(x.detach())
            if self.world.first:
                copies[name] = full.to("cpu", copy=True)
        return copies

    def _named(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) in the optimizer's order."""
        names = {p: name for name, p in named_parameters(self.model).items()}
        return [(names[p], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state: dict[int, Tensors] = {}
        wanted = dict(self._named())
        index = {name: i for i, name in enumerate(wanted)}
        for key, value in tensors.items():
            name, _, kind = key.rpartition(".")
            if name not in wanted or (kind != "step" and value.shape != wanted[name].shape):
                raise CheckpointError(f"optimizer state {key} {tuple(value.shape)} fits no parameter")
            state.setdefault(index[name], {})[kind] = value
        if len(state) not in (0, len(wanted)):
            raise CheckpointError(f"optimizer state of {len(state)} parameters, but there are {len(wanted)}")
        groups = self.optimizer.state_dict()["param_groups"]
        kinds = {key.rpartition(".")[2] for key in tensors}
        then, now = (
            "muon" if muon else "adamw" for muon in ("momentum_buffer" in kinds, any(map(is_muon, groups)))
        )
        if kinds and then != now:
            raise CheckpointError(f"it was trained with --optimizer {then}, not {now}")
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def fingerprint(dataset: TokenDataset, config: TrainConfig) -> dict[str, Any]:
    """What a cursor depends on: the tokens, how they are cut into windows, and the seed of their order."""
    return {"training text": dataset.fingerprint, "max_length": dataset.max_length, "seed": config.seed}


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], model: GPT) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def _check_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where a name or shape differs, or numbers are not floating-point."""
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"model: missing or unexpected tensors: {', '.join(odd[:3])}")
    for name, x in found.items():
        if x.shape != wanted[name].shape or not x.is_floating_point():
            there, here = (f"{tuple(t.shape)} {t.dtype}" for t in (x, wanted[name]))
            raise CheckpointError(
                f"model: {name} is {there}, expected {here}: leave out the options that change its shape, or "
                "--resume to train anew"
            )

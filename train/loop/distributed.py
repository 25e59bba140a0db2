"""How the ranks of a run share its steps: one process, DDP, or FSDP2 where the states do not fit a GPU.

Each rank takes an equal, consecutive part of a step's windows. Losses and gradients are sums over ranks of
what each target weighs in the whole step, so that nothing depends on how windows are split.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import ConfigError, TrainConfig, windows_per_step
from fusedgpt.train.loop.optimizer import AdamW
from fusedgpt.train.loop.precision import cast_parameters
from fusedgpt.train.loop.sharding import is_sharded
from fusedgpt.train.run.checkpoint import Checkpoint
from fusedgpt.train.run.world import World
from fusedgpt.train.tools.estimate import CHECKPOINTING, estimate
from fusedgpt.train.tools.scaling import USABLE_MEMORY, ddp_memory


class OneProcess:
    """A step that is not shared."""

    def place(self, model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
        """The model that is trained, from `model`: on its device, in its dtypes."""
        model.to(device)
        cast_parameters(model, dtype)
        return model

    def connect(self, module: Any, optimizer: AdamW) -> Any:
        """What the step calls in place of `module`, the trained model, perhaps compiled."""
        return module

    def begin(self, model: GPT) -> None:
        """Take this rank's part of the windows from here on."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Entered for a micro-batch's forward and backward pass; last: of the step."""
        return nullcontext()

    def end_step(self) -> None:
        """After the optimizer's step."""


class _Shared(OneProcess):
    def __init__(self, world: World, config: TrainConfig, max_length: int) -> None:
        self.world, self.low_precision = world, config.reduce_dtype == "bf16"
        self.windows = windows_per_step(config, max_length)
        self.mine = self.windows // world.size

    def begin(self, model: GPT) -> None:
        self.dropout_windows = model.dropout_windows
        self.dropout_windows += self.world.rank * self.mine

    def end_step(self) -> None:
        self.dropout_windows += self.windows - self.mine  # those of the other ranks


class DataParallel(_Shared):
    """DDP: every rank has the whole model; gradients are added up in buckets during the last backward pass.

    16-bit gradients are added in fp32, also over micro-batches, unless low_precision.
    """

    def connect(self, module: Any, optimizer: AdamW) -> Any:
        self.optimizer = optimizer
        with warnings.catch_warnings():  # 2.13 on deprecate it for an argument that older versions lack
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self.ddp = nn.parallel.DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        return self.ddp

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        self.optimizer.accumulates = not last
        return nullcontext() if last else self.ddp.no_sync()

    def _reduce(self, bucket: Any) -> Any:
        """DDP's hook: add up a bucket (GradBucket) over all ranks, with earlier micro-batches' fp32 sums."""
        flat, parameters, sums = bucket.buffer(), bucket.parameters(), self.optimizer.sums
        wide = flat.float()  # itself if it is fp32
        parts = wide.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            if p in sums:
                part += sums.pop(p).view(-1)
        if wide is not flat and self.low_precision:
            wide = flat.copy_(wide)
        elif wide is not flat:
            sums.update((p, part.view_as(p)) for p, part in zip(parameters, parts, strict=True))
        future = torch.distributed.all_reduce(wide, async_op=True).get_future()
        return future.then(lambda _: flat)


class FullyShardedDataParallel(_Shared):
    """FSDP2: every rank has a part of each tensor, fp32, and gathers a block's while it computes with them.

    Every micro-batch reduces its gradients: unreduced ones take 4 bytes per parameter of the whole model.
    """

    def place(self, model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes to it
        mesh = init_device_mesh(device.type, (self.world.size,))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if self.low_precision else None)
        sharded = copy.deepcopy(model)
        for part in (*sharded.blocks(), sharded):
            module = fully_shard(part, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        return sharded


def choose_parallel(config: TrainConfig, model: GPT, max_length: int, world: World) -> OneProcess:
    """DDP where "auto" finds that model and states fit a GPU, else FSDP2.

    Raises ConfigError where the ranks cannot share a step equally.
    """
    if world.size == 1:
        return OneProcess()
    windows = windows_per_step(config, max_length)
    if windows % world.size:
        raise ConfigError(
            f"a step of {windows} windows cannot be divided among {world.size} ranks: make --batch-tokens a "
            f"multiple of {max_length * world.size}, or start another number of processes"
        )
    kind = config.parallel
    if kind == "auto":
        kind = world.from_first(lambda: "ddp" if _fits(config, model, max_length) else "fsdp")
    if kind == "fsdp" and config.compile == "model":
        raise ConfigError("FSDP gathers block by block: use --compile block")
    return (DataParallel if kind == "ddp" else FullyShardedDataParallel)(world, config, max_length)


def _fits(config: TrainConfig, model: GPT, max_length: int) -> bool:
    """Whether the model, its states and a step fit one GPU; anything fits a CPU."""
    if not torch.cuda.is_available() or config.device == "cpu":
        return True
    rows = estimate(model.config, config, max_length, torch.cuda.get_device_name())
    needed = ddp_memory(
        rows[CHECKPOINTING.index(config.checkpointing)], 4 if config.precision == "fp32" else 2
    )
    return needed < USABLE_MEMORY * torch.cuda.get_device_properties().total_memory


def named_parameters(model: GPT) -> dict[str, Tensor]:
    """By name; of a sharded model the shards, also after a forward pass without a backward one."""
    if (reshard := getattr(model, "reshard", None)) is not None:
        reshard()
    return dict(model.named_parameters())


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, x itself if it is none; every rank must ask."""
    full: Tensor = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    return full


def share_checkpoint(
    checkpoint: Checkpoint | None, world: World, parameters: Mapping[str, Tensor]
) -> Checkpoint | None:
    """The first rank's checkpoint, on all: a tensor at a time, of which a rank keeps its shard.

    parameters: by name; their optimizer state is called NAME.KIND. The best weights stay with the first rank.
    """
    if world.size == 1:
        return checkpoint
    about = world.from_first(lambda: _describe(checkpoint))
    if about is None:
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    for stem, names in about["tensors"].items():
        tensors[stem] = {}
        for name, (shape, dtype) in names.items():
            x = torch.empty(shape, dtype=getattr(torch, dtype))
            if checkpoint is not None:
                x = checkpoint.tensors[stem].pop(name).contiguous()
            torch.distributed.broadcast(x, 0)
            like = parameters.get(name, parameters.get(name.rpartition(".")[0]))
            tensors[stem][name] = _sharded_as(like, x)
    if checkpoint is not None and "best" in checkpoint.tensors:
        tensors["best"] = checkpoint.tensors["best"]
    return Checkpoint(step=about["step"], tensors=tensors, state=about["state"])


def _describe(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    tensors = {
        stem: {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in named.items()}
        for stem, named in checkpoint.tensors.items()
        if stem != "best"
    }
    return {"step": checkpoint.step, "state": checkpoint.state, "tensors": tensors}


def _sharded_as(like: Tensor | None, x: Tensor) -> Tensor:
    """This rank's shard of x, if `like` is sharded and x has a row for each of its rows; else x."""
    if like is None or not is_sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(x.to(like.device), mesh, placements, src_data_rank=None).clone()

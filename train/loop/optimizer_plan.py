"""How the optimizer steps its parameters: by our kernels, or by torch's ops; see optimizer.AdamW.

A plan holds what stays the same from step to step, so that a step costs the CPU little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference
from fusedgpt.train.loop.sharding import local, on_whole_matrices

if ops.HAS_TRITON:
    from fusedgpt.kernels import adamw as adamw_
    from fusedgpt.kernels import muon as muon_
    from fusedgpt.kernels import tensor_table


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # in a parameter's state; Muon's is the last


@dataclass(kw_only=True)
class Bucket:
    """What is stepped together: one dtype of parameters, one of gradients, one sharding.

    Muon's buckets hold parameters of one shape, whose rows are one or more matrices on top of each other.
    """

    process_groups: list[Any]  # over which the squared norm is summed
    shape: tuple[int, int] | None = None  # of Muon's matrices; None: AdamW
    shards: Any = None  # one of Muon's parameters if they are sharded
    groups: list[int] = field(default_factory=list)  # index of each one's parameter group
    grads: list[int] = field(default_factory=list)  # index of each one's gradient in a step's
    params: list[Tensor] = field(default_factory=list)  # from here on the local shards
    masters: list[Tensor] = field(default_factory=list)  # what is updated: the parameters themselves if fp32
    exp_avgs: list[Tensor] = field(default_factory=list)  # Muon: the momentum
    exp_avg_sqs: list[Tensor] = field(default_factory=list)  # Muon: the momentum again, not used
    steps: list[Tensor] = field(default_factory=list)

    def add(self, index: int, group: int, p: Tensor, state: dict[str, Tensor]) -> None:
        """A parameter, whose gradient has this index in a step's."""
        moments = [state[name] for name in MOMENTS if name in state]  # Muon: one
        mine = local(p).detach()
        self.grads.append(index)
        self.groups.append(group)
        self.params.append(mine)
        self.masters.append(local(state["master"]) if "master" in state else mine)
        self.exp_avgs.append(local(moments[0]))
        self.exp_avg_sqs.append(local(moments[-1]))
        self.steps.append(state.get("step", torch.zeros((), device=mine.device)))

    def orthogonalise(self, function: Orthogonalise, x: Tensor) -> Tensor:
        """`function` of Muon's matrices in x, the local rows of all parameters: (n, rows, C)."""
        assert self.shape is not None
        if self.shards is not None:
            return on_whole_matrices(function, x, self.shards, self.shape)
        return function(x.view(-1, *self.shape)).reshape(x.shape)

    def of(self, grads: list[Tensor]) -> list[Tensor]:
        """This bucket's of the gradients of a step."""
        return [grads[i] for i in self.grads]


def _squares(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Each gradient's squared norm, computed in dtype."""
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads, 2.0, dtype=dtype)).square()
    # torch's norm on a CPU is slower, and of 17M fp32 numbers 6e-4 off (docs/experiments.md, Gradient norm).
    return torch.stack([torch.dot(x, x) for x in (grad.flatten().to(dtype) for grad in grads)])


Orthogonalise = Callable[[Tensor], Tensor]
Results = tuple[Tensor, Tensor, Tensor]  # AdamW's grad_norm, skipped and skipped_steps: written by a step


@dataclass(eq=False)
class TorchPlan:
    """By torch's fused AdamW, which unscales and checks as it does for torch.amp.GradScaler."""

    buckets: list[Bucket]  # each of one parameter group
    groups: list[dict[str, Any]]  # param_groups
    results: Results
    captured = False

    def step(self, grads: list[Tensor], max_norm: float, grad_scale: Tensor | None) -> None:
        """One step of all buckets; grads: the local ones of the parameters that have any."""
        norm = self._norm(grads)
        if grad_scale is not None:
            norm = norm / grad_scale
        skipped = (~norm.isfinite()).float()
        self.results[0].copy_(norm)
        self.results[1].copy_(skipped)
        self.results[2].add_(skipped.long())
        on_cpu = norm.device.type == "cpu"  # where reading a scalar is free, and may save work
        if on_cpu and skipped:
            return
        divisor = grad_scale
        if max_norm > 0.0:
            clip = (norm / max_norm).clamp(min=1.0)
            divisor = clip if divisor is None else clip * divisor
        if on_cpu and divisor == 1.0:
            divisor = None
        for bucket in self.buckets:
            step = self._adamw if bucket.shape is None else self._muon
            step(bucket, bucket.of(grads), divisor, None if on_cpu else skipped)

    def _norm(self, grads: list[Tensor]) -> Tensor:
        squares = []
        for bucket in self.buckets:
            square = _squares(bucket.of(grads), bucket.exp_avgs[0].dtype)
            for ranks in bucket.process_groups:
                torch.distributed.all_reduce(square, group=ranks)
            squares.append(square)
        return torch.cat(squares).sum().sqrt().float() if squares else torch.zeros(())

    def _adamw(
        self, bucket: Bucket, grads: list[Tensor], divisor: Tensor | None, skipped: Tensor | None
    ) -> None:
        group, dtype = self.groups[bucket.groups[0]], bucket.exp_avgs[0].dtype
        torch._foreach_add_(bucket.steps, 1.0)
        torch._fused_adamw_(
            bucket.masters,
            [grad.to(dtype) for grad in grads],
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            [],
            bucket.steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=skipped,
        )
        if skipped is not None:
            torch._foreach_sub_(bucket.steps, [skipped] * len(bucket.steps))
        _round_masters(bucket)

    def _muon(
        self, bucket: Bucket, grads: list[Tensor], divisor: Tensor | None, skipped: Tensor | None
    ) -> None:
        """reference.muon of each matrix, in place."""
        assert bucket.shape is not None
        group, momenta, masters = self.groups[bucket.groups[0]], bucket.exp_avgs, bucket.masters
        lr, weight = group["lr"], 1.0 - group["momentum"]
        before = [] if skipped is None else [x.clone() for x in (*momenta, *masters)]
        grads = [grad.to(momenta[0].dtype) for grad in grads]
        if divisor is not None:
            grads = list(torch._foreach_div(grads, divisor))
        torch._foreach_lerp_(momenta, grads, weight)
        ahead = torch.stack(torch._foreach_lerp(momenta, grads, weight))  # Nesterov's
        step = bucket.orthogonalise(reference.orthogonalise, ahead)
        torch._foreach_mul_(masters, 1.0 - lr * group["weight_decay"])
        torch._foreach_sub_(masters, (step * (lr * reference.muon_scale(*bucket.shape))).unbind())
        if skipped is not None:
            for new, old in zip((*momenta, *masters), before, strict=True):
                new.copy_(torch.where(skipped > 0, old, new))
        _round_masters(bucket)


def _round_masters(bucket: Bucket) -> None:
    if bucket.masters[0] is not bucket.params[0]:
        torch._foreach_copy_(bucket.params, bucket.masters)


class TritonPlan:
    """By kernels/adamw.py and muon.py: a norm launch per bucket, then AdamW's updates, then Muon's.

    AdamW has one or two buckets, with a launch each; Muon one for each shape, with about a dozen.
    """

    def __init__(self, buckets: list[Bucket], groups: list[dict[str, Any]], results: Results) -> None:
        self.buckets = sorted(buckets, key=lambda bucket: bucket.shape is not None)
        self.groups, self.results = groups, results
        device = self.buckets[0].params[0].device
        self.hyper = torch.zeros(len(self.groups), 8, dtype=torch.float64, device=device)
        self.rows: list[list[float]] = []  # what self.hyper holds
        self.partials = torch.zeros(len(self.buckets), adamw_.PARTIALS, device=device)
        self.one = torch.ones((), device=device)
        self.iterated = torch.bfloat16 if device.type == "cuda" else torch.float32  # what is interpreted
        self.tables = [_Table(bucket) for bucket in self.buckets]

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads its memory at every replay."""
        return any(table.captured for table in self.tables)

    def step(self, grads: list[Tensor], max_norm: float, grad_scale: Tensor | None) -> None:
        """As TorchPlan.step."""
        self._upload_hyper()
        scale = self.one if grad_scale is None else grad_scale
        batches = [table.batch(table.bucket.of(grads)) for table in self.tables]
        for bucket, batch, partials in zip(self.buckets, batches, self.partials, strict=True):
            adamw_.grad_norm(batch, self.hyper, partials)
            for ranks in bucket.process_groups:
                torch.distributed.all_reduce(partials, group=ranks)
        for i, (bucket, batch) in enumerate(zip(self.buckets, batches, strict=True)):
            options: dict[str, Any] = {"max_norm": max_norm, "grad_scale": scale}
            if bucket.shape is None:
                adamw_.adamw(batch, self.partials, *self.results, report=i == 0, **options)
            else:
                muon_.muon(
                    batch,
                    (len(bucket.params[0]), bucket.shape[1]),
                    self.results[0],
                    dtype=self.iterated,
                    orthogonalised=partial(bucket.orthogonalise, muon_.orthogonalise),
                    scale=reference.muon_scale(*bucket.shape),
                    **options,
                )

    def _upload_hyper(self) -> None:
        """Bring self.hyper up to date; a tensor lr is copied by the device, also at a graph's replay."""
        lrs = [group["lr"] for group in self.groups]
        on_device = [isinstance(lr, Tensor) and lr.device == self.hyper.device for lr in lrs]
        rows = [
            _hyper_row(group, 0.0 if there else float(lr))
            for group, lr, there in zip(self.groups, lrs, on_device, strict=True)
        ]
        if rows != self.rows:
            expect_before_capture("the last change of a hyper-parameter (but of an lr on the device)")
            _upload(torch.tensor(rows, dtype=torch.float64), self.hyper)
            self.rows = rows
        for row, lr, there in zip(self.hyper, lrs, on_device, strict=True):
            if there:
                row[0].copy_(lr)


def _hyper_row(group: dict[str, Any], lr: float) -> list[float]:
    if "momentum" in group:
        return muon_.hyper_row(lr, group["momentum"], group["weight_decay"])
    return adamw_.hyper_row(lr, group["betas"], group["eps"], group["weight_decay"])


class _Table:
    """A bucket's batch, kept pointing at the gradients of the moment."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.addresses: list[int] = []  # the gradients' in self.current.table
        self.current: tensor_table.Batch | None = None
        self.spare: tuple[Tensor, Tensor] | None = None  # for the next capture, made before it
        self.captured: list[tuple[Tensor, Tensor]] = []  # read by the graphs at every replay

    def batch(self, grads: list[Tensor]) -> tensor_table.Batch:
        """The batch with these gradients; uploads their addresses where they have changed."""
        b, addresses = self.bucket, [g.data_ptr() for g in grads]
        if self.current is None:
            self.current = tensor_table.make_batch(
                b.params, grads, b.masters, b.exp_avgs, b.exp_avg_sqs, b.steps, b.groups
            )
            self.host, self.addresses = self.current.table.cpu(), addresses
        if capturing():
            return self._captured_batch(self.current, addresses)
        if addresses != self.addresses:
            self.host[:, tensor_table.GRAD_COLUMN] = torch.tensor(addresses)
            _upload(self.host, self.current.table)
            self.addresses = addresses
        if self.spare is None:
            self.spare = _pinned(self.host), torch.empty_like(self.current.table)
        return self.current

    def _captured_batch(self, current: tensor_table.Batch, addresses: list[int]) -> tensor_table.Batch:
        """A batch of the graph's own: its upload is part of the graph, so other steps cannot disturb it."""
        if self.spare is None:
            expect_before_capture("one step for every capture")
        assert self.spare is not None
        source, table = self.spare
        self.captured.append(self.spare)
        self.spare = None
        source[:, tensor_table.GRAD_COLUMN] = torch.tensor(addresses)
        table.copy_(source, non_blocking=True)
        return replace(current, table=table)


def _pinned(x: Tensor) -> Tensor:
    """A copy of x, a CPU tensor, from where a GPU can fetch it while the CPU goes on."""
    return x.pin_memory() if torch.cuda.is_available() else x.clone()


def _upload(source: Tensor, target: Tensor) -> None:
    """Copy without waiting: the pinned copy's memory is not used again before the GPU has read it."""
    target.copy_(_pinned(source), non_blocking=True)


def capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def expect_before_capture(what: str) -> None:
    """Raise RuntimeError during a capture."""
    if capturing():
        raise RuntimeError(f"AdamW: expected {what} before the capture of a CUDA graph")

"""How the optimizer steps its parameters: by our kernels, or by torch's fused AdamW; see optimizer.AdamW.

A plan holds what stays the same from step to step, so that a step costs the CPU little.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference

if ops.HAS_TRITON:
    from fusedgpt.kernels import adamw as adamw_

Results = tuple[Tensor, Tensor, Tensor]  # AdamW's grad_norm, skipped and skipped_steps, written by a step


@dataclass(kw_only=True)
class Bucket:
    """Tensors that one launch can step: one dtype of parameters, one of gradients, one sharding."""

    process_groups: list[Any]  # over which the squared norm is summed
    groups: list[int] = field(default_factory=list)  # the parameter group of each
    grads: list[int] = field(default_factory=list)  # which of the gradients is whose
    keys: list[int] = field(default_factory=list)  # Philox's
    params: list[Tensor] = field(default_factory=list)  # from here on the local shards
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)

    def add(self, *, group: int, grad: int, key: int, param: Tensor, state: dict[str, Tensor]) -> None:
        """Take in one parameter."""
        self.groups.append(group)
        self.grads.append(grad)
        self.keys.append(key)
        self.params.append(local(param).detach())
        self.exp_avgs.append(local(state["exp_avg"]))
        self.exp_avg_sqs.append(local(state["exp_avg_sq"]))
        self.steps.append(state["step"])
        if "master" in state:
            self.masters.append(local(state["master"]))

    def grads_of(self, grads: list[Tensor]) -> list[Tensor]:
        """The bucket's among all local gradients, laid out in memory as their parameters."""
        mine = (grads[i] for i in self.grads)
        return [
            g if same_layout(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)
            for g, p in zip(mine, self.params, strict=True)
        ]


class Plan:
    """How the parameters that have gradients are stepped, for as long as they are the same ones."""

    def __init__(
        self,
        buckets: list[Bucket],
        parameters: list[Tensor],
        layout: list[object],  # dtype of each parameter's gradient
        stochastic: bool,
    ) -> None:
        self.buckets, self.parameters, self.layout, self.stochastic = buckets, parameters, layout, stochastic
        self.addresses = self._addresses()

    def _addresses(self) -> list[int]:
        return [local(p).data_ptr() for p in self.parameters]

    def outdated(self, layout: list[object]) -> bool:
        """Whether other parameters have gradients now, or memory of the parameters has moved."""
        return layout != self.layout or self._addresses() != self.addresses

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads its memory at every replay."""
        return False

    def step(
        self,
        grads: list[Tensor],
        groups: list[dict[str, Any]],
        max_norm: float,
        grad_scale: Tensor | None,
        results: Results,
    ) -> None:
        """One step of all buckets; grads: the local ones of the parameters that have any."""
        raise NotImplementedError


class TorchPlan(Plan):
    """By torch's fused AdamW, which unscales and checks as it does for torch.amp.GradScaler."""

    def step(
        self,
        grads: list[Tensor],
        groups: list[dict[str, Any]],
        max_norm: float,
        grad_scale: Tensor | None,
        results: Results,
    ) -> None:
        buckets = self.buckets
        mine = [bucket.grads_of(grads) for bucket in buckets]
        norm = _total_norm([(b.process_groups, g) for b, g in zip(buckets, mine, strict=True)])
        if grad_scale is not None:
            norm = norm / grad_scale
        skipped = (~norm.isfinite()).float()
        results[0].copy_(norm)
        results[1].copy_(skipped)
        results[2].add_(skipped.long())
        on_cpu = norm.device.type == "cpu"  # where looking costs nothing, and what is found out saves work
        if on_cpu and skipped:
            return
        divisor = grad_scale
        if max_norm > 0.0:
            clip = (norm / max_norm).clamp(min=1.0)
            divisor = clip if divisor is None else clip * divisor
        scales = {
            "grad_scale": None if divisor is None or (on_cpu and divisor == 1.0) else divisor,
            "found_inf": None if on_cpu else skipped,
        }
        for bucket, bucket_grads in zip(buckets, mine, strict=True):
            for group, members in groupby(range(len(bucket.params)), bucket.groups.__getitem__):
                self._step_group(bucket, bucket_grads, list(members), groups[group], scales)

    def _step_group(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        members: list[int],
        group: dict[str, Any],
        scales: dict[str, Tensor | None],
    ) -> None:
        params, exp_avgs, exp_avg_sqs, steps = (
            [x[i] for i in members]
            for x in (bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps)
        )
        dtype = exp_avgs[0].dtype
        wide = [bucket.masters[i] for i in members] if bucket.masters else [p.to(dtype) for p in params]
        wide_grads = [grads[i].to(dtype) for i in members]
        torch._foreach_add_(steps, 1.0)
        torch._fused_adamw_(
            wide,
            wide_grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            **scales,
        )
        skipped = scales["found_inf"]
        if skipped is not None:
            torch._foreach_sub_(steps, [skipped] * len(steps))
        for i, p, x in zip(members, params, wide, strict=True):
            if x is p:
                continue
            if self.stochastic and p.dtype == torch.bfloat16:
                x = reference.stochastic_round(x, bucket.keys[i], bucket.steps[i])
            p.copy_(x)


class TritonPlan(Plan):
    """By kernels/adamw.py: a norm launch and an update launch a bucket, of which a model usually has one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        n_groups = 1 + max(max(bucket.groups) for bucket in self.buckets)
        device = self.buckets[0].params[0].device
        self.hyper = torch.zeros(n_groups, 8, dtype=torch.float64, device=device)
        self.rows: list[list[float]] = []  # what self.hyper holds
        self.partials = torch.zeros(len(self.buckets), adamw_.PARTIALS, device=device)
        self.one = torch.ones((), device=device)
        self.tables = [_Table(bucket, self.stochastic) for bucket in self.buckets]

    @property
    def captured(self) -> bool:
        return any(table.captured for table in self.tables)

    def step(
        self,
        grads: list[Tensor],
        groups: list[dict[str, Any]],
        max_norm: float,
        grad_scale: Tensor | None,
        results: Results,
    ) -> None:
        self._upload_hyper(groups)
        kept = [bucket.grads_of(grads) for bucket in self.buckets]
        batches = [table.batch(g) for table, g in zip(self.tables, kept, strict=True)]
        for bucket, batch, partials in zip(self.buckets, batches, self.partials, strict=True):
            adamw_.grad_norm(batch, self.hyper, partials)
            for ranks in bucket.process_groups:
                torch.distributed.all_reduce(partials, group=ranks)
        for i, batch in enumerate(batches):
            scale = self.one if grad_scale is None else grad_scale
            adamw_.adamw(batch, self.partials, *results, max_norm=max_norm, grad_scale=scale, report=i == 0)

    def _upload_hyper(self, groups: list[dict[str, Any]]) -> None:
        """Bring self.hyper up to date; a tensor lr is copied by the device, also at a graph's replay."""
        groups = groups[: len(self.hyper)]  # behind them there are none with gradients
        on_device = [isinstance(g["lr"], Tensor) and g["lr"].device == self.hyper.device for g in groups]
        rows = [
            adamw_.hyper_row(0.0 if there else float(g["lr"]), g["betas"], g["eps"], g["weight_decay"])
            for g, there in zip(groups, on_device, strict=True)
        ]
        if rows != self.rows:
            expect_before_capture("the last change of a hyper-parameter (but of an lr on the device)")
            _upload(torch.tensor(rows, dtype=torch.float64), self.hyper)
            self.rows = rows
        for row, g, there in zip(self.hyper, groups, on_device, strict=True):
            if there:
                row[0].copy_(g["lr"])


class _Table:
    """A bucket's batch, kept pointing at the gradients of the moment."""

    def __init__(self, bucket: Bucket, stochastic: bool) -> None:
        self.bucket, self.keys = bucket, bucket.keys if stochastic else []
        self.addresses: list[int] = []  # the gradients' in self.current.table
        self.current: adamw_.Batch | None = None
        self.spare: tuple[Tensor, Tensor] | None = None  # of the next capture, made before it
        self.captured: list[tuple[Tensor, Tensor]] = []  # read by the graphs at every replay

    def batch(self, grads: list[Tensor]) -> adamw_.Batch:
        """The batch with these gradients; uploads their addresses where they have changed."""
        b, addresses = self.bucket, [g.data_ptr() for g in grads]
        if self.current is None:
            lists = (b.params, grads, b.exp_avgs, b.exp_avg_sqs, b.steps)
            self.current = adamw_.make_batch(*lists, masters=b.masters, groups=b.groups, keys=self.keys)
            self.host, self.addresses = self.current.table.cpu(), addresses
        if capturing():
            return self._captured_batch(addresses)
        if addresses != self.addresses:
            self.host[:, 1] = torch.tensor(addresses)
            _upload(self.host, self.current.table)
            self.addresses = addresses
        if self.spare is None:
            self.spare = _pinned(self.host), torch.empty_like(self.current.table)
        return self.current

    def _captured_batch(self, addresses: list[int]) -> adamw_.Batch:
        """A batch of the graph's own: its upload is part of the graph, so other steps cannot disturb it."""
        if self.spare is None:
            expect_before_capture("one step for every capture")
        assert self.spare is not None
        assert self.current is not None
        source, table = self.spare
        self.captured.append(self.spare)
        self.spare = None
        source[:, 1] = torch.tensor(addresses)
        table.copy_(source, non_blocking=True)
        return replace(self.current, table=table)


def _pinned(x: Tensor) -> Tensor:
    """A copy of x, a CPU tensor, from where a GPU can fetch it while the CPU goes on."""
    return x.pin_memory() if torch.cuda.is_available() else x.clone()


def _upload(source: Tensor, target: Tensor) -> None:
    """Copy without waiting: the pinned copy's memory is not used again before the GPU has read it."""
    target.copy_(_pinned(source), non_blocking=True)


def _total_norm(parts: list[tuple[list[Any], list[Tensor]]]) -> Tensor:
    """The norm of all gradients in fp32; parts: (process groups whose shards add up, gradients)."""
    norms: list[Tensor] = []
    for process_groups, grads in parts:
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, dtype=dtype))).float()
        for ranks in process_groups:
            square = norm.square()
            torch.distributed.all_reduce(square, group=ranks)
            norm = square.sqrt()
        norms.append(norm)
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; x itself if it is none."""
    if not is_sharded(x):
        return x
    shard: Tensor = x.to_local()  # type: ignore[attr-defined]
    return shard


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, without importing that: it takes most of a second."""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def same_layout(x: Tensor, like: Tensor) -> bool:
    """Whether the elements of x lie in memory in the order of those of `like`, dense and of its shape."""
    return x.is_contiguous() if like.is_contiguous() else x.stride() == like.stride()


def capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def expect_before_capture(what: str) -> None:
    """Raise RuntimeError during a capture."""
    if capturing():
        raise RuntimeError(f"AdamW: expected {what} before the capture of a CUDA graph")

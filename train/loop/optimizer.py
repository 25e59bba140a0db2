"""AdamW and Muon over all parameters at once; clip and check for finite gradients need no extra pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.optimizer_plan import MOMENTS, Bucket, TorchPlan, TritonPlan, expect_before_capture
from fusedgpt.train.loop.sharding import local, process_groups

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def build_optimizer(model: GPT, config: TrainConfig, *, micro_batches: int = 1) -> AdamW:
    """The optimizer that `config` names; weight decay on matrices only, never on biases and norms.

    muon: Muon for the matrices of a GPT's blocks, AdamW for all else. The projections to queries, keys and
    values are a matrix for each head. micro_batches: backward passes per step. On a GPU learning rates are
    tensors there, see AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "muon":
        muon = _muon_groups(model, config)
        theirs = {p for group in muon for p in group["params"]}
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in theirs]
        groups += muon
    for group in groups:
        if parameters[0].is_cuda:
            group["lr"] = torch.tensor(config.learning_rate, device=parameters[0].device)
    betas = (config.beta1, config.beta2)
    return AdamW(groups, config.learning_rate, betas, config.eps, fp32_accumulation=micro_batches > 1)


def _muon_groups(model: GPT, config: TrainConfig) -> list[dict[str, Any]]:
    matrices = {
        n: p for n, p in model.named_parameters() if p.ndim == 2 and p.requires_grad and n[:2] == "h."
    }
    stacked = [p for n, p in matrices.items() if n.endswith(".c_attn.weight")]
    single = [p for n, p in matrices.items() if not n.endswith(".c_attn.weight")]
    shared = {
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
        "lr_factor": config.muon_learning_rate / config.learning_rate,
    }
    heads = 3 * model.config.n_head
    return [{"params": single, **shared}, {"params": stacked, "matrices": heads, **shared}]


def is_muon(group: dict[str, Any]) -> bool:
    """Whether Muon steps this group of parameters."""
    return "momentum" in group


class AdamW(torch.optim.Optimizer):
    """AdamW of a whole model: a launch for the gradient norm, one for clip, check and update. Nothing waits.

    A group with "momentum" is stepped by Muon (kernels/muon.py, after AdamW's groups, at least one): its
    parameters are matrices, or "matrices" of one shape on top of each other; betas and eps do not count.

    params: fp32, bf16 or fp16 (fp64 off Triton), contiguous, all on one device; parameters or groups of them
    with their own lr, betas, eps, weight_decay. Moments are fp32. bf16 and fp16 parameters are rounded copies
    of fp32 ones, kept as state["master"] from the first step on (later changes to such a parameter by hand
    are lost). Each pair of parameter and gradient dtypes takes launches of its own.

    Gradient accumulation: fp32 parameters have fp32 gradients, which autograd adds up in place. For bf16 and
    fp16 ones fp32_accumulation adds each new gradient to an fp32 sum as soon as it is complete and frees it,
    so no second copy of all gradients exists; `.grad` then stays None. The sum costs 4 bytes per parameter:
    leave it off with one backward pass per step.

    A step whose gradient norm is not finite leaves parameters, moments and step counts as they are.
    Scalars on the device, overwritten by every step:
        grad_norm      fp32, before clipping
        skipped        fp32, 1.0 if this step was skipped, else 0.0
        skipped_steps  int64, how many were since the optimizer was made

    CUDA graphs: run one step, then capture one; it remembers the addresses of its own gradients. What
    changes between replays must be on the device: make group["lr"] an fp32 tensor there and fill it. A
    float, as schedulers set it, is uploaded (asynchronously) by the next step outside a graph.

    FSDP2: steps the local shards; the norm is summed over the ranks that share each parameter.
    state_dict is that of torch.optim.AdamW, plus "master". Where ops.backend says reference, as on a CPU,
    torch's fused AdamW does the update; it may scale `.grad` in place.
    Raises ValueError for hyper-parameters out of range and parameters or gradients it cannot step.
    Source: Loshchilov and Hutter 2019, algorithm 2, with PyTorch's lr * weight_decay.
    """

    def __init__(
        self,
        params: Any,  # as torch.optim.Optimizer takes them
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fp32_accumulation: bool = False,
    ) -> None:
        self._plan: TorchPlan | TritonPlan | None = None  # for as long as the next line stays the same
        self._planned: tuple[list[Any], list[int]] = ([], [])  # gradients' dtypes, parameters' addresses
        self._captured: list[TorchPlan | TritonPlan] = []  # older ones, for the graphs that use them
        self._fp32_accumulation = fp32_accumulation
        self.sums: dict[Tensor, Tensor] = {}  # fp32 gradients, used in place of .grad
        self.accumulates = True  # whether fp32_accumulation takes a new gradient
        self.grad_norm, self.skipped = torch.zeros(()), torch.zeros(())
        self.skipped_steps = torch.zeros((), dtype=torch.int64)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._drop_plan()
        for p in self.param_groups[-1]["params"] if is_muon(param_group) else ():
            n = param_group.get("matrices", 1)
            if p.ndim != 2 or len(p) % n:
                raise ValueError(
                    f"Muon: expected {n} matrices of one shape in each parameter, got {tuple(p.shape)}"
                )
        for p in self.param_groups[-1]["params"] if self._fp32_accumulation else ():
            if p.requires_grad and p.dtype in _LOW_PRECISION:
                p.register_post_accumulate_grad_hook(self._accumulate)

    @torch.no_grad()
    def _accumulate(self, p: Tensor) -> None:
        if not self.accumulates:
            return
        assert p.grad is not None
        if p in self.sums:
            self.sums[p] += p.grad
        else:
            self.sums[p] = p.grad.to(torch.float32)
        p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the sums of fp32_accumulation are dropped."""
        super().zero_grad(set_to_none)
        self.sums.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from this class or torch.optim.AdamW. Raises ValueError for amsgrad and maximize."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        self._drop_plan()
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for p, i in zip(self._parameters(), saved, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():  # torch cast it to p's dtype
                self.state[p][name] = torch.as_tensor(value).to(p.device, copy=True)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        *,
        max_norm: float = 0.0,
        grad_scale: Tensor | None = None,  # fp32 scalar on the device
    ) -> None:
        """One step with the gradient scaled to a norm of at most max_norm (0: not scaled).

        grad_scale: factor by which the gradients are too large (loss scaling), undone in norm and update.

        Raises ValueError for sparse gradients, RuntimeError in a CUDA graph's capture for what must have
        happened before it.
        """
        parameters = self._parameters()
        grads = [self.sums.get(p, p.grad) for p in parameters]
        layout = [None if g is None else g.dtype if g.layout is torch.strided else g.layout for g in grads]
        planned = layout, [local(p).data_ptr() for p in parameters]
        if self._plan is None or planned != self._planned:
            expect_before_capture("a step with the same parameters and dtypes")
            self._drop_plan()
            self._plan, self._planned = self._make_plan(parameters, grads), planned
        self._plan.step([local(g).contiguous() for g in grads if g is not None], max_norm, grad_scale)

    def _drop_plan(self) -> None:
        if self._plan is not None and self._plan.captured:
            self._captured.append(self._plan)
        self._plan = None

    def _make_plan(self, parameters: list[Tensor], grads: list[Tensor | None]) -> TorchPlan | TritonPlan:
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        present = [(i, p, g) for i, (p, g) in enumerate(zip(parameters, grads, strict=True)) if g is not None]
        for i, p, grad in present:
            _check_tensors(i, p, grad)
        devices = {p.device for _, p, _ in present}
        if len(devices) > 1:
            raise ValueError(f"params: expected all on one device, got {sorted(map(str, devices))}")
        for device in devices:  # if it has moved
            self.grad_norm, self.skipped = self.grad_norm.to(device), self.skipped.to(device)
            self.skipped_steps = self.skipped_steps.to(device)
        triton = {ops.backend("adamw", p.device, p.dtype) for _, p, _ in present} == {"triton"}
        buckets: dict[tuple[object, ...], Bucket] = {}
        for n, (i, p, grad) in enumerate(present):
            ranks, group = process_groups(p), self.param_groups[group_of[i]]
            shape = (len(p) // group.get("matrices", 1), p.shape[1]) if is_muon(group) else None
            key: tuple[object, ...] = (p.dtype, grad.dtype, shape, shape and p.shape, *ranks)
            key += () if triton else (group_of[i],)
            made = Bucket(
                process_groups=list(ranks.values()), shape=shape, shards=p if ranks and shape else None
            )
            state = self._state_of(p, MOMENTS[:2] if shape is None else MOMENTS[2:])
            buckets.setdefault(key, made).add(n, group_of[i], p, state)
        kind = TritonPlan if triton else TorchPlan
        results = (self.grad_norm, self.skipped, self.skipped_steps)
        return kind(list(buckets.values()), self.param_groups, results)

    def _state_of(self, p: Tensor, moments: tuple[str, ...]) -> dict[str, Tensor]:
        """p's state: made, or loaded and now in the dtype and on the device of a step."""
        state: dict[str, Tensor] = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        if moments == MOMENTS[:2]:
            state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=p.device)
        for name in moments:
            x = state[name] if name in state else torch.zeros_like(p, dtype=wide)
            state[name] = x.to(p.device, wide).contiguous()
        if p.dtype in _LOW_PRECISION:
            state["master"] = state.get("master", p).to(p.device, wide).contiguous()
        else:  # its weights were loaded from it
            state.pop("master", None)
        return state


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not isinstance(value, Tensor) and not value >= 0.0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    if not 0.0 <= group.get("momentum", 0.0) < 1.0:
        raise ValueError(f"momentum: expected 0 <= momentum < 1, got {group['momentum']}")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas: expected two numbers, 0 <= beta < 1, got {group['betas']}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, got {group[name]}")


def _check_tensors(index: int, p: Tensor, grad: Tensor) -> None:
    what = f"parameter {index}, {tuple(p.shape)}"
    if grad.layout is not torch.strided:
        raise ValueError(f"gradient of {what}: expected a dense tensor, got {grad.layout}")
    if getattr(p, "placements", None) != getattr(grad, "placements", None):
        raise ValueError(f"gradient of {what}: expected its placements {p.placements}")  # type: ignore[attr-defined]
    if not local(p).is_contiguous():
        raise ValueError(f"{what}: expected contiguous memory, got strides {local(p).stride()}")

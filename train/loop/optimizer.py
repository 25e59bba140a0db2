"""AdamW over all parameters at once; clipping and the check for non-finite gradients cost no pass more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedgpt.kernels import ops
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.optimizer_plan import (
    Bucket,
    Plan,
    TorchPlan,
    TritonPlan,
    expect_before_capture,
    is_sharded,
    local,
    same_layout,
)

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_DENSE = torch.strided


def build_optimizer(model: nn.Module, config: TrainConfig, *, micro_batches: int = 1) -> AdamW:
    """AdamW as `config` says; weight decay on matrices only, never on biases and norms.

    micro_batches: backward passes a step. On a GPU the learning rate is a tensor there, see AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        if parameters[0].is_cuda:
            group["lr"] = torch.tensor(config.learning_rate, device=parameters[0].device)
    betas = (config.beta1, config.beta2)
    accumulate = micro_batches > 1
    return AdamW(
        groups, config.learning_rate, betas, config.eps, fp32_accumulation=accumulate, seed=config.seed
    )


class AdamW(torch.optim.Optimizer):
    """AdamW of a whole model in two launches: gradient norm, then clip, check and update. Nothing waits.

    params: fp32, bf16 or fp16 (fp64 off Triton), dense, all on one device; parameters or groups of them with
    their own lr, betas, eps, weight_decay. Moments are fp32 whatever the parameters are.

    master_weights: low-precision parameters are rounded copies of fp32 ones, kept as state["master"] from the
    first step on (later changes to such a parameter by hand are lost). stochastic_rounding: bf16 parameters
    without masters, 4 bytes less each, are rounded up or down at random by `seed`, so that updates too small
    to be seen still count on average. With neither, updates are rounded to nearest and small ones vanish.

    Accumulation over micro-batches: fp32 parameters have fp32 gradients, which autograd adds up in place.
    For low-precision ones fp32_accumulation adds each new gradient to an fp32 sum as soon as it is complete
    and frees it, so no second copy of all gradients exists; `.grad` then stays None. The sum costs 4 bytes a
    parameter: leave it off where one backward makes a step.

    A step whose gradient norm is not finite leaves parameters, moments and step counts as they are.
    Scalars on the device, overwritten by every step:
        grad_norm      fp32, before clipping
        skipped        fp32, 1.0 if this step was skipped, else 0.0
        skipped_steps  int64, how many were since the optimizer was made

    CUDA graphs: run one step, then capture one; it remembers the addresses of its own gradients. What
    changes between replays must be on the device: make group["lr"] an fp32 tensor there and fill it. A
    float, as schedulers set it, is uploaded (asynchronously) by the next step outside a graph.

    FSDP2: steps the local shards; the norm is summed over the ranks that share each parameter.
    state_dict is that of torch.optim.AdamW, plus "master". Where the seam (FUSEDGPT_KERNELS) says reference,
    on a CPU for one, torch's fused AdamW does the update; it may scale `.grad` in place.
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
        master_weights: bool = True,
        stochastic_rounding: bool = False,
        fp32_accumulation: bool = False,
        seed: int = 0,
    ) -> None:
        if stochastic_rounding and master_weights:
            raise ValueError("stochastic_rounding: expected master_weights=False with it, got True")
        self._options = _Options(
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            fp32_accumulation=fp32_accumulation,
            seed=seed,
        )
        self._set_up()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _set_up(self) -> None:
        """What neither state_dict nor a copy carries over."""
        self._plan: Plan | None = None
        self._captured: list[Plan] = []  # older ones, for the graphs that use them
        self._sums: dict[Tensor, Tensor] = {}  # fp32_accumulation's gradients
        self.grad_norm, self.skipped = torch.zeros(()), torch.zeros(())
        self.skipped_steps = torch.zeros((), dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_options" in state:  # a copy; load_state_dict comes here too
            self._set_up()
        self._drop_plan()
        super().__setstate__(state)
        for group in self.param_groups:
            _check_group(group)
            if "_options" in state:
                self._watch(group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a parameter that is named twice in the group (tied weights) counts once."""
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch has a word on those
            param_group["params"] = list(dict.fromkeys(params))
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._drop_plan()
        self._watch(self.param_groups[-1]["params"])

    def _drop_plan(self) -> None:
        if self._plan is not None and self._plan.captured:
            self._captured.append(self._plan)
        self._plan = None

    def _watch(self, params: Iterable[Tensor]) -> None:
        if self._options.fp32_accumulation:
            for p in params:
                if p.requires_grad and p.dtype in _LOW_PRECISION:
                    p.register_post_accumulate_grad_hook(self._accumulate)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _accumulate(self, p: Tensor) -> None:
        assert p.grad is not None
        if p in self._sums:
            self._sums[p] += p.grad
        else:
            self._sums[p] = p.grad.to(torch.float32)
        p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, for the sums of fp32_accumulation as well."""
        super().zero_grad(set_to_none)
        if set_to_none:
            self._sums.clear()
        for total in self._sums.values():
            total.zero_()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from this class or torch.optim.AdamW. Raises ValueError for amsgrad and maximize."""
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        for p, i in zip(self._parameters(), saved, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():  # torch cast it to p's dtype
                self.state[p][name] = torch.as_tensor(value).to(p.device, copy=True)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        max_norm: float = 0.0,
        grad_scale: Tensor | None = None,  # fp32 scalar on the device
    ) -> float | None:
        """One step with the gradient scaled to a norm of at most max_norm (0: not scaled).

        grad_scale: gradients are so many times too large (loss scaling); norm and update are without it.

        closure: evaluates the model and returns the loss, which is returned. Raises ValueError for sparse
        gradients, RuntimeError in a CUDA graph's capture for what must have happened before it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        grads = (
            [self._sums.get(p, p.grad) for p in parameters] if self._sums else [p.grad for p in parameters]
        )
        layout: list[object] = [
            g if g is None else g.dtype if g.layout is _DENSE else g.layout for g in grads
        ]
        if self._plan is None or self._plan.outdated(layout):
            expect_before_capture("a step with the same parameters and dtypes")
            self._drop_plan()
            self._plan = self._make_plan(parameters, grads, layout)
        results = (self.grad_norm, self.skipped, self.skipped_steps)
        local_grads = [local(g) for g in grads if g is not None]
        self._plan.step(local_grads, self.param_groups, max_norm, grad_scale, results)
        return loss

    def _make_plan(self, parameters: list[Tensor], grads: list[Tensor | None], layout: list[object]) -> Plan:
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        buckets: dict[tuple[object, ...], Bucket] = {}
        present = 0
        for i, (p, grad) in enumerate(zip(parameters, grads, strict=True)):
            if grad is None:
                continue
            _check_tensors(i, p, grad)
            state, ranks = self._state_of(p), _process_groups(p)
            key = (p.dtype, grad.dtype, *(ranks.keys()))
            bucket = buckets.setdefault(key, Bucket(process_groups=list(ranks.values())))
            bucket.add(
                group=group_of[i], grad=present, key=_philox_key(self._options.seed, i), param=p, state=state
            )
            present += 1
        devices = {p.device for bucket in buckets.values() for p in bucket.params}
        if len(devices) > 1:
            raise ValueError(f"params: expected all on one device, got {sorted(map(str, devices))}")
        for device in devices:  # if it has moved
            results = (self.grad_norm, self.skipped, self.skipped_steps)
            self.grad_norm, self.skipped, self.skipped_steps = (x.to(device) for x in results)
        paths = {
            ops.backend("adamw", p.device, p.dtype) for bucket in buckets.values() for p in bucket.params
        }
        kind = TritonPlan if paths == {"triton"} else TorchPlan
        return kind(list(buckets.values()), parameters, layout, self._options.stochastic_rounding)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """p's state: made, or loaded and now given p's layout and device."""
        state: dict[str, Tensor] = self.state[p]
        wide = torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=p.device)
        names = ["exp_avg", "exp_avg_sq"]
        if self._options.master_weights and p.dtype in _LOW_PRECISION:
            names.append("master")
        else:
            state.pop("master", None)
        for name in names:
            x = state.get(name)
            if x is None:
                state[name] = p.to(wide) if name == "master" else torch.zeros_like(p, dtype=wide)
            elif x.dtype != wide or x.device != p.device or not same_layout(local(x), local(p)):
                state[name] = torch.empty_like(p, dtype=wide).copy_(x)
        return state


@dataclass(frozen=True, kw_only=True)
class _Options:
    master_weights: bool
    stochastic_rounding: bool
    fp32_accumulation: bool
    seed: int


def _process_groups(p: Tensor) -> dict[str, Any]:
    """Name -> process group, for each dimension of the mesh over which p is sharded."""
    if not is_sharded(p):
        return {}
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]  # type: ignore[attr-defined]
    groups = [p.device_mesh.get_group(i) for i in sharded]  # type: ignore[attr-defined]
    return {group.group_name: group for group in groups}


def _philox_key(seed: int, index: int) -> int:
    """A key of parameter `index`'s own, far from the model's dropout keys: splitmix64 of both, as int64."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def _check_group(group: dict[str, Any]) -> None:
    for name, low in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        value = group[name]
        if not isinstance(value, Tensor) and not low <= value:
            raise ValueError(f"{name}: expected a number >= {low:g}, got {value}")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas: expected two numbers, 0 <= beta < 1, got {group['betas']}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, got {group[name]}")


def _check_tensors(index: int, p: Tensor, grad: Tensor) -> None:
    what = f"parameter {index}, {tuple(p.shape)}"
    if not p.is_floating_point():
        raise ValueError(f"{what}: expected a floating-point dtype, got {p.dtype}")
    if grad.layout is not _DENSE:
        raise ValueError(f"gradient of {what}: expected a dense tensor, got {grad.layout}")
    if getattr(p, "placements", None) != getattr(grad, "placements", None):
        raise ValueError(f"gradient of {what}: expected its placements {p.placements}")  # type: ignore[attr-defined]
    dense = (
        local(p).is_contiguous() or torch.empty_like(local(p), device="meta").stride() == local(p).stride()
    )
    if not dense:
        raise ValueError(f"{what}: expected memory without gaps or overlap, got strides {local(p).stride()}")

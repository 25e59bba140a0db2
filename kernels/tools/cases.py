"""What the check, the tests and the benchmarks run of every op: its inputs, the op, its truth, its rival."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor | tuple[Tensor, ...]]

SEED, OFFSET = 7, 3 << 40  # of every dropout here


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape: `ours`, `truth` (run in float64) and `torch` take the same inputs by name."""

    op: str
    shape: str
    inputs: Callable[[torch.Generator], Inputs]  # float64 on the CPU, or integers
    ours: Function
    truth: Function
    torch: Function
    fp32_inputs: frozenset[str] = frozenset()  # these stay fp32 while the others take the dtype


def cases(device: torch.device) -> list[Case]:
    """The cases of `fusedgpt kernels check`: the models' shapes on a GPU, small ones for the interpreter."""
    if device.type == "cuda":
        return [
            dropout_case(16384, 768),
            dropout_case(1000, 1023),
            attention_case(4, 1024, 12, 64),
            attention_case(2, 1000, 4, 128),
            attention_case(2, 1024, 4, 64, dropout_p=0.1, documents=True),
            decode_attention_case(32, 1024, 12, 64),
            decode_attention_case(3, 777, 4, 128),
            layer_norm_case(16384, 768, fp32_weights=True),
            layer_norm_case(1000, 1500),
            dropout_add_layer_norm_case(16384, 768, fp32_inputs=("weight", "bias")),
            dropout_add_layer_norm_case(1000, 1600, p=0.0),
            gelu_case(4096, 3072),
            bias_gelu_case(4096, 3072, fp32_bias=True),
            bias_gelu_case(1000, 1023),
            linear_cross_entropy_case(2048, 768, 50257, fp32_weight=True),
            linear_cross_entropy_case(1000, 384, 65, reduction="mean", label_smoothing=0.1, z_loss=1e-4),
            adamw_case(4096, 768),
            adamw_case(1000, 1023, max_norm=1.0),
        ]
    return [
        dropout_case(3, 1024),
        dropout_case(5, 17),
        attention_case(1, 97, 2, 16),
        attention_case(1, 70, 1, 40, dropout_p=0.3, documents=True),
        decode_attention_case(3, 97, 2, 16),
        layer_norm_case(17, 97, fp32_weights=True),
        dropout_add_layer_norm_case(9, 200),
        gelu_case(5, 257),
        bias_gelu_case(7, 200, fp32_bias=True),
        linear_cross_entropy_case(17, 24, 65, fp32_weight=True),
        linear_cross_entropy_case(9, 16, 300, reduction="mean", label_smoothing=0.1, z_loss=1e-3),
        adamw_case(9, 200),
        adamw_case(3, 1023, max_norm=1.0),
    ]


def _scalars(device: torch.device) -> dict[str, Tensor]:
    return {"seed": torch.tensor(SEED, device=device), "offset": torch.tensor(OFFSET, device=device)}


def dropout_case(N: int, C: int, p: float = 0.3) -> Case:
    """ops.dropout on (N, C)."""

    def truth(x: Tensor) -> Tensor:
        return reference.dropout(x, p, **_scalars(x.device))

    return Case(
        op="dropout",
        shape=f"({N}, {C}), p {p}",
        inputs=lambda generator: {"x": torch.randn(N, C, dtype=torch.float64, generator=generator)},
        ours=lambda x: ops.dropout(x, p, **_scalars(x.device)),
        truth=truth,
        torch=truth,
    )


def attention_case(
    B: int,
    T: int,
    H: int,
    D: int,
    *,
    dropout_p: float = 0.0,
    documents: bool
    | Callable[[int], Tensor] = False,  # token positions -> ids; True: a new one every 50 tokens
    scale: float | None = None,
) -> Case:
    """ops.attention on (B, T, H, D)."""

    def inputs(generator: torch.Generator) -> Inputs:
        shape = (B, T, H, D)
        made = {
            name: torch.randn(shape, dtype=torch.float64, generator=generator) for name in ("q", "k", "v")
        }
        if documents:
            ids = documents(T) if callable(documents) else torch.arange(T) // 50
            made["documents"] = torch.stack([ids + b for b in range(B)])
        return made

    def call(op: Function) -> Function:
        def run(q: Tensor, **others: Tensor) -> Tensor | tuple[Tensor, ...]:
            state = _scalars(q.device) if dropout_p else {}
            return op(q, **others, dropout_p=dropout_p, scale=scale, **state)

        return run

    extras = (f", p {dropout_p}" if dropout_p else "") + (", documents" if documents else "")
    reference_ = call(reference.attention)
    return Case(
        op="attention",
        shape=f"({B}, {T}, {H}, {D}){extras}",
        inputs=inputs,
        ours=call(ops.attention),
        truth=reference_,
        torch=reference_,
    )


def decode_attention_case(B: int, T: int, H: int, D: int) -> Case:
    """ops.decode_attention on a cache (B, T, H, D), sequence b holding between 1 and T tokens."""

    def inputs(generator: torch.Generator) -> Inputs:
        cache = (B, T, H, D)
        shapes = {"q": (B, H, D), "k_cache": cache, "v_cache": cache}
        made = {name: torch.randn(s, dtype=torch.float64, generator=generator) for name, s in shapes.items()}
        return {**made, "lengths": torch.linspace(1, T, B).round().long()}

    def ours(**tensors: Tensor) -> Tensor:
        return ops.decode_attention(*(x.detach() for x in tensors.values()))

    def truth(**tensors: Tensor) -> Tensor:
        return reference.decode_attention(*(x.detach() for x in tensors.values()))

    return Case(
        op="decode_attention",
        shape=f"({B}, {T}, {H}, {D})",
        inputs=inputs,
        ours=ours,
        truth=truth,
        torch=truth,
    )


def linear_cross_entropy_case(
    N: int,
    C: int,
    V: int,
    *,
    reduction: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    fp32_weight: bool = False,
) -> Case:
    """ops.linear_cross_entropy on (N, C) with every seventh target ignored and V padded to a multiple of 128.

    "mean" and "sum" are of 16 problems at once: how well a single number is met is chance.
    """
    problems = 1 if reduction == "none" else 16

    def inputs(generator: torch.Generator) -> Inputs:
        P = (V + 127) // 128 * 128
        targets = torch.randint(V, (problems, N), generator=generator)
        targets[:, 3::7] = -100
        return {
            "hidden": torch.randn(problems, N, C, dtype=torch.float64, generator=generator),
            "weight": torch.randn(P, C, dtype=torch.float64, generator=generator) / math.sqrt(C),
            "targets": targets,
        }

    def call(op: Callable[..., Tensor]) -> Function:
        def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            options = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
            pairs = zip(hidden, targets, strict=True)
            return torch.stack([op(h, weight, t, vocab_size=V, **options) for h, t in pairs])

        return run

    extras = "".join(f", {name} {x}" for name, x in (("smoothing", label_smoothing), ("z-loss", z_loss)) if x)
    return Case(
        op="linear_cross_entropy",
        shape=f"({N}, {C}), V {V}, {reduction}{extras}",
        inputs=inputs,
        ours=call(ops.linear_cross_entropy),
        truth=call(reference.linear_cross_entropy),
        torch=call(reference.linear_cross_entropy),
        fp32_inputs=frozenset({"weight"} if fp32_weight else ()),
    )


def layer_norm_case(N: int, C: int, *, fp32_weights: bool = False) -> Case:
    """ops.layer_norm on (N, C)."""
    return Case(
        op="layer_norm",
        shape=f"({N}, {C}){', fp32 weights' if fp32_weights else ''}",
        inputs=lambda generator: _norm_inputs(N, C, generator),
        ours=ops.layer_norm,
        truth=reference.layer_norm,
        torch=reference.layer_norm,
        fp32_inputs=frozenset({"weight", "bias"} if fp32_weights else ()),
    )


def dropout_add_layer_norm_case(N: int, C: int, p: float = 0.3, *, fp32_inputs: Iterable[str] = ()) -> Case:
    """ops.dropout_add_layer_norm on (N, C)."""

    def inputs(generator: torch.Generator) -> Inputs:
        residual = torch.randn(N, C, dtype=torch.float64, generator=generator)
        return {"residual": residual, **_norm_inputs(N, C, generator)}

    def call(op: Function) -> Function:
        return lambda x, **others: op(x, **others, dropout_p=p, **_scalars(x.device))

    fp32 = sorted(fp32_inputs)
    return Case(
        op="dropout_add_layer_norm",
        shape=f"({N}, {C}), p {p}{', fp32 ' if fp32 else ''}{' '.join(fp32)}",
        inputs=inputs,
        ours=call(ops.dropout_add_layer_norm),
        truth=call(reference.dropout_add_layer_norm),
        torch=call(reference.dropout_add_layer_norm),
        fp32_inputs=frozenset(fp32),
    )


def _norm_inputs(N: int, C: int, generator: torch.Generator) -> Inputs:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((N, C), (C,), (C,)))
    return {"x": x + 0.5, "weight": 1.0 + 0.2 * weight, "bias": 0.2 * bias}


def gelu_case(N: int, C: int) -> Case:
    """ops.gelu on (N, C), from where it is 0 to where it is x."""
    return Case(
        op="gelu",
        shape=f"({N}, {C})",
        inputs=lambda generator: {"x": 2.0 * torch.randn(N, C, dtype=torch.float64, generator=generator)},
        ours=ops.gelu,
        truth=reference.gelu,
        torch=reference.gelu,
    )


def bias_gelu_case(N: int, C: int, *, fp32_bias: bool = False) -> Case:
    """ops.bias_gelu on (N, C)."""

    def inputs(generator: torch.Generator) -> Inputs:
        x, bias = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((N, C), (C,)))
        return {"x": 2.0 * x, "bias": bias}

    return Case(
        op="bias_gelu",
        shape=f"({N}, {C}){', fp32 bias' if fp32_bias else ''}",
        inputs=inputs,
        ours=ops.bias_gelu,
        truth=reference.bias_gelu,
        torch=reference.bias_gelu,
        fp32_inputs=frozenset({"bias"} if fp32_bias else ()),
    )


def adamw_case(N: int, C: int, *, max_norm: float = 0.0, steps: int = 10) -> Case:
    """The step after `steps` of kernels.adamw on a parameter (N, C), decaying; fp32 moments, no master.

    The learning rate is large, so that a step crosses many of bf16's numbers and rounding shows no bias.
    """
    options: dict[str, Any] = {"lr": 0.3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

    def inputs(generator: torch.Generator) -> Inputs:
        names = ("param", "grad", "exp_avg", "exp_avg_sq")
        x = {name: torch.randn(N, C, dtype=torch.float64, generator=generator) for name in names}
        return x | {"exp_avg": 0.01 * x["exp_avg"], "exp_avg_sq": 0.01 * x["exp_avg_sq"].square()}

    def ours(**inputs: Tensor) -> tuple[Tensor, ...]:
        from fusedgpt.kernels import adamw  # where there is Triton

        x = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        norm, skipped = torch.zeros(2, device=x["grad"].device).unbind()
        step, counter = torch.full_like(norm, steps), torch.zeros_like(norm, dtype=torch.int64)
        moments = ([x["exp_avg"]], [x["exp_avg_sq"]])
        batch = adamw.make_batch([x["param"]], [x["grad"]], *moments, [step])
        partials = torch.empty(adamw.PARTIALS, device=norm.device)
        hyper = torch.tensor([adamw.hyper_row(**options)], dtype=torch.float64, device=norm.device)
        adamw.grad_norm(batch, hyper, partials)
        adamw.adamw(batch, partials, norm, skipped, counter, max_norm=max_norm)
        return x["param"], x["exp_avg"], x["exp_avg_sq"]

    def truth(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, ...]:
        wide = grad.detach().to(exp_avg.dtype)
        clip = max(1.0, reference.grad_norm([wide]).item() / max_norm) if max_norm else 1.0
        state = (param.detach(), wide / clip, exp_avg.detach(), exp_avg_sq.detach())
        return reference.adamw(*state, steps + 1, **options)

    return Case(
        op="adamw",
        shape=f"({N}, {C}), max_norm {max_norm:g}",
        inputs=inputs,
        ours=ours,
        truth=truth,
        torch=truth,
        fp32_inputs=frozenset({"exp_avg", "exp_avg_sq"}),
    )

"""The cases on which the check, the tests and the benchmarks run every op."""

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

COUNTERS = {"seed": 7, "offset": 3 << 40}  # of every dropout here


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape; `ours` and `reference` take the same inputs by name."""

    op: str
    shape: str
    inputs: Callable[[torch.Generator], Inputs]  # float64 on the CPU, or integers
    ours: Function
    reference: Function  # in float64 the truth, in the op's dtype PyTorch's own error
    fp32_inputs: frozenset[str] = frozenset()  # these stay fp32 while the others take the op's dtype


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
            bias_gelu_case(4096, 3072, fp32_bias=True),
            bias_gelu_case(1000, 1023),
            linear_cross_entropy_case(2048, 768, 50257, fp32_weight=True),
            linear_cross_entropy_case(1000, 384, 65, reduction="mean", label_smoothing=0.1, z_loss=1e-4),
            adamw_case(4096, 768),
            adamw_case(1000, 1023, max_norm=1.0),
            muon_case(12, 768, 768),
            muon_case(2, 1000, 333),
        ]
    return [
        dropout_case(3, 1024),
        dropout_case(5, 17),
        attention_case(1, 97, 2, 16),
        attention_case(1, 70, 1, 40, dropout_p=0.3, documents=True),
        decode_attention_case(3, 97, 2, 16),
        layer_norm_case(17, 97, fp32_weights=True),
        dropout_add_layer_norm_case(9, 200),
        bias_gelu_case(7, 200, fp32_bias=True),
        linear_cross_entropy_case(17, 24, 65, fp32_weight=True),
        linear_cross_entropy_case(9, 16, 300, reduction="mean", label_smoothing=0.1, z_loss=1e-3),
        adamw_case(9, 200),
        adamw_case(3, 1023, max_norm=1.0),
        muon_case(2, 40, 97),
        muon_case(2, 150, 33),
    ]


def dropout_case(N: int, C: int, p: float = 0.3) -> Case:
    """ops.dropout on (N, C)."""
    return _case("dropout", f"({N}, {C})", lambda g: _randn(g, x=(N, C)), p=p)


def attention_case(
    B: int, T: int, H: int, D: int, *, documents: bool | Callable[[int], Tensor] = False, **options: Any
) -> Case:
    """ops.attention on (B, T, H, D) with options, e.g. dropout_p.

    documents: T -> the id of each token's document; True for a new document every 50 tokens.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        made = _randn(generator, **dict.fromkeys("qkv", (B, T, H, D)))
        if documents:
            ids = documents(T) if callable(documents) else torch.arange(T) // 50
            made["documents"] = torch.stack([ids + b for b in range(B)])
        return made

    shape = f"({B}, {T}, {H}, {D}){', documents' if documents else ''}"
    return _case("attention", shape, inputs, **options)


def decode_attention_case(B: int, T: int, H: int, D: int) -> Case:
    """ops.decode_attention on a cache (B, T, H, D), sequence b holding between 1 and T tokens."""

    def inputs(generator: torch.Generator) -> Inputs:
        cache = (B, T, H, D)
        lengths = torch.linspace(1, T, B).round().long()
        return _randn(generator, q=(B, H, D), k_cache=cache, v_cache=cache) | {"lengths": lengths}

    return _case("decode_attention", f"({B}, {T}, {H}, {D})", inputs, wrap=torch.no_grad())


def linear_cross_entropy_case(
    N: int, C: int, V: int, *, reduction: str = "none", fp32_weight: bool = False, **options: Any
) -> Case:
    """ops.linear_cross_entropy on (N, C) with options, e.g. z_loss.

    Every seventh target is ignored, and V padded to a multiple of 128. "mean" and "sum" run 16 problems at
    once: the error of a single number is chance.
    """
    problems = 1 if reduction == "none" else 16

    def inputs(generator: torch.Generator) -> Inputs:
        targets = torch.randint(V, (problems, N), generator=generator)
        targets[:, 3::7] = -100
        made = _randn(generator, hidden=(problems, N, C), weight=((V + 127) // 128 * 128, C))
        return made | {"weight": made["weight"] / math.sqrt(C), "targets": targets}

    def wrap(op: Callable[..., Any]) -> Function:
        def run(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
            return torch.stack([op(h, weight, t, **options) for h, t in zip(hidden, targets, strict=True)])

        return run

    fp32 = ["weight"] if fp32_weight else []
    options |= {"vocab_size": V, "reduction": reduction}
    return _case("linear_cross_entropy", f"({N}, {C})", inputs, fp32, wrap=wrap, **options)


def layer_norm_case(N: int, C: int, *, fp32_weights: bool = False) -> Case:
    """ops.layer_norm on (N, C)."""
    fp32 = ["weight", "bias"] if fp32_weights else []
    return _case("layer_norm", f"({N}, {C})", lambda g: _norm_inputs(N, C, g), fp32)


def dropout_add_layer_norm_case(N: int, C: int, p: float = 0.3, *, fp32_inputs: Iterable[str] = ()) -> Case:
    """ops.dropout_add_layer_norm on (N, C), with x_bias where there is dropout."""

    def inputs(generator: torch.Generator) -> Inputs:
        made = _randn(generator, residual=(N, C)) | _norm_inputs(N, C, generator)
        return made | (_randn(generator, x_bias=(C,)) if p else {})

    return _case("dropout_add_layer_norm", f"({N}, {C})", inputs, fp32_inputs, dropout_p=p)


def _norm_inputs(N: int, C: int, generator: torch.Generator) -> Inputs:
    x, weight, bias = _randn(generator, x=(N, C), weight=(C,), bias=(C,)).values()
    return {"x": x + 0.5, "weight": 1.0 + 0.2 * weight, "bias": 0.2 * bias}


def bias_gelu_case(N: int, C: int, *, fp32_bias: bool = False) -> Case:
    """ops.bias_gelu on (N, C), from where it is 0 to where it is x."""

    def inputs(generator: torch.Generator) -> Inputs:
        made = _randn(generator, x=(N, C), bias=(C,))
        return made | {"x": 2.0 * made["x"]}

    return _case("bias_gelu", f"({N}, {C})", inputs, ["bias"] if fp32_bias else [])


def adamw_case(N: int, C: int, *, max_norm: float = 0.0) -> Case:
    """Step 11 of kernels.adamw on a parameter (N, C): weight decay, fp32 moments and master.

    The learning rate is large: a step crosses many bf16 values, so that rounding does not look like a bias.
    """
    options: dict[str, Any] = {"lr": 0.3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

    def inputs(generator: torch.Generator) -> Inputs:
        x = _randn(generator, param=(N, C), grad=(N, C), exp_avg=(N, C), exp_avg_sq=(N, C))
        return x | {"exp_avg": 0.01 * x["exp_avg"], "exp_avg_sq": 0.01 * x["exp_avg_sq"].square()}

    def ours(**inputs: Tensor) -> tuple[Tensor, ...]:
        from fusedgpt.kernels import adamw, tensor_table  # where there is Triton

        x = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        norm, skipped = torch.zeros(2, device=x["grad"].device).unbind()
        step, counter = torch.full_like(norm, 10), torch.zeros_like(norm, dtype=torch.int64)
        master, moments = x["param"].float(), ([x["exp_avg"]], [x["exp_avg_sq"]])
        batch = tensor_table.make_batch([x["param"]], [x["grad"]], [master], *moments, [step], [0])
        partials = torch.empty(adamw.PARTIALS, device=norm.device)
        hyper = torch.tensor([adamw.hyper_row(**options)], dtype=torch.float64, device=norm.device)
        adamw.grad_norm(batch, hyper, partials)
        adamw.adamw(batch, partials, norm, skipped, counter, max_norm=max_norm)
        return x["param"], x["exp_avg"], x["exp_avg_sq"]

    def expected(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, ...]:
        wide = grad.detach().to(exp_avg.dtype)
        clip = max(1.0, reference.grad_norm([wide]).item() / max_norm) if max_norm else 1.0
        state = (param.detach(), wide / clip, exp_avg.detach(), exp_avg_sq.detach())
        return reference.adamw(*state, 11, **options)

    return Case(
        op="adamw",
        shape=f"({N}, {C}), max_norm {max_norm:g}",
        inputs=inputs,
        ours=ours,
        reference=expected,
        fp32_inputs=frozenset({"exp_avg", "exp_avg_sq"}),
    )


def muon_case(n: int, R: int, C: int) -> Case:
    """A step of kernels.muon on parameters (n, R, C): weight decay, fp32 momentum and master.

    The iteration is in bf16, which the interpreter miscomputes: there in the parameters' dtype.
    """
    options: dict[str, Any] = {"lr": 3.0, "weight_decay": 0.1}

    def inputs(generator: torch.Generator) -> Inputs:
        return _randn(generator, param=(n, R, C), grad=(n, R, C), momentum=(n, R, C))

    def iterated(grad: Tensor) -> torch.dtype:
        return torch.bfloat16 if grad.is_cuda else grad.dtype

    def ours(**inputs: Tensor) -> tuple[Tensor, ...]:
        from fusedgpt.kernels import adamw, muon, tensor_table  # where there is Triton

        x = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        param, grad, momentum, master = (
            list(tensor) for tensor in (x["param"], x["grad"], x["momentum"], x["param"].float())
        )
        norm, hyper = torch.ones((), device=x["grad"].device), muon.hyper_row(momentum=0.95, **options)
        tensors = (param, grad, master, momentum, momentum, [norm] * n)
        batch = tensor_table.make_batch(*tensors, [0] * n)
        rows = torch.tensor([hyper], dtype=torch.float64, device=norm.device)
        adamw.grad_norm(batch, rows, torch.empty(adamw.PARTIALS, device=norm.device))
        muon.muon(batch, (R, C), norm, dtype=iterated(x["grad"]))
        return x["param"], x["momentum"]

    def expected(param: Tensor, grad: Tensor, momentum: Tensor) -> tuple[Tensor, ...]:
        def orthogonalised(x: Tensor) -> Tensor:
            dtype = grad.dtype if grad.dtype == torch.float64 else iterated(grad)
            return reference.orthogonalise(x.to(dtype)).to(x.dtype)

        state = (param.detach(), grad.detach(), momentum.detach())
        return reference.muon(*state, beta=0.95, orthogonalised=orthogonalised, **options)

    return Case(
        op="muon",
        shape=f"{n} of ({R}, {C})",
        inputs=inputs,
        ours=ours,
        reference=expected,
        fp32_inputs=frozenset({"momentum"}),
    )


def _case(
    op: str,
    shape: str,
    inputs: Callable[[torch.Generator], Inputs],
    fp32_inputs: Iterable[str] = (),
    *,
    wrap: Callable[[Function], Function] = lambda function: function,
    **options: Any,
) -> Case:
    """The case of an op and its reference, each called with `options` and, for dropout, its counters."""

    def call(function: Function) -> Function:
        def run(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            state = {}
            if op.startswith("dropout") or options.get("dropout_p"):
                device = next(iter(inputs.values())).device
                state = {name: torch.tensor(x, device=device) for name, x in COUNTERS.items()}
            return wrap(function)(**inputs, **options, **state)

        return run

    labels = [shape, *(f"{name} {x}" for name, x in options.items() if x)]
    return Case(
        op=op,
        shape=", ".join([*labels, *(f"fp32 {name}" for name in sorted(fp32_inputs))]),
        inputs=inputs,
        ours=call(getattr(ops, op)),
        reference=call(getattr(reference, op)),
        fp32_inputs=frozenset(fp32_inputs),
    )


def _randn(generator: torch.Generator, **shapes: tuple[int, ...]) -> Inputs:
    """Normally distributed float64 tensors by name."""
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()
    }

"""GPT-2, leaf to whole, in the names of OpenAI's checkpoint.

Shape letters: B batch, T tokens, C channels, H heads, D head size, V vocabulary.

Parameters may be fp32 while activations are bf16: every layer casts its weights to the dtype that comes in,
and `GPT.compute_dtype` decides what goes in. Dropout is counter-based: its masks are a pure function of
(dropout_seed, dropout_step, layer), so a resumed or recomputed step draws the same ones.

Training has two switches that sampling and evaluation never see: `GPT.checkpointing` keeps less for the
backward pass and computes it again there, `GPT.compile_blocks` compiles one block and runs them all with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu.linear import transposed_storage
from fusedgpt.model.config import GPTConfig

CHECKPOINTING = ("none", "selective", "full")
_OFFSET_BITS = 40  # each training step owns 2^40 dropout counters
_BLOCK_SITES = 3  # places with dropout in a block; site 0 of the network is the embedding
Dropout = tuple[float, Tensor | None, Tensor | None]  # p and, where it is not 0, seed and offset


@dataclass(frozen=True, kw_only=True)
class DropoutState:
    """Where a step's dropout masks come from, if from anywhere: every place in the network has its seed."""

    p: float = 0.0
    seeds: Tensor | None = None  # (sites, 2) int64, the second unused: Triton likes pointers 16 bytes apart
    offset: Tensor | None = None  # int64 scalar

    def at(self, site: int) -> Dropout:
        """(p, seed, offset) for one place in the network."""
        return self.p, None if self.seeds is None else self.seeds[site, 0], self.offset

    def of_block(self, layer: int) -> DropoutState:
        """The block's own three sites, as 0 to 2: so every block looks the same to torch.compile."""
        if self.seeds is None:
            return self
        first = 1 + _BLOCK_SITES * layer
        return DropoutState(p=self.p, seeds=self.seeds[first : first + _BLOCK_SITES], offset=self.offset)


@torch.library.custom_op("fusedgpt::next_dropout_step", mutates_args={"step"})
def _next_step(step: Tensor) -> Tensor:
    """step += 1, and a copy of it.

    An opaque op: anything simpler inductor may compute again in the backward pass, from the step already
    counted up, and so draw other masks than in the forward pass (seen in torch 2.13).
    """
    return step.add_(1).clone()


@_next_step.register_fake
def _(step: Tensor) -> Tensor:
    return torch.empty_like(step)


def _call(module: nn.Module, *args: Any, recompute: bool) -> Any:
    """module(*args); with `recompute` only its inputs are kept, and the backward pass calls it again."""
    if not recompute:
        return module(*args)
    # Dropout is counter-based: torch's random state, which checkpoint would save and restore, has no part.
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)


class KVCache:
    """Keys and values of the tokens seen so far, `length` rows filled: for each layer (B, window, H, D).

    The other rows are memory that nobody has written, and on a CPU takes none.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch_size, config.window, config.n_head, config.head_dim)
        self.k, self.v = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, H, D) behind what is there; returns the layer's whole cache (B, window, H, D)."""
        k_cache, v_cache, end = self.k[layer], self.v[layer], self.length + k.shape[1]
        k_cache[:, self.length : end], v_cache[:, self.length : end] = k, v
        return k_cache, v_cache


class Embedding(nn.Embedding):
    """nn.Embedding whose weights are left to GPT to draw."""

    def reset_parameters(self) -> None:
        """None are drawn twice."""


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input; GPT draws its weights."""

    def reset_parameters(self) -> None:
        """None are drawn twice."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """The parameters of a LayerNorm; fused with the residual add before it where there is one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
        """(norm of the new residual, the new residual); new residual = residual + dropout(x)."""
        return ops.dropout_add_layer_norm(x, residual, self.weight, self.bias, self.eps, *dropout)


class Attention(nn.Module):
    """Causal multi-head self-attention over a fused qkv projection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        dropout: Dropout,
        documents: Tensor | None,  # (B, T)
        cache: KVCache | None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); with a filled cache, T is 1."""
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if cache is not None:
            q, k, v = qkv.unbind(2)  # (B, T, H, D)
            k_cache, v_cache = cache.append(self.layer, k, v)
        if cache is not None and cache.length:
            y = ops.decode_attention(q[:, 0], k_cache, v_cache, cache.length + 1)  # (B, H, D)
        else:
            p, seed, offset = dropout
            y = ops.qkv_attention(qkv, dropout_p=p, seed=seed, offset=offset, documents=documents)
        out: Tensor = self.c_proj(y.reshape(B, T, C))
        return out


class MLP(nn.Module):
    """Two linear layers, four times as wide in between, with a tanh GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        wide = ops.linear(x, self.c_fc.weight)  # (B, T, 4C)
        out: Tensor = self.c_proj(ops.bias_gelu(wide, self.c_fc.bias))
        return out


class Block(nn.Module):
    """Pre-LayerNorm block, ending in the norm of what follows it so that every residual add is fused."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (B, T, C) ln_1 of the residual
        residual: Tensor,  # (B, T, C)
        next_norm: LayerNorm,
        dropout: DropoutState,
        documents: Tensor | None,
        cache: KVCache | None = None,
        recompute: bool = False,  # what attention and MLP would keep for the backward pass
    ) -> tuple[Tensor, Tensor]:
        """(next_norm of the new residual, the new residual)."""
        a = _call(self.attn, x, dropout.at(0), documents, cache, recompute=recompute)
        x, residual = self.ln_2.add(a, residual, dropout.at(1))
        return next_norm.add(_call(self.mlp, x, recompute=recompute), residual, dropout.at(2))


def _train_block(
    block: Block,
    x: Tensor,  # (B, T, C)
    residual: Tensor,  # (B, T, C)
    next_norm: LayerNorm,
    dropout: DropoutState,
    documents: Tensor | None,
    checkpointing: str,
) -> tuple[Tensor, Tensor]:
    """The block in training; nothing here depends on its number, so that one compiled graph serves all."""
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing: expected {', '.join(CHECKPOINTING)}, got {checkpointing!r}")
    args = (x, residual, next_norm, dropout, documents, None, checkpointing == "selective")
    out: tuple[Tensor, Tensor] = _call(block, *args, recompute=checkpointing == "full")
    return out


class GPT(nn.Module):
    """GPT-2 with learned positions and a head tied to the token embedding.

    `compute_dtype` is the dtype of activations (None: that of the parameters). `seed` draws the initial
    weights and starts the dropout stream. `checkpointing`, in training: "none" keeps all activations for the
    backward pass; "selective" computes those within attention and MLP again there, "full" all but each
    block's inputs. The gradients are the same; after inductor, which then fuses differently, up to rounding.
    """

    dropout_seed: Tensor
    dropout_step: Tensor

    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpointing = "none"
        self._train_block: Callable[..., tuple[Tensor, Tensor]] = _train_block
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.seed_dropout(seed)
        if not self.wte.weight.is_meta:
            self._initialise(torch.Generator().manual_seed(seed))

    def seed_dropout(self, seed: int, step: int = 0) -> None:
        """Start the dropout stream of `seed` behind its training step `step`."""
        device = self.ln_f.weight.device
        self.register_buffer("dropout_seed", torch.tensor(seed, device=device), persistent=False)
        self.register_buffer("dropout_step", torch.tensor(step, device=device), persistent=False)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual scaled by 1 / sqrt(2 * n_layer), biases 0."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, residual_std, generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
        self.wte.weight[self.config.vocab_size :] = 0.0

    @property
    def activation_dtype(self) -> torch.dtype:
        """What the layers compute in."""
        return self.compute_dtype or self.wte.weight.dtype

    def _dropout_state(self) -> DropoutState:
        if not self.training or self.config.dropout == 0.0:
            return DropoutState()
        sites = 1 + _BLOCK_SITES * self.config.n_layer
        step = _next_step(self.dropout_step)
        seeds = self.dropout_seed + torch.arange(2 * sites, device=step.device) // 2
        return DropoutState(p=self.config.dropout, seeds=seeds.view(sites, 2), offset=step << _OFFSET_BITS)

    def compile_blocks(self, **options: Any) -> None:
        """Compile one block, with torch.compile's `options`, and train all of them with it."""
        self._train_block = torch.compile(_train_block, fullgraph=True, dynamic=False, **options)

    def hidden(self, idx: Tensor, *, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The final LayerNorm's output (B, T, C) for token ids idx (B, T); see forward."""
        T, start = idx.shape[1], cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"idx: {start + T} tokens, but block_size is {self.config.block_size}")
        if start and T != 1:
            raise ValueError(f"idx: a filled cache takes one token at a time, got {T}")
        dropout = self._dropout_state()
        positions = torch.arange(start, start + T, device=idx.device)
        # The head's gradient of wte is dense; adding the embedding's few rows to it beats a second dense one.
        sparse = idx.device.type == "cpu" and not torch.compiler.is_compiling()
        embedded = F.embedding(idx, self.wte.weight, sparse=sparse) + self.wpe(positions)
        embedded = embedded.to(self.activation_dtype)
        residual = ops.dropout(embedded, *dropout.at(0))  # (B, T, C)
        blocks = self.blocks()
        next_norms = [*(block.ln_1 for block in blocks[1:]), self.ln_f]
        x: Tensor = blocks[0].ln_1(residual)
        trains = self.training and torch.is_grad_enabled() and cache is None
        for layer, (block, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            args = (x, residual, next_norm, dropout.of_block(layer), documents)
            if trains:
                x, residual = self._train_block(block, *args, self.checkpointing)
            else:
                x, residual = block(*args, cache)
        if cache is not None:
            cache.length += T
        return x

    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return list(self.h)  # type: ignore[arg-type]  # ModuleList says nothing of what it holds

    def for_sampling(self) -> GPT:
        """This model, in eval mode, its matrices stored as sampling reads them fastest; not to be trained.

        `generate` then runs one sequence on a CPU without the modules (model/decode.py) and their hooks.
        """
        linears = [module.weight for module in self.modules() if isinstance(module, Linear)]
        for weight in (*linears, self.wte.weight):
            weight.data = transposed_storage(weight.data)
        return self.requires_grad_(False).eval()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V), without the vocabulary's padding."""
        return ops.linear(hidden, self.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self,
        idx: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, -100 is ignored
        *,
        documents: Tensor | None = None,  # (B, T) int, see ops.attention
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Without targets the logits (B, T, V); with them the loss, an fp32 scalar ("none": (B * T,)).

        label_smoothing, z_loss: see ops.linear_cross_entropy. Raises ValueError where idx is longer than
        block_size or a target is no token.
        """
        hidden = self.hidden(idx, documents=documents)
        if targets is None:
            return self.logits(hidden)
        return ops.linear_cross_entropy(
            hidden.view(-1, self.config.n_embd),
            self.wte.weight,
            targets.reshape(-1),
            vocab_size=self.config.vocab_size,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

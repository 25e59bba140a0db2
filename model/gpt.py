"""GPT-2, leaf to whole, in the names of OpenAI's checkpoint.

Shape letters: B batch, T tokens, C channels, H heads, D head size, V vocabulary.

Every layer computes in the dtype of its input and casts its weights to it, so one argument, `dtype`, decides
the precision of all activations. Dropout is counter-based: the mask of a window (a row of the batch) is a
pure function of (dropout_seed, windows trained before it, place in the network). So a resumed or recomputed
step draws the same ones, however its windows are split over micro-batches and processes.

How the model is trained is not its business: the trainer adds gradient checkpointing and torch.compile from
outside. Sampling with a key-value cache is in decode.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedgpt.kernels import ops
from fusedgpt.kernels.ops import Documents
from fusedgpt.model.config import GPTConfig

_SITES_PER_BLOCK = 3  # dropout on the block's input, the attention weights and attention's output
_ATTENTION = 1  # the second of them


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """A batch's dropout: every place (site) in the network has a seed of its own.

    Offsets are where the counters of the batch's first window begin; each window has as many as it needs.
    """

    p: float = 0.0
    seeds: Tensor | None = None  # (sites, 2) int64, the second unused: Triton likes pointers 16 bytes apart
    offset: Tensor | None = None  # int64 scalar, of rows of the residual stream
    attention_offset: Tensor | None = None  # the same of attention weights

    def at(self, site: int) -> tuple[float, Tensor | None, Tensor | None]:
        """The arguments (p, seed, offset) of an op with dropout; site: of a block, or -1, the last norm's."""
        offset = self.attention_offset if site == _ATTENTION else self.offset
        return self.p, None if self.seeds is None else self.seeds[site, 0], offset

    def of_block(self, layer: int) -> Dropout:
        """The block's sites as 0, 1, 2, whatever its number: so that blocks can share a compiled graph."""
        if self.seeds is None:
            return self
        first = _SITES_PER_BLOCK * layer
        seeds = self.seeds[first : first + _SITES_PER_BLOCK]
        return Dropout(p=self.p, seeds=seeds, offset=self.offset, attention_offset=self.attention_offset)


@torch.library.custom_op("fusedgpt::next_dropout_windows", mutates_args={"windows"})
def _next_windows(windows: Tensor, n: int) -> Tensor:
    """A copy of `windows`, which becomes n more.

    An opaque op: inductor may recompute anything simpler in the backward pass, from the count already gone
    up, and so draw other masks than in the forward pass (seen in torch 2.13).
    """
    first = windows.clone()
    windows.add_(n)
    return first


@_next_windows.register_fake
def _(windows: Tensor, n: int) -> Tensor:
    return torch.empty_like(windows)


class Embedding(nn.Embedding):
    """nn.Embedding; GPT draws its weights."""

    def reset_parameters(self) -> None:
        """Nothing: GPT._initialise draws all weights, once."""


class Linear(nn.Linear):
    """nn.Linear in the dtype of its input; GPT draws its weights."""

    def reset_parameters(self) -> None:
        """Nothing: GPT._initialise draws all weights, once."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LinearBeforeNorm(Linear):
    """A linear layer whose output goes into LayerNorm, where `left_bias` may still be to be added."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, None if ops.norm_adds_bias(x) else self.bias)

    def left_bias(self, y: Tensor) -> Tensor | None:
        """The bias (K,), if the output y (..., K) is without it."""
        return self.bias if ops.norm_adds_bias(y) else None


class LayerNorm(nn.Module):
    """Dropout on a branch's output, its addition to the residual stream, the norm of the sum: one op."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon

    def forward(
        self,
        x: Tensor,  # (..., C) the output of the branch before
        x_bias: Tensor | None,  # (C,) what is still to be added to it
        residual: Tensor | None,  # (..., C); None where x begins the residual stream
        dropout: tuple[float, Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """(norm of the new residual, the new residual): residual + dropout(x + x_bias)."""
        if residual is None:
            residual = ops.dropout(x, *dropout)
            return ops.layer_norm(residual, self.weight, self.bias, self.eps), residual
        vectors = self.weight, self.bias, self.eps
        return ops.dropout_add_layer_norm(x, residual, *vectors, *dropout, x_bias=x_bias)


class Attention(nn.Module):
    """Causal multi-head self-attention over a fused qkv projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = LinearBeforeNorm(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        dropout: tuple[float, Tensor | None, Tensor | None],
        documents: Documents | None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.size()
        p, seed, offset = dropout
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        y = ops.qkv_attention(qkv, dropout_p=p, seed=seed, offset=offset, documents=documents)
        out: Tensor = self.c_proj(y.reshape(B, T, C))  # from (B, T, H, D)
        return out


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them, four times as wide there."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = LinearBeforeNorm(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        wide = ops.linear(x, self.c_fc.weight)  # (B, T, 4C); the bias goes into the GELU's kernel
        out: Tensor = self.c_proj(ops.bias_gelu(wide, self.c_fc.bias))
        return out


class Block(nn.Module):
    """Pre-LayerNorm block. It begins with the dropout and the addition that end the block before.

    So every addition is fused with the norm that follows it, and a block uses no parameters but its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (B, T, C) the embedding, or the MLP's output of the block before
        x_bias: Tensor | None,  # (C,) what is still to be added to it
        residual: Tensor | None,  # (B, T, C); None in the first block
        dropout: Dropout,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(the MLP's output, a bias that is to be added to it, the residual both are to be added to)."""
        x, residual = self.ln_1(x, x_bias, residual, dropout.at(0))
        x = self.attn(x, dropout.at(1), documents)
        x, residual = self.ln_2(x, self.attn.c_proj.left_bias(x), residual, dropout.at(2))
        x = self.mlp(x)
        x_bias = self.mlp.c_proj.left_bias(x)
        # A copy: by the time it is added, FSDP may have freed this block's parameters.
        return x, None if x_bias is None else x_bias.clone(), residual


class GPT(nn.Module):
    """GPT-2 with learned positions and a head tied to the token embedding.

    `seed` draws the initial weights and starts the dropout stream.
    """

    dropout_seed: Tensor
    dropout_windows: Tensor

    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.seed_dropout(seed)
        if not self.wte.weight.is_meta:
            self._initialise(torch.Generator().manual_seed(seed))

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

    def seed_dropout(self, seed: int, windows: int = 0) -> None:
        """Start the dropout stream of `seed` behind the first `windows` windows of training."""
        device = self.ln_f.weight.device
        self.register_buffer("dropout_seed", torch.tensor(seed, device=device), persistent=False)
        self.register_buffer("dropout_windows", torch.tensor(windows, device=device), persistent=False)

    def _next_dropout(self, B: int, T: int) -> Dropout:
        """The dropout of the next B windows of T tokens; none outside of training."""
        if not self.training or self.config.dropout == 0.0:
            return Dropout()
        sites = _SITES_PER_BLOCK * self.config.n_layer + 1  # the last is ln_f's
        windows = _next_windows(self.dropout_windows, B)
        seeds = self.dropout_seed + torch.arange(2 * sites, device=windows.device) // 2
        return Dropout(
            p=self.config.dropout,
            seeds=seeds.view(sites, 2),
            offset=windows * (T * ops.dropout_blocks(self.config.n_embd)),
            attention_offset=windows * (self.config.n_head * ops.attention_dropout_blocks(T)),
        )

    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return list(self.h)  # type: ignore[arg-type]  # ModuleList says nothing of what it holds

    def hidden(
        self, idx: Tensor, *, documents: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the final LayerNorm's output (B, T, C), the head's weight (P, C)) for ids (B, T); see forward."""
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"idx: {T} tokens, but block_size is {self.config.block_size}")
        dropout = self._next_dropout(B, T)
        x, head = ops.embedding(idx, self.wte.weight)
        x = x + self.wpe(torch.arange(T, device=idx.device))
        x = x.to(dtype or x.dtype)  # (B, T, C)
        x_bias: Tensor | None = None
        residual: Tensor | None = None
        prepared = None if documents is None else ops.prepare_documents(documents)
        for layer, block in enumerate(self.blocks()):
            x, x_bias, residual = block(x, x_bias, residual, dropout.of_block(layer), prepared)
        return self.ln_f(x, x_bias, residual, dropout.at(-1))[0], head

    def forward(
        self,
        idx: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, -100 is ignored
        *,
        documents: Tensor | None = None,  # (B, T) int, see ops.attention
        dtype: torch.dtype | None = None,  # of the activations; None: the parameters'
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Without targets the logits (B, T, V); with them the loss, an fp32 scalar ("none": (B * T,)).

        label_smoothing, z_loss: see ops.linear_cross_entropy. Raises ValueError where idx is longer than
        block_size or a target is out of the vocabulary.
        """
        hidden, head = self.hidden(idx, documents=documents, dtype=dtype)
        if targets is None:
            return ops.linear(hidden, head)[..., : self.config.vocab_size]
        return ops.linear_cross_entropy(
            hidden.view(-1, self.config.n_embd),
            head,
            targets.reshape(-1),
            vocab_size=self.config.vocab_size,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

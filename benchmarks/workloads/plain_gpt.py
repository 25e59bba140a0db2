"""GPT-2 in plain PyTorch, the rival that torch.compile may fuse; takes the weights of ours by their names.

B batch, T tokens, C channels, H heads, D head size. Everything is PyTorch's own: nn.LayerNorm, SDPA, tanh
GELU, cross-entropy of all logits, fused AdamW.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedgpt.model.config import GPTConfig


class PlainBlock(nn.Module):
    """Attention and MLP, each behind its LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        B, T, C = x.size()
        p = self.dropout if self.training else 0.0
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C)), p)
        wide = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp["c_proj"](wide), p)


class PlainGPT(nn.Module):
    """The loss of next tokens; the head is tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Both (B, T); a scalar."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = F.dropout(self.wte(idx) + self.wpe(positions), self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)[..., : self.config.vocab_size]  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def build_optimizer(self, learning_rate: float) -> torch.optim.AdamW:
        """Weight decay on matrices only, as ours."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), fused=True)

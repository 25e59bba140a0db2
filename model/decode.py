"""Decoding with a key-value cache: the prompt at once, then one token at a time.

A step reads its token, its position and the lengths of the caches from tensors on the device and writes into
buffers that stay where they are. Nothing in `logits` depends on a host value, so a CUDA graph can replay it.
Only the plain fp32 ops of a CPU take the length as a number, which costs them less to read.

Shape letters: B batch, T tokens, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu import decoding
from fusedgpt.kernels.cpu.linear import inference_linear, transposed_storage
from fusedgpt.model.gpt import GPT, Block, Linear


def store_for_decoding(model: GPT) -> GPT:
    """`model`, in eval mode and no longer to be trained, its matrices stored as decoding reads them fastest.

    The values stay the same. Only fp32 on a CPU gains; see kernels/cpu/linear.py.
    """
    linears = [module.weight for module in model.modules() if isinstance(module, Linear)]
    for weight in (*linears, model.wte.weight):
        weight.data = transposed_storage(weight.data)
    return model.requires_grad_(False).eval()


class Decoder:
    """The logits of a batch's next tokens, given a prompt and then token after token.

    Use it under torch.no_grad or inference_mode, all of it under the same. The caches hold `window` tokens;
    `length` of them are filled. A step is `count`, which is the host's, and `logits`, which is the device's.
    """

    def __init__(self, model: GPT, batch_size: int) -> None:
        config, weight = model.config, model.wte.weight
        shape = batch_size, config.window, config.n_head, config.head_dim
        self.model, self.length, self.window = model, 0, config.window
        self.qkv_shape = batch_size, 3, config.n_head, config.head_dim
        plain = ops.backend("decode_attention", weight.device, weight.dtype) == "reference"
        on_cpu = plain and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.kernels: Any = decoding if on_cpu else ops
        self.layers = [
            _Layer(block, self.kernels, weight.new_empty(shape), weight.new_empty(shape))
            for block in model.blocks()
        ]
        self.head = inference_linear(weight)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)

    def prefill(self, idx: Tensor) -> Tensor:
        """Start anew with token ids (B, T), T <= window -> the next tokens' logits (B, V)."""
        T = idx.shape[1]
        if self.window < T:
            raise ValueError(f"idx: {T} tokens, but the caches hold {self.window}")
        self.length = T
        self.position.fill_(T)
        self.lengths.fill_(T)
        x = F.embedding(idx, self.model.wte.weight) + self.model.wpe.weight[:T]
        return self._forward(x, _attend_to_prompt)

    def step(self, token: Tensor) -> Tensor:
        """One more token (B,) int64 -> logits (B, V). Raises ValueError where the caches are full."""
        self.count()
        return self.logits(token)

    def count(self) -> None:
        """Make room for one more token."""
        if self.length == self.window:
            raise ValueError(f"the caches are full: {self.window} tokens")
        self.length += 1

    def logits(self, token: Tensor) -> Tensor:
        """The step of a token (B,) that was counted."""
        x = F.embedding(token, self.model.wte.weight) + F.embedding(self.position, self.model.wpe.weight)
        self.lengths.add_(1)
        if len(token) == 1:
            x = x[0]  # a vector: what inference_linear is fastest with
        logits = self._forward(x, self._attend_to_cache)
        self.position.add_(1)
        return logits.view(len(token), -1)

    def _attend_to_cache(self, layer: _Layer, qkv: Tensor) -> Tensor:
        """The attention of one token per row, qkv (B, 3C) or (3C,) -> (B, H, D)."""
        q, k, v = qkv.view(self.qkv_shape).unbind(1)  # (B, H, D)
        layer.k.index_copy_(1, self.position, k.unsqueeze(1))
        layer.v.index_copy_(1, self.position, v.unsqueeze(1))
        lengths = self.length if self.kernels is decoding else self.lengths
        y: Tensor = self.kernels.decode_attention(q, layer.k, layer.v, lengths)
        return y

    def _forward(self, x: Tensor, attend: Callable[[_Layer, Tensor], Tensor]) -> Tensor:
        """The embedding of new tokens, (B, T, C), (B, C) or (C,) -> the logits after the last of each row."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, attend)
        if residual is not None and x.ndim == 3:
            x, residual = x[:, -1], residual[:, -1]
        norm = self.model.ln_f
        x, _ = self.kernels.dropout_add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
        return self.head(x)[..., : self.model.config.vocab_size]


class _Layer:
    """A block and its caches k and v (B, window, H, D)."""

    def __init__(self, block: Block, kernels: Any, k: Tensor, v: Tensor) -> None:
        self.kernels, self.k, self.v = kernels, k, v
        self.ln_1, self.ln_2 = ((n.weight, n.bias, n.eps) for n in (block.ln_1, block.ln_2))
        self.c_fc_bias = block.mlp.c_fc.bias
        self.c_attn = inference_linear(block.attn.c_attn.weight, block.attn.c_attn.bias)
        self.attn_proj = inference_linear(block.attn.c_proj.weight, block.attn.c_proj.bias)
        self.c_fc = inference_linear(block.mlp.c_fc.weight)
        self.mlp_proj = inference_linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    def __call__(
        self, x: Tensor, residual: Tensor | None, attend: Callable[[_Layer, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Block.forward with another attention: attend(layer, qkv (..., 3C)) -> (..., H, D)."""
        if residual is None:
            x, residual = self.kernels.layer_norm(x, *self.ln_1), x
        else:
            x, residual = self.kernels.dropout_add_layer_norm(x, residual, *self.ln_1)
        y = self.attn_proj(attend(self, self.c_attn(x)).reshape(x.shape))
        x, residual = self.kernels.dropout_add_layer_norm(y, residual, *self.ln_2)
        return self.mlp_proj(self.kernels.bias_gelu(self.c_fc(x), self.c_fc_bias)), residual


def _attend_to_prompt(layer: _Layer, qkv: Tensor) -> Tensor:
    """Causal attention that fills the caches, qkv (B, T, 3C) -> (B, T, H, D)."""
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, 3, *layer.k.shape[2:])
    layer.k[:, :T], layer.v[:, :T] = qkv[:, :, 1], qkv[:, :, 2]
    return ops.qkv_attention(qkv)

"""Decoding with a key-value cache: the prompt at once, then one token at a time.

A step reads its token, its position and the lengths of the caches from tensors on the device and writes into
buffers that stay where they are. Nothing in it depends on a host value, so a CUDA graph can replay it.

Shape letters: B batch, T tokens, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu.linear import inference_linear, transposed_storage
from fusedgpt.model.gpt import GPT, Block, Linear

_NO_DROPOUT = (0.0, None, None)


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
    `length` of them are filled. On a GPU a step is a CUDA graph from the second on: the logits it returns are
    overwritten by the next.
    """

    def __init__(self, model: GPT, batch_size: int) -> None:
        config, weight = model.config, model.wte.weight
        shape = batch_size, config.window, config.n_head, config.head_dim
        self.model, self.length, self.window = model, 0, config.window
        self.layers = [_Layer(b, weight.new_empty(shape), weight.new_empty(shape)) for b in model.blocks()]
        self.head = inference_linear(weight)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, idx: Tensor) -> Tensor:
        """Start anew with token ids (B, T), T <= window -> the next tokens' logits (B, V)."""
        T = idx.shape[1]
        if self.window < T:
            raise ValueError(f"idx: {T} tokens, but the caches hold {self.window}")
        self.length = T
        self.position.fill_(T)
        self.lengths.fill_(T)
        x = F.embedding(idx, self.model.wte.weight) + self.model.wpe.weight[:T]
        return self._logits(x, _Layer.attend_to_prompt)

    def step(self, token: Tensor) -> Tensor:
        """One more token (B,) int64 -> logits (B, V). Raises ValueError where the caches are full."""
        if self.length == self.window:
            raise ValueError(f"the caches are full: {self.window} tokens")
        self.length += 1
        self.steps += 1
        if not token.is_cuda or self.steps == 1:  # the first step compiles the kernels
            return self._step(token)
        if self.graph is None:
            self.token, self.graph = token.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self._step(self.token)
        self.token.copy_(token)
        self.graph.replay()
        return self.result

    def _step(self, token: Tensor) -> Tensor:
        x = F.embedding(token, self.model.wte.weight) + F.embedding(self.position, self.model.wpe.weight)
        self.lengths.add_(1)
        logits = self._logits(x[:, None], self._attend_to_cache)
        self.position.add_(1)
        return logits

    def _attend_to_cache(self, layer: _Layer, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)  # (B, 1, H, D)
        layer.k.index_copy_(1, self.position, k)
        layer.v.index_copy_(1, self.position, v)
        return ops.decode_attention(q[:, 0], layer.k, layer.v, self.lengths)

    def _logits(self, x: Tensor, attend: Callable[[_Layer, Tensor], Tensor]) -> Tensor:
        """The embedding (B, T, C) of new tokens -> the logits (B, V) after the last of them."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, attend)
        if residual is not None:
            x, residual = x[:, -1], residual[:, -1]
        x, _ = self.model.ln_f(x, residual, _NO_DROPOUT)
        return self.head(x)[:, : self.model.config.vocab_size]


class _Layer:
    """A block and its caches k and v (B, window, H, D)."""

    def __init__(self, block: Block, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.ln_1, self.ln_2, self.c_fc_bias = block.ln_1.forward, block.ln_2.forward, block.mlp.c_fc.bias
        self.c_attn = inference_linear(block.attn.c_attn.weight, block.attn.c_attn.bias)
        self.attn_proj = inference_linear(block.attn.c_proj.weight, block.attn.c_proj.bias)
        self.c_fc = inference_linear(block.mlp.c_fc.weight)
        self.mlp_proj = inference_linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias)

    def __call__(
        self, x: Tensor, residual: Tensor | None, attend: Callable[[_Layer, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Block.forward with another attention: attend(layer, qkv (B, T, 3, H, D)) -> (B, T, H, D)."""
        x, residual = self.ln_1(x, residual, _NO_DROPOUT)
        B, T, C = x.size()
        y = attend(self, self.c_attn(x).view(B, T, 3, *self.k.shape[2:]))
        x, residual = self.ln_2(self.attn_proj(y.reshape(B, T, C)), residual, _NO_DROPOUT)
        return self.mlp_proj(ops.bias_gelu(self.c_fc(x), self.c_fc_bias)), residual

    def attend_to_prompt(self, qkv: Tensor) -> Tensor:
        """Fill the caches."""
        T = qkv.shape[1]
        self.k[:, :T], self.v[:, :T] = qkv[:, :, 1], qkv[:, :, 2]
        return ops.qkv_attention(qkv)

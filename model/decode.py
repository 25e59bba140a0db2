"""The logits after one more token, given a KV cache: what sampling asks for again and again.

One sequence on a CPU has a way of its own, a few ops a layer without modules and checks between them. To read
all weights of a 12M model takes two milliseconds; `GPT.hidden` needs a third one for what lies in between.

Shape letters: B batch, T tokens, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu.linear import has_transposed_storage, one_row
from fusedgpt.model.gpt import GPT, Block, KVCache, LayerNorm

Decoder = Callable[[Tensor], Tensor]


def decoder(model: GPT, cache: KVCache) -> Decoder:
    """token ids (B,) -> logits (B, V) of what follows them; it appends to `cache`, which must not be empty.

    One sequence of a model that `GPT.for_sampling` stored differently takes the short way.
    """
    weight = model.wte.weight
    takes_short_way = (
        len(cache.k[0]) == 1
        and model.activation_dtype == torch.float32
        and has_transposed_storage(weight)
        and ops.backend("decode_attention", weight.device) == "reference"
    )
    if takes_short_way:
        return _OneSequence(model, cache)
    return lambda token: model.logits(model.hidden(token[:, None], cache=cache)[:, -1])


class _Norm:
    """(C,) -> (C,)"""

    def __init__(self, norm: LayerNorm) -> None:
        self.arguments = norm.weight.shape, norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, *self.arguments)


class _Layer:
    """The residual (C,) before a block and the number of tokens with this one -> the residual after it."""

    def __init__(self, block: Block, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)  # (1, H, window, D)
        self.ln_1, self.ln_2 = _Norm(block.ln_1), _Norm(block.ln_2)
        self.shape = 3, 1, k.shape[2], 1, k.shape[3]  # of q, k and v
        linears = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.qkv, self.project, self.widen, self.narrow = (one_row(x.weight, x.bias) for x in linears)

    def __call__(self, x: Tensor, length: int) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).view(self.shape).unbind()
        self.k.narrow(2, length - 1, 1).copy_(k)
        self.v.narrow(2, length - 1, 1).copy_(v)
        y = F.scaled_dot_product_attention(q, self.k.narrow(2, 0, length), self.v.narrow(2, 0, length))
        x = self.project(y.view(-1)).add_(x)
        wide = self.widen(self.ln_2(x))
        return self.narrow(F.gelu(wide, approximate="tanh")).add_(x)


class _OneSequence:
    """A `Decoder`, B = 1."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.layers = [_Layer(b, k, v) for b, k, v in zip(model.blocks(), cache.k, cache.v, strict=True)]
        self.ln_f, self.head = _Norm(model.ln_f), one_row(model.wte.weight)

    def __call__(self, token: Tensor) -> Tensor:
        model, position = self.model, self.cache.length
        x = model.wte.weight[int(token)] + model.wpe.weight[position]
        self.cache.length = position + 1
        for layer in self.layers:
            x = layer(x, position + 1)
        return self.head(self.ln_f(x))[None, : model.config.vocab_size]

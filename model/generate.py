"""Sampling from a GPT with a KV cache.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedgpt.model.gpt import GPT, KVCache
from fusedgpt.model.tokenizer import Tokenizer


def next_token(
    logits: Tensor,  # (B, V)
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,  # on the CPU
) -> Tensor:
    """Draw one token id a row, (B,) int64. temperature 0 takes the likeliest.

    top_k keeps the k likeliest, top_p then the smallest set of them whose probability reaches p
    (Holtzman et al. 2019).
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    V = logits.shape[-1]
    kept, ids = logits.topk(min(top_k or V, V), dim=-1)  # likeliest first
    probabilities = kept.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(ids.device)
    return ids.gather(1, choice)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,  # (B, T) int64, T >= 1
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield up to max_new_tokens next tokens, (B,) each; the same arguments give the same tokens.

    When the context that training has seen is full, its older half is dropped and the rest read anew.
    Raises ValueError for an empty prompt or settings out of range.
    """
    _check_settings(prompt, max_new_tokens, temperature, top_k, top_p)
    model.eval()
    window = model.config.window
    generator = torch.Generator().manual_seed(seed)
    context = prompt[:, -window:]
    cache: KVCache | None = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length == window:
            context = context if cache is None else context[:, -(window // 2 + 1) :]
            cache = KVCache(model.config, len(prompt), dtype=model.activation_dtype, device=prompt.device)
            fresh = context
        hidden = model.hidden(fresh, cache=cache)[:, -1]
        token = next_token(
            model.logits(hidden), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        yield token
        fresh = token[:, None]
        context = torch.cat((context, fresh), dim=1)


def _check_settings(
    prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected (B, T) with T >= 1, got {tuple(prompt.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected 0 < p <= 1, got {top_p}")


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n_samples: int = 1,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """n_samples continuations of `prompt` with the prompt in front, each ending before its end-of-text.

    An empty prompt starts from end-of-text, as a new document does. Raises ValueError for settings out of
    range or a prompt the tokenizer cannot encode.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples: expected 1 or more, got {n_samples}")
    device = model.wte.weight.device
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    rows: list[list[int]] = [[] for _ in range(n_samples)]
    ended = torch.zeros(n_samples, dtype=torch.bool, device=device)
    for token in generate(
        model,
        torch.tensor([ids] * n_samples, device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        ended |= token == tokenizer.eot_id
        if ended.all():
            break
        for row, value, over in zip(rows, token.tolist(), ended.tolist(), strict=True):
            if not over:
                row.append(value)
    # ids the tokenizer does not know (another tool's folder may pad its vocabulary) have no text
    return [prompt + tokenizer.decode([i for i in row if i < tokenizer.vocab_size]) for row in rows]

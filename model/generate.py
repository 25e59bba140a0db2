"""Sampling from a GPT with a KV cache.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fusedgpt.kernels.errors import UsageError
from fusedgpt.model.decode import Decoder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.streaming import TextStream
from fusedgpt.model.tokenizer import Tokenizer

_TOKENS_PER_READ = 8  # on a GPU, which computes ahead of the host until it is asked for tokens


class Sampling(TypedDict, total=False):
    """The settings of `generate`, which has their defaults and meaning."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int


def next_token(
    logits: Tensor,  # (B, V)
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,  # on the device of logits
) -> Tensor:
    """Draw one token id per row, (B,) int64. temperature 0 takes the likeliest.

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
    # torch.multinomial's draw without its checks, for which the host would wait
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / noise).argmax(dim=-1, keepdim=True)
    return ids.gather(1, choice)[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V) with those of seen (B, V) tokens lowered (Keskar et al. 2019, section 4.1).

    A penalty of 1 changes nothing; positive logits are divided by it, negative ones multiplied.
    """
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class _Text:
    """Rows of ids that grow by a token. On a GPU a step is a CUDA graph, one launch, from the second on."""

    def __init__(
        self,
        model: GPT,
        prompt: Tensor,  # (B, T)
        room: int,  # for so many more tokens
        penalty: float,
        draw: Callable[[Tensor], Tensor],  # logits (B, V) -> ids (B,)
        generator: torch.Generator,  # that draw uses
    ) -> None:
        B, T = prompt.shape
        self.ids = torch.cat((prompt, prompt.new_zeros(B, room)), dim=1)
        self.last = prompt.new_full((1,), T - 1)  # place in ids of the newest token
        self.seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=prompt.device)
        self.seen.scatter_(1, prompt, True)
        self.penalty, self.draw, self.generator = penalty, draw, generator
        self.decoder = Decoder(model, B)
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, start: int, end: int) -> None:
        """Append the token after ids[:, start:end], which is as far as they go."""
        self._append(self.decoder.prefill(self.ids[:, start:end]))

    def step(self) -> None:
        """Append the token after all that the decoder has read and the newest token."""
        self.decoder.count()
        self.steps += 1
        if not self.ids.is_cuda or self.steps == 1:  # the first step compiles the kernels
            return self._step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            # "thread_local": while a model is trained, the loader's thread may pin memory
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._step()
        return self.graph.replay()

    def _step(self) -> None:
        self._append(self.decoder.logits(self.ids.index_select(1, self.last)[:, 0]))

    def _append(self, logits: Tensor) -> None:
        token = self.draw(penalise(logits, self.seen, self.penalty))[:, None]
        self.last.add_(1)
        self.ids.index_copy_(1, self.last, token)
        self.seen.scatter_(1, token, True)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,  # (B, T) int64, T >= 1
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield up to max_new_tokens next tokens, (B,) each; the same arguments give the same tokens.

    repetition_penalty: see `penalise`; it counts the prompt's tokens too. Nothing waits for a GPU: the caller
    decides when to read the tokens. When the context that training has seen is full, its older half is
    dropped and the rest is read anew. `store_for_decoding` makes it faster on a CPU.
    Raises ValueError for an empty prompt or settings out of range.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected (B, T) with T >= 1, got {tuple(prompt.shape)}")
    check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    model.eval()
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    draw = partial(next_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    text = _Text(model, prompt, max_new_tokens, repetition_penalty, draw, generator)
    window, T = text.decoder.window, prompt.shape[1]
    for end in range(T, T + max_new_tokens):
        with torch.inference_mode():  # cheaper per op than no_grad; what is yielded is made outside of it
            if end == T:
                text.begin(max(0, T - window), T)
            elif text.decoder.length < window:
                text.step()
            else:
                text.begin(end - (window // 2 + 1), end)
        yield text.ids[:, end]


def check_settings(
    max_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError for a setting of `generate` that is out of range."""
    if max_new_tokens < 0:
        raise UsageError(f"--max-new-tokens: expected 0 or more, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise UsageError(f"--temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k: expected 0 (all) or more, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UsageError(f"--top-p: expected 0 < p <= 1, got {top_p}")
    if not 0.0 < repetition_penalty < float("inf"):
        raise UsageError(f"--repetition-penalty: expected more than 0, got {repetition_penalty}")


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n_samples: int = 1,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    on_text: Callable[[str], None] | None = None,
    **sampling: Unpack[Sampling],
) -> list[str]:
    """n_samples continuations of `prompt` with the prompt in front, each ending before its end-of-text.

    An empty prompt starts from end-of-text, as a new document does. stop: strings before which a
    continuation ends. special_tokens: their names in the prompt are those tokens, not ordinary text. on_text
    is told the first sample's text, without the prompt, as it comes. Raises ValueError for settings out of
    range or a prompt the tokenizer cannot encode.
    """
    return sample_batch(
        model,
        tokenizer,
        [prompt],
        n_samples=n_samples,
        stop=stop,
        special_tokens=special_tokens,
        on_text=on_text,
        **sampling,
    )[0]


def sample_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    n_samples: int = 1,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    on_text: Callable[[str], None] | None = None,
    **sampling: Unpack[Sampling],
) -> list[list[str]]:
    """`sample_texts` of each prompt; those that have the same number of tokens run as one batch."""
    if n_samples < 1:
        raise UsageError(f"--n-samples: expected 1 or more, got {n_samples}")
    encode = tokenizer.encode_special if special_tokens else tokenizer.encode
    encoded = [encode(prompt) or [tokenizer.eot_id] for prompt in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    for length in dict.fromkeys(map(len, encoded)):  # the KV cache has one length for all its rows
        group = [i for i, ids in enumerate(encoded) if len(ids) == length]
        rows = [encoded[i] for i in group for _ in range(n_samples)]
        tell = on_text if 0 in group else None
        new = continue_ids(model, tokenizer, rows, stop=stop, on_text=tell, sampling=sampling)
        for k, i in enumerate(group):
            texts[i] = [prompts[i] + text for text in new[k * n_samples : (k + 1) * n_samples]]
    return texts


def continue_ids(
    model: GPT,
    tokenizer: Tokenizer,
    rows: list[list[int]],  # of one length, 1 or more
    *,
    stop: Sequence[str],
    on_text: Callable[[str], None] | None,
    sampling: Sampling,
) -> list[str]:
    """The text that comes after each row of ids; on_text is told the first row's as it comes."""
    streams = [TextStream(tokenizer, row, stop) for row in rows]
    texts = [""] * len(rows)

    def take(row: int, text: str) -> None:
        texts[row] += text
        if row == 0 and text and on_text is not None:
            on_text(text)

    prompt = torch.tensor(rows, device=model.wte.weight.device)
    for values in _read(generate(model, prompt, **sampling), on_gpu=prompt.is_cuda):
        for row, (stream, value) in enumerate(zip(streams, values, strict=True)):
            take(row, stream.add(value))
        if all(stream.ended for stream in streams):
            break
    for row, stream in enumerate(streams):
        take(row, stream.end())
    return texts


def _read(tokens: Iterator[Tensor], *, on_gpu: bool) -> Iterator[list[int]]:
    """The values of each of `tokens`, (B,) each. From a GPU a few at a time, while it computes the next."""
    if not on_gpu:
        yield from (token.tolist() for token in tokens)
        return
    chunks = iter(lambda: list(islice(tokens, _TOKENS_PER_READ)), [])
    copies = (
        (torch.stack(chunk).to("cpu", non_blocking=True), torch.cuda.current_stream().record_event())
        for chunk in chunks
    )
    copy = next(copies, None)
    while copy is not None:
        following = next(copies, None)  # queued before this one is waited for
        values, copied = copy
        copied.synchronize()
        yield from values.tolist()
        copy = following

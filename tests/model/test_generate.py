"""Sampling: distributions, determinism, the sliding context, the end of a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RepetitionPenaltyLogitsProcessor

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.decode import Decoder, store_for_decoding
from fusedgpt.model.folder import load_model
from fusedgpt.model.generate import _read, generate, next_token, penalise, sample_batch, sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import byte_tokenizer, char_tokenizer

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def shares(**settings: Any) -> list[float]:
    """How often each of 4 tokens is drawn in 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    drawn = next_token(LOGITS.expand(20_000, 4), generator=generator, **options)
    return (torch.bincount(drawn, minlength=4) / 20_000).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # of 9/10: 4/9 + 3/9 = 0.78 suffices
        ({"temperature": 0.5}, [x / 30 for x in (1, 16, 4, 9)]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probability(settings: dict[str, Any], expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=0.015)  # 4 sigma of 20,000 draws


def test_same_seed_same_tokens(tiny_gpt: GPT) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    first, again, other = (
        torch.stack(list(generate(tiny_gpt, prompt, max_new_tokens=10, seed=s))) for s in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_greedy_is_the_argmax_of_the_whole_text(tiny_gpt: GPT) -> None:
    context = torch.tensor([[1, 2, 3], [9, 8, 7]])
    for token in generate(tiny_gpt, context.clone(), max_new_tokens=12, temperature=0.0):
        assert torch.equal(token, tiny_gpt(context)[:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), dim=1)


@pytest.mark.parametrize("trained_length", [None, 10])
def test_goes_on_beyond_the_context(tiny_config: GPTConfig, trained_length: int | None) -> None:
    """Window 16: at 16 tokens the last 8 + 1 are kept; a prompt longer than it is cut to its end."""
    window = trained_length or 16
    tiny_gpt = GPT(tiny_config.model_copy(update={"trained_length": trained_length}), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # logits that depend on every token of the context
        for p in tiny_gpt.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    context = list(range(40))
    steps = list(generate(tiny_gpt, torch.tensor([context]), max_new_tokens=20, temperature=0.0))
    kept = context[-window:]
    for step in steps:
        assert step.item() == tiny_gpt(torch.tensor([kept]))[0, -1].argmax().item()
        kept = [*kept, step.item()]
        if len(kept) > window:
            kept = kept[-(window // 2 + 1) :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"n_samples": 0}, "n_samples"),
        ({"temperature": float("nan")}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop: an empty string"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    gpt = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match=message.replace("_", "-")):  # named as options
        sample_texts(gpt, byte_tokenizer(), "a", **settings)


def test_a_sample_ends_before_its_end_of_text() -> None:
    """A model that says 0, 1, 2, ... and, after the last letter, end-of-text."""
    tokenizer = char_tokenizer("abcdefgh")
    gpt = GPT(GPTConfig(vocab_size=9, block_size=16, n_layer=1, n_head=1, n_embd=16, dropout=0.0))
    with torch.no_grad():
        for p in gpt.parameters():
            p.zero_()
        gpt.wte.weight[:9, :9] = torch.eye(9)
        gpt.ln_f.weight.fill_(1.0)
        successor = torch.zeros(16, 16)
        successor[torch.arange(1, 9), torch.arange(8)] = 100.0
        gpt.blocks()[0].ln_2.weight.fill_(1.0)
        gpt.blocks()[0].mlp.c_fc.weight[:16] = 10 * torch.eye(16)
        gpt.blocks()[0].mlp.c_proj.weight[:, :16] = successor
    texts = sample_texts(gpt, tokenizer, "cd", n_samples=2, max_new_tokens=50, temperature=0.0)
    assert texts == ["cdefgh", "cdefgh"]
    assert sample_texts(gpt, tokenizer, "cd", max_new_tokens=2, temperature=0.0) == ["cdef"]


def test_a_row_that_ended_stays_ended(monkeypatch: pytest.MonkeyPatch, tiny_gpt: GPT) -> None:
    tokens = [torch.tensor(step) for step in ([0, 3], [3, 1], [2, 1], [3, 3], [0, 0])]  # 3 is end-of-text
    monkeypatch.setattr("fusedgpt.model.generate.generate", lambda *_, **__: iter(tokens))
    assert sample_texts(tiny_gpt, char_tokenizer("abc"), "", n_samples=2) == ["a", ""]


def test_tokens_of_a_gpu_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight, while it computes the next eight; what was queued beyond the end of a text is never read."""
    events: list[str] = []

    def tokens() -> Iterator[torch.Tensor]:
        for value in range(20):
            events.append(f"queue {value}")
            yield torch.tensor([value, -value])

    stream = Mock()
    stream.record_event.return_value.synchronize = lambda: events.append("wait")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    read = _read(tokens(), on_gpu=True)
    assert next(read) == [0, 0]
    assert events == [*(f"queue {i}" for i in range(16)), "wait"]
    assert [next(read) for _ in range(7)] == [[i, -i] for i in range(1, 8)]
    assert len(events) == 17
    assert [*read] == [[i, -i] for i in range(8, 20)]
    assert events[17:] == [*(f"queue {i}" for i in range(16, 20)), "wait", "wait"]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (1, 1e-9)])
def test_a_draw_is_that_of_torch_multinomial(top_k: int | None, top_p: float | None) -> None:
    """To the bit, so that a seed gives the text it has always given."""
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(20):
        token = next_token(logits, temperature=0.7, top_k=top_k, top_p=top_p, generator=ours)
        kept, ids = (logits / 0.7).topk(top_k or 50, dim=-1)
        probabilities = kept.softmax(-1)
        if top_p is not None:
            probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
        choice = torch.multinomial(probabilities, 1, generator=theirs)
        assert torch.equal(token, ids.gather(1, choice)[:, 0])


def test_prompt_outside_the_vocabulary_is_refused(tiny_gpt: GPT) -> None:
    with pytest.raises(ValueError, match="character 'z'"):
        sample_texts(tiny_gpt, char_tokenizer("abc"), "z")


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 2], [7, 8, 9], [0, 0, 0]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, penalty), expected)


def test_greedy_with_a_penalty_is_that_of_transformers(tmp_path: Path) -> None:
    """Both count the prompt's tokens and those that were drawn."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    prompt = torch.tensor([[3, 200, 5], [9, 9, 1]])
    options = {"repetition_penalty": 1.5, "max_new_tokens": 40}
    ours = torch.stack(list(generate(load_model(tmp_path), prompt, temperature=0.0, **options)), dim=1)
    expected = theirs.generate(prompt, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert torch.equal(ours, expected[:, 3:])
    plain = torch.stack(
        list(generate(load_model(tmp_path), prompt, temperature=0.0, max_new_tokens=40)), dim=1
    )
    assert not torch.equal(ours, plain)


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    gpt = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=16), seed=2).eval()
    prompts = ["The", "cat", "", "料", "abcdef"]
    options = {"max_new_tokens": 12, "temperature": 0.0}
    texts = sample_batch(gpt, byte_tokenizer(), prompts, n_samples=2, **options)
    alone = [sample_texts(gpt, byte_tokenizer(), prompt, **options) * 2 for prompt in prompts]
    assert texts == alone
    assert len({text[0][len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)}) > 1


def test_a_sample_is_told_as_it_comes_and_ends_before_a_stop(tiny_gpt: GPT) -> None:
    tokenizer = byte_tokenizer()
    gpt = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16), seed=2).eval()
    told: list[str] = []
    whole = sample_texts(gpt, tokenizer, "a", n_samples=2, max_new_tokens=30, on_text=told.append)
    assert "a" + "".join(told) == whole[0]
    assert len(told) > 5
    stop = whole[0][10:12]
    cut = sample_texts(gpt, tokenizer, "a", n_samples=2, max_new_tokens=30, stop=[stop])
    assert cut[0] == "a" + whole[0][1 : whole[0].index(stop, 1)]


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [1, 2, 3]]])  # one row has a way of its own
@pytest.mark.parametrize("transposed", [True, False])
def test_200_steps_with_the_cache_equal_recomputing_the_prefix(
    prompts: list[list[int]], transposed: bool
) -> None:
    gpt = GPT(GPTConfig(vocab_size=257, block_size=256, n_layer=3, n_head=2, n_embd=32), seed=2).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        if transposed:
            store_for_decoding(gpt)
        prompt = torch.tensor(prompts)
        tokens = list(generate(gpt, prompt, max_new_tokens=200, temperature=0.0))
        text = torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1)
        whole = gpt(text)
        assert torch.equal(whole[:, 2:-1].argmax(-1), text[:, 3:])
        decoder = Decoder(gpt, len(prompts))
        steps = [decoder.prefill(text[:, :1]), *(decoder.step(token) for token in text.T[1:])]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=0, atol=1e-4)
    assert len(text[0].unique()) > 10


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_was_sampled_can_be_trained_on(tiny_gpt: GPT, temperature: float) -> None:
    tokens = list(generate(tiny_gpt, torch.tensor([[1, 2]]), max_new_tokens=5, temperature=temperature))
    assert not any(token.is_inference() for token in tokens)  # such cannot be saved for a backward pass
    text = torch.stack(tokens, dim=1)
    tiny_gpt.train()(text[:, :-1], text[:, 1:]).backward()
    assert tiny_gpt.ln_f.weight.grad is not None

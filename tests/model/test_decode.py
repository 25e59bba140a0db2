"""The decoder: its logits are the model's, and no host value changes from token to token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.decode import Decoder, store_for_decoding
from fusedgpt.model.generate import _Text, generate, next_token
from fusedgpt.model.gpt import GPT

TEXT = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))


def with_norms_that_matter(gpt: GPT) -> GPT:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return gpt.eval()


def decode(gpt: GPT, text: Tensor, prompt: int) -> Tensor:
    """The logits (B, T - prompt + 1, V) after the prompt and after every token behind it."""
    decoder = Decoder(gpt, len(text))
    for layer in decoder.layers:  # memory that nobody has written
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    first = decoder.prefill(text[:, :prompt])
    return torch.stack([first, *(decoder.step(token) for token in text.T[prompt:])], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt", [1, 4])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("stored", [True, False])
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_text(
    tiny_gpt: GPT,
    batch_size: int,
    prompt: int,
    kernels: str,
    stored: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpt, text = with_norms_that_matter(tiny_gpt).to(device), TEXT[:batch_size].to(device)
    whole = gpt(text)
    if stored:
        store_for_decoding(gpt)
    monkeypatch.setenv("FUSEDGPT_KERNELS", kernels)
    ours = decode(gpt, text, prompt)
    torch.testing.assert_close(
        ours, whole[:, prompt - 1 :], atol=3e-5, rtol=1e-5
    )  # fp32, sums in another order


@torch.no_grad()
def test_bf16_weights(tiny_gpt: GPT) -> None:
    gpt = tiny_gpt.bfloat16()
    ours = decode(store_for_decoding(gpt), TEXT, 4)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, gpt(TEXT)[:, 3:], atol=0.02, rtol=0.02)  # bf16 keeps 8 bits


@torch.no_grad()
def test_a_decoder_can_start_anew(tiny_gpt: GPT) -> None:
    decoder = Decoder(with_norms_that_matter(tiny_gpt), 3)
    decoder.prefill(TEXT)
    decoder.step(TEXT[:, 0])
    decoder.prefill(TEXT[:, :3])
    torch.testing.assert_close(decoder.step(TEXT[:, 3]), tiny_gpt(TEXT[:, :4])[:, -1])


@torch.no_grad()
def test_more_tokens_than_the_caches_hold_are_refused(tiny_gpt: GPT) -> None:
    decoder = Decoder(tiny_gpt, 1)
    with pytest.raises(ValueError, match="17 tokens, but the caches hold 16"):
        decoder.prefill(torch.zeros(1, 17, dtype=torch.int64))
    decoder.prefill(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="the caches are full: 16 tokens"):
        decoder.step(torch.zeros(1, dtype=torch.int64))


class Recorder(TorchDispatchMode):
    """Every op with its host values, and where in memory its tensors lie and how."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.known = {x.data_ptr() for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read from the device"
        leaves = [self.describe(x) for x in tree_leaves((args, kwargs or {}))]
        self.calls.append((str(func), *leaves))
        return func(*args, **(kwargs or {}))

    def describe(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        place = x.data_ptr() if x.data_ptr() in self.known else None  # else allocated within the step
        return tuple(x.shape), x.stride(), x.dtype, place


@pytest.mark.usefixtures("triton_kernels")
@torch.no_grad()
def test_no_host_value_changes_between_tokens(tiny_gpt: GPT, device: torch.device) -> None:
    """So a CUDA graph of one token is right for all others."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(next_token, temperature=0.8, top_k=40, top_p=0.9, generator=generator)
    text = _Text(tiny_gpt.to(device), TEXT[:, :5].to(device), 6, 1.2, draw, generator)
    text.begin(0, 5)
    decoder = text.decoder
    buffers = [text.ids, text.last, text.seen, decoder.position, decoder.lengths, *tiny_gpt.parameters()]
    buffers += [x for layer in decoder.layers for x in (layer.k, layer.v)]
    calls = []
    for _ in range(3):
        with Recorder(buffers) as recorder:
            text._step()
        calls.append(recorder.calls)
    assert len(calls[0]) > 20
    assert calls[0] == calls[1] == calls[2]
    assert decoder.lengths.tolist() == [8, 8, 8]
    assert decoder.position.tolist() == [8]
    assert text.last.tolist() == [8]
    assert (text.ids[:, 9:] == 0).all()
    assert text.seen.sum(1).tolist() == [len(set(row[:9])) for row in text.ids.tolist()]


class Graph:
    """In place of torch.cuda.CUDAGraph: what is captured is undone, and runs when it is replayed."""

    def __init__(self) -> None:
        self.replays = 0
        self.register_generator_state = Mock()

    def replay(self) -> None:
        self.replays += 1
        self.text._step()


@pytest.mark.parametrize("prompt", [3, 12])
def test_the_second_step_is_captured_and_the_draw_with_it(
    tiny_gpt: GPT, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs twice, also where a full context (16 tokens) is begun anew between replays."""
    options = {"max_new_tokens": 40, "temperature": 0.8, "repetition_penalty": 1.3}
    plain = torch.stack(list(generate(tiny_gpt, TEXT[:, :prompt], **options)))
    graphs: list[Graph] = []

    class OnGPU(_Text):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.ids = self.ids.as_subclass(IsCuda)

        def _step(self) -> None:
            if not capturing:
                super()._step()

    class IsCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]

    @contextmanager
    def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        graphs.append(graph)
        capturing.append(True)
        yield
        capturing.clear()

    capturing: list[bool] = []
    texts: list[OnGPU] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Graph, "text", property(lambda _: texts[0]), raising=False)
    monkeypatch.setattr("fusedgpt.model.generate._Text", lambda *a: texts.append(OnGPU(*a)) or texts[0])
    ours = torch.stack(list(generate(tiny_gpt, TEXT[:, :prompt], **options)))
    assert torch.equal(ours.as_subclass(Tensor), plain)
    assert len(graphs) == 1
    graphs[0].register_generator_state.assert_called_once_with(texts[0].generator)
    assert graphs[0].replays == texts[0].steps - 1 > 20


@pytest.mark.gpu
def test_a_captured_token_is_the_token(device: torch.device) -> None:
    config = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=64)
    gpt = GPT(config, seed=1).to(device).eval()
    prompt = torch.arange(8, device=device).view(2, 4)
    ours = torch.stack(list(generate(gpt, prompt, max_new_tokens=100, temperature=0.0)))
    plain, context = [], prompt
    with torch.no_grad():
        for token in ours:
            plain.append(gpt(context)[:, -1].argmax(-1))
            context = torch.cat((context, token[:, None]), dim=1)
            context = context if context.shape[1] <= 64 else context[:, -33:]
    assert torch.equal(ours, torch.stack(plain))


@pytest.mark.gpu
def test_captured_draws_are_those_of_eager_steps(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=64)
    gpt = GPT(config, seed=1).to(device).eval()
    prompt = torch.arange(8, device=device).view(2, 4)
    captured = torch.stack(list(generate(gpt, prompt, max_new_tokens=100, temperature=1.0)))
    monkeypatch.setattr(_Text, "step", lambda text: text.decoder.count() or text._step())
    assert torch.equal(
        torch.stack(list(generate(gpt, prompt, max_new_tokens=100, temperature=1.0))), captured
    )


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_storing_changes_no_value(tiny_gpt: GPT) -> None:
    plain = {name: value.clone() for name, value in tiny_gpt.state_dict().items()}
    logits = tiny_gpt(TEXT)
    assert store_for_decoding(tiny_gpt.train()) is tiny_gpt
    assert not tiny_gpt.training
    for name, value in tiny_gpt.state_dict().items():
        assert torch.equal(value, plain[name])
        matrix = value.ndim == 2 and name != "wpe.weight"
        assert not matrix or value.T.is_contiguous()
    assert not any(p.requires_grad for p in tiny_gpt.parameters())
    torch.testing.assert_close(tiny_gpt(TEXT), logits, atol=1e-5, rtol=1e-5)


def test_a_full_context_is_begun_anew(tiny_gpt: GPT) -> None:
    options = {"max_new_tokens": 40, "temperature": 0.0}  # of 16
    plain = torch.cat(list(generate(tiny_gpt, TEXT[:1], **options)))
    assert torch.equal(torch.cat(list(generate(store_for_decoding(tiny_gpt), TEXT[:1], **options))), plain)

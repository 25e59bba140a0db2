"""One more token after a cache: which way it takes, and that both ways are the model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels.cpu.linear import HAS_ONEDNN
from fusedgpt.model import decode
from fusedgpt.model.generate import generate
from fusedgpt.model.gpt import GPT, KVCache

TEXT = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


def filled(gpt: GPT, text: Tensor) -> KVCache:
    """The cache of a model that has read text (B, T)."""
    cache = KVCache(gpt.config, len(text), dtype=gpt.activation_dtype, device=text.device)
    for rows in cache.k + cache.v:  # memory that nobody has written
        rows.fill_(float("nan"))
    with torch.no_grad():
        gpt.hidden(text, cache=cache)
    return cache


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@torch.no_grad()
def test_one_sequence_gives_the_logits_of_the_whole_text(tiny_gpt: GPT) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in tiny_gpt.parameters():  # biases and norms that matter
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    text = TEXT[:1]
    whole = tiny_gpt.eval()(text)[0]
    cache = filled(tiny_gpt.for_sampling(), text[:, :4])
    step = decode.decoder(tiny_gpt, cache)
    assert isinstance(step, decode._OneSequence)
    logits = torch.cat([step(token) for token in text.T[4:]])
    torch.testing.assert_close(logits, whole[4:], atol=1e-5, rtol=1e-5)
    assert cache.length == 12
    for ours, read in zip(cache.k + cache.v, (c := filled(tiny_gpt, text)).k + c.v, strict=True):
        torch.testing.assert_close(ours[:, :12], read[:, :12])


def _in_bf16(gpt: GPT) -> None:
    gpt.compute_dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (GPT.for_sampling, 2),
        (GPT.eval, 1),
        (lambda gpt: gpt.for_sampling().bfloat16(), 1),
        (lambda gpt: _in_bf16(gpt.for_sampling()), 1),
    ],
    ids=["two sequences", "plain storage", "bf16 parameters", "bf16 activations"],
)
@torch.no_grad()
def test_all_else_takes_the_models_way(tiny_gpt: GPT, change: Callable[[GPT], object], rows: int) -> None:
    change(tiny_gpt)
    tiny_gpt.eval()
    text = TEXT[:rows]
    whole = tiny_gpt(text)
    step = decode.decoder(tiny_gpt, filled(tiny_gpt, text[:, :4]))
    assert not isinstance(step, decode._OneSequence)
    logits = torch.stack([step(token) for token in text.T[4:]], dim=1)
    assert logits.dtype == tiny_gpt.activation_dtype
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if logits.dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    )
    torch.testing.assert_close(logits, whole[:, 4:], **tolerance)


def test_kernels_that_are_asked_for_are_used(tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gpt.for_sampling()
    cache = filled(tiny_gpt, TEXT[:1])
    monkeypatch.setattr(decode.ops, "backend", lambda *_: "triton")
    assert not isinstance(decode.decoder(tiny_gpt, cache), decode._OneSequence)


def test_a_full_context_is_begun_anew(tiny_gpt: GPT) -> None:
    options = {"max_new_tokens": 40, "temperature": 0.0}  # of 16
    plain = torch.cat(list(generate(tiny_gpt, TEXT[:1], **options)))
    assert torch.equal(torch.cat(list(generate(tiny_gpt.for_sampling(), TEXT[:1], **options))), plain)

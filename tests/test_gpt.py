"""The model: shapes, initialisation, causality, dropout, cache, precision, parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT, DropoutState, KVCache

IDS = torch.arange(24).view(2, 12)


def test_presets_have_the_published_parameter_counts() -> None:
    assert PRESETS["gpt2"].parameter_counts()[0] == 124_439_808
    assert PRESETS["gpt2-medium"].parameter_counts()[0] == 354_823_168
    assert PRESETS["gpt2-large"].parameter_counts()[0] == 774_030_080
    assert PRESETS["gpt2-xl"].parameter_counts()[0] == 1_557_611_200
    assert {name: (c.n_embd, c.n_layer, c.n_head, c.block_size) for name, c in PRESETS.items()}.items() >= {
        "12M": (384, 6, 6, 512),
        "33M": (512, 8, 8, 512),
        "117M": (768, 12, 12, 512),
    }.items()


def test_parameter_counts_are_those_of_the_model(tiny_gpt: GPT) -> None:
    config = tiny_gpt.config
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    sizes = {name: p.numel() for name, p in tiny_gpt.named_parameters()}
    total, without_embeddings = config.parameter_counts()
    assert total == sum(sizes.values()) - padding
    assert without_embeddings == total + padding - sizes["wte.weight"] - sizes["wpe.weight"]


@pytest.mark.parametrize(
    "change", [{"n_head": 5}, {"n_layer": 0}, {"vocab_size": 0}, {"dropout": 1.0}, {"n_embed": 24}]
)
def test_impossible_configs_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GPTConfig.model_validate({"n_embd": 24, "n_head": 3, **change})


def test_vocabulary_is_padded_to_a_multiple_of_128() -> None:
    assert [GPTConfig(vocab_size=v).padded_vocab_size for v in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


def test_initialisation_is_gpt2s() -> None:
    gpt = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    std = {name: p.std().item() for name, p in gpt.named_parameters() if p.ndim == 2}
    for name, value in std.items():
        expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        if name == "wte.weight":
            value = gpt.wte.weight[:1000].std().item()
        assert value == pytest.approx(expected, rel=0.03), name
    assert gpt.wte.weight[1000:].abs().max() == 0
    for name, p in gpt.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_same_seed_same_weights(tiny_config: GPTConfig) -> None:
    first, again, other = (GPT(tiny_config, seed=s).wte.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forward_gives_logits_or_loss(tiny_gpt: GPT) -> None:
    logits = tiny_gpt(IDS)
    assert logits.shape == (2, 12, 61)
    targets = IDS.roll(-1, dims=1)
    targets[0, :5] = -100
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 61), targets.view(-1), reduction="none")
    torch.testing.assert_close(tiny_gpt(IDS, targets, reduction="none"), expected)
    torch.testing.assert_close(tiny_gpt(IDS, targets), expected.sum() / 19)


def test_loss_of_a_fresh_model_is_that_of_a_guess(tiny_gpt: GPT) -> None:
    assert tiny_gpt(IDS, IDS.flip(1)).item() == pytest.approx(math.log(61), abs=0.1)


def test_no_token_sees_a_later_one(tiny_gpt: GPT) -> None:
    changed = IDS.clone()
    changed[:, 7] = 60
    before, after = tiny_gpt(IDS), tiny_gpt(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_documents_do_not_see_each_other(tiny_gpt: GPT) -> None:
    documents = (torch.arange(12) >= 5).long().expand(2, 12)
    changed = IDS.clone()
    changed[:, :5] = 60
    apart, apart_changed = tiny_gpt(IDS, documents=documents), tiny_gpt(changed, documents=documents)
    assert torch.equal(apart[:, 5:], apart_changed[:, 5:])
    assert not torch.allclose(tiny_gpt(IDS)[:, 5:], tiny_gpt(changed)[:, 5:])


def test_cache_gives_the_logits_of_the_whole_text(tiny_gpt: GPT) -> None:
    whole = tiny_gpt(IDS)
    cache = KVCache(tiny_gpt.config, 2, dtype=torch.float32, device=IDS.device)
    steps = [tiny_gpt.hidden(IDS[:, :4], cache=cache)]
    steps += [tiny_gpt.hidden(IDS[:, t : t + 1], cache=cache) for t in range(4, 12)]
    torch.testing.assert_close(tiny_gpt.logits(torch.cat(steps, dim=1)), whole)


def test_too_long_a_context_is_refused(tiny_gpt: GPT) -> None:
    with pytest.raises(ValueError, match="17 tokens, but block_size is 16"):
        tiny_gpt(torch.zeros(1, 17, dtype=torch.int64))


def test_dropout_draws_anew_each_step_and_the_same_for_a_seed(tiny_gpt: GPT) -> None:
    tiny_gpt.train()
    losses = [tiny_gpt(IDS, IDS).item() for _ in range(4)]
    assert len(set(losses)) == 4
    tiny_gpt.seed_dropout(1, step=2)
    assert [tiny_gpt(IDS, IDS).item() for _ in range(2)] == losses[2:]
    tiny_gpt.seed_dropout(2, step=2)
    assert tiny_gpt(IDS, IDS).item() != losses[2]
    tiny_gpt.eval()
    assert tiny_gpt(IDS, IDS).item() == tiny_gpt(IDS, IDS).item()


def test_every_place_draws_its_own_mask(tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = DropoutState.at

    def spy(state: DropoutState, site: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        asked.append(site)
        return original(state, site)

    monkeypatch.setattr(DropoutState, "at", spy)
    tiny_gpt.train()(IDS)
    assert sorted(asked) == list(range(1 + 3 * 2))  # the embedding, and three in each of two layers


def test_bf16_activations_leave_fp32_parameters_and_gradients(tiny_gpt: GPT) -> None:
    exact = tiny_gpt(IDS, IDS)
    tiny_gpt.compute_dtype = torch.bfloat16
    loss = tiny_gpt(IDS, IDS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.01  # bf16 has 8 bits: 0.4% of a logit, averaged over 24 tokens
    for name, p in tiny_gpt.named_parameters():
        assert p.grad is not None, name
        assert p.dtype == p.grad.dtype == torch.float32, name


def test_gradients_equal_those_of_a_plain_gpt2(tiny_gpt: GPT) -> None:
    """transformers' GPT-2 with our weights is the plain one; test_folder.py compares the logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fusedgpt.model.folder import hf_config, hf_tensors

    plain = GPT2LMHeadModel(GPT2Config(**hf_config(tiny_gpt.config, eot_id=60)))
    plain.load_state_dict(hf_tensors(tiny_gpt), strict=False)
    plain.eval()(IDS, labels=IDS).loss.backward()
    tiny_gpt(IDS[:, :-1], IDS[:, 1:]).backward()
    assert tiny_gpt.wte.weight.grad is not None
    torch.testing.assert_close(tiny_gpt.wte.weight.grad[:61], plain.transformer.wte.weight.grad)
    torch.testing.assert_close(
        tiny_gpt.blocks()[0].attn.c_attn.weight.grad, plain.transformer.h[0].attn.c_attn.weight.grad.T
    )


def test_forward_traces_into_one_graph(tiny_gpt: GPT) -> None:
    tiny_gpt.train()
    expected = tiny_gpt(IDS, IDS)
    tiny_gpt.seed_dropout(1)
    compiled = torch.compile(tiny_gpt, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, IDS), expected)
    assert compiled(IDS, IDS).item() != expected.item()  # the next step's dropout

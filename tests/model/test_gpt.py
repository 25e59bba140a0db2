"""The model: shapes, initialisation, causality, dropout, cache, precision, parameter counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compiling import INDUCTOR_GRAPHS
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT, Dropout

IDS = torch.arange(24).view(2, 12)
THREE_LAYERS = GPTConfig(vocab_size=61, block_size=16, n_layer=3, n_head=3, n_embd=24, dropout=0.1)
TWO_LAYERS = THREE_LAYERS.model_copy(update={"n_layer": 2})
ONE_LAYER = THREE_LAYERS.model_copy(update={"n_layer": 1})  # Triton's interpreter takes a second a block


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


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


def test_weights_are_drawn_once_and_by_the_seed_alone(tiny_config: GPTConfig) -> None:
    before = torch.get_rng_state()
    drawn = GPT(tiny_config, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nn.Linear and nn.Embedding draw from it
    again = GPT(tiny_config, seed=5).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in drawn.items())
    assert not torch.equal(GPT(tiny_config, seed=6).wpe.weight, drawn["wpe.weight"])


def test_too_long_a_context_is_refused(tiny_gpt: GPT) -> None:
    with pytest.raises(ValueError, match="17 tokens, but block_size is 16"):
        tiny_gpt(torch.zeros(1, 17, dtype=torch.int64))


def test_dropout_draws_anew_each_step_and_the_same_for_a_seed(tiny_gpt: GPT) -> None:
    tiny_gpt.train()
    losses = [tiny_gpt(IDS, IDS).item() for _ in range(4)]
    assert len(set(losses)) == 4
    tiny_gpt.seed_dropout(1, windows=4)
    assert [tiny_gpt(IDS, IDS).item() for _ in range(2)] == losses[2:]
    tiny_gpt.seed_dropout(2, windows=4)
    assert tiny_gpt(IDS, IDS).item() != losses[2]
    tiny_gpt.eval()
    assert tiny_gpt(IDS, IDS).item() == tiny_gpt(IDS, IDS).item()


def test_every_place_draws_its_own_mask(tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site s takes seed + s at the window's counters, 16 bytes apart: Triton compiles one kernel for all."""
    asked = []
    original = Dropout.at

    def spy(state: Dropout, site: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        asked.append(original(state, site))
        return asked[-1]

    monkeypatch.setattr(Dropout, "at", spy)
    tiny_gpt.seed_dropout(70, windows=5)
    tiny_gpt.train()(IDS)
    assert [int(seed) for _, seed, _ in asked] == list(range(70, 77))  # 3 in each of 2 layers, the last norm
    rows, weights = 5 * 12 * 3, 5 * 3 * 64  # 12 rows of 3 blocks a window; 3 heads of one tile of 64 blocks
    assert [int(offset) for _, _, offset in asked] == [rows, weights, rows] * 2 + [rows]
    assert {p for p, _, _ in asked} == {0.1}
    assert len({seed.data_ptr() % 16 for _, seed, _ in asked}) == 1


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_window_draws_the_same_masks_in_any_batch(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1 and 2 of four, as a batch of their own whose first window is the second."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", kernels)
    gpt, ids = GPT(ONE_LAYER, seed=1).train(), torch.arange(4 * 16).view(4, 16) % 61
    whole = gpt.hidden(ids)[0]
    assert int(gpt.dropout_windows) == 4
    gpt.seed_dropout(1, windows=1)
    torch.testing.assert_close(gpt.hidden(ids[1:3])[0], whole[1:3])


def test_bf16_activations_leave_fp32_parameters_and_gradients(tiny_gpt: GPT) -> None:
    exact = tiny_gpt(IDS, IDS)
    loss = tiny_gpt(IDS, IDS, dtype=torch.bfloat16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 0.01  # bf16 has 8 bits: 0.4% of a logit, averaged over 24 tokens
    for name, p in tiny_gpt.named_parameters():
        assert p.grad is not None, name
        assert p.dtype == p.grad.dtype == torch.float32, name


def test_gradients_equal_those_of_a_plain_gpt2(tiny_gpt: GPT) -> None:
    """transformers' GPT-2 with our weights is the plain one; test_folder.py compares the logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fusedgpt.model.hf_config import hf_config
    from fusedgpt.model.weights import hf_tensors

    plain = GPT2LMHeadModel(GPT2Config(**hf_config(tiny_gpt.config, eot_id=60)))
    plain.load_state_dict(hf_tensors(tiny_gpt, torch.float32), strict=False)
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


Forward = Callable[..., Tensor]


def loss_and_gradients(gpt: GPT, forward: Forward | None = None, steps: int = 1) -> list[Tensor]:
    """Of the last of a few training steps without updates; each draws its own masks."""
    forward = gpt if forward is None else forward
    for _ in range(steps):
        gpt.zero_grad()
        loss = forward(IDS, IDS.flip(1))
        loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters() if p.grad is not None)]


def test_a_recomputed_step_draws_the_same_masks_under_inductor(tiny_gpt: GPT) -> None:
    """Its partitioner may read a counter in the backward pass that the forward pass has advanced."""

    def loss(x: Tensor) -> Tensor:
        offset = tiny_gpt._next_dropout(1, 1).offset

        def wave(x: Tensor) -> Tensor:
            return (x * (1 + offset)).sin().exp()

        recomputed: Tensor = checkpoint(wave, x, use_reentrant=False)
        return recomputed.sum()

    tiny_gpt.train()
    gradients = []
    for function in (loss, torch.compile(loss, backend=INDUCTOR_GRAPHS, fullgraph=True)):
        tiny_gpt.seed_dropout(1)
        x = torch.ones(3, requires_grad=True)
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.03), (torch.float16, 0.004)],  # some ten roundings of 2^-9 and 2^-12 in a row
    ids=str,
)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_low_precision_parameters(
    dtype: torch.dtype, tolerance: float, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (kernels, dtype) == ("triton", torch.bfloat16) and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter miscomputes bf16")
    monkeypatch.setenv("FUSEDGPT_KERNELS", kernels)
    gpt = GPT(ONE_LAYER, seed=1).to(dtype).train()
    exact = GPT(ONE_LAYER, seed=1).train()
    exact.load_state_dict(gpt.state_dict())  # the rounded weights
    loss, *gradients = loss_and_gradients(gpt)
    monkeypatch.setenv("FUSEDGPT_KERNELS", "reference")
    expected_loss, *expected = loss_and_gradients(exact)
    assert loss.dtype == torch.float32
    assert abs(loss - expected_loss) < tolerance
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.layout == torch.strided
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


def test_label_smoothing_and_z_loss_reach_the_loss(tiny_gpt: GPT) -> None:
    logits, targets = tiny_gpt(IDS).flatten(0, 1), IDS.flip(1).flatten()
    smoothed = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    expected = smoothed + 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(tiny_gpt(IDS, IDS.flip(1), label_smoothing=0.1, z_loss=0.01), expected)


def test_with_kernels_the_gradients_are_the_references(
    tiny_config: GPTConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx = torch.arange(22, device=device).view(2, 11)
    gradients = []
    for path in ("reference", "triton"):
        monkeypatch.setenv("FUSEDGPT_KERNELS", path)
        model = GPT(tiny_config, seed=1).to(device).train()
        loss = model(idx, idx.roll(1, 1))
        loss.backward()
        gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_block_returns_none_of_its_parameters(
    tiny_gpt: GPT, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP frees them after the block, before its output is used."""
    monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    block = tiny_gpt.to(device).blocks()[0]
    outputs = block(torch.randn(1, 4, 24, device=device), None, None, Dropout(), None)
    assert torch.equal(outputs[1], block.mlp.c_proj.bias)
    owned = {p.untyped_storage().data_ptr() for p in block.parameters()}
    assert not owned & {x.untyped_storage().data_ptr() for x in outputs}

"""Starting from weights: folders that transformers made, context cropped and extended, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fusedgpt.model.folder import save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.hf_config import ModelFolderError
from fusedgpt.model.initialise import fitted_config, init_from
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, byte_tokenizer, char_tokenizer

IDS = torch.arange(32)[None] * 7


@pytest.fixture
def theirs() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def folder_of(theirs: GPT2LMHeadModel, path: Path, **options: Any) -> Path:
    theirs.save_pretrained(path, **options)
    return path


def begin(folder: Path, overrides: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> GPT:
    return init_from(folder, fitted_config(folder, overrides), tokenizer, **options)


def quiet(folder: Path, overrides: dict[str, Any], tokenizer: Tokenizer | None = None) -> GPT:
    return begin(folder, overrides, tokenizer or byte_tokenizer(), note=pytest.fail).eval()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_the_logits_are_those_of_transformers(
    theirs: GPT2LMHeadModel, tmp_path: Path, options: dict[str, str]
) -> None:
    folder = folder_of(theirs, tmp_path, **options)
    assert (folder / "model.safetensors").exists() != bool(options)
    ours = quiet(folder, {"dropout": 0.25, "block_size": None})
    assert ours.config.dropout == 0.25
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)


def test_a_transposed_square_projection_would_be_seen(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    expected = theirs(IDS).logits
    with torch.no_grad():
        theirs.transformer.h[1].attn.c_proj.weight.copy_(theirs.transformer.h[1].attn.c_proj.weight.T.clone())
    ours = quiet(folder_of(theirs, tmp_path), {})
    assert (ours(IDS) - expected).abs().max() > 1e-2


def test_a_cropped_context_keeps_the_first_positions(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    notes: list[str] = []
    overrides = {"block_size": 20, "trained_length": 9}
    ours = begin(
        folder_of(theirs, tmp_path),
        overrides,
        byte_tokenizer(),
        note=notes.append,
    ).eval()
    assert "context cropped from 32 to 20" in notes[0]
    assert (ours.config.block_size, ours.config.window) == (20, 20)  # it has seen 32
    torch.testing.assert_close(ours(IDS[:, :20]), theirs(IDS[:, :20]).logits, rtol=0, atol=1e-4)


def test_an_extended_context_repeats_the_positions_and_trains(
    theirs: GPT2LMHeadModel, tmp_path: Path
) -> None:
    overrides = {"block_size": 70, "trained_length": 64}
    with pytest.warns(UserWarning, match="context extended from 32 to 70"):
        ours = begin(
            folder_of(theirs, tmp_path),
            overrides,
            byte_tokenizer(),
        )
    assert (ours.config.block_size, ours.config.window) == (70, 64)
    table = theirs.transformer.wpe.weight
    assert torch.equal(ours.wpe.weight, torch.cat((table, table, table))[:70])
    torch.testing.assert_close(ours.eval()(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)
    ours(torch.zeros(1, 70, dtype=torch.int64), torch.ones(1, 70, dtype=torch.int64)).backward()
    assert ours.wpe.weight.grad[69].abs().max() > 0
    path = save_folder(ours, byte_tokenizer(), tmp_path, "again")
    assert torch.equal(quiet(path, {}).wpe.weight, ours.wpe.weight)


@pytest.mark.parametrize(
    ("overrides", "tokenizer", "message"),
    [
        ({"n_layer": 3}, "byte", "its weights have n_layer 2, not 3: leave that setting out"),
        ({"n_embd": 48}, "byte", "its weights have n_embd 24"),
        ({}, "gpt2", "for 257 ids, the tokenizer has 50257: use --tokenizer"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused(
    theirs: GPT2LMHeadModel, tmp_path: Path, overrides: dict[str, Any], tokenizer: str, message: str
) -> None:
    with pytest.raises(ModelFolderError, match=message):
        quiet(folder_of(theirs, tmp_path), overrides, build_tokenizer(tokenizer))


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path, tiny_gpt: GPT) -> None:
    path = save_folder(tiny_gpt, char_tokenizer("abcdef"), tmp_path, "m")
    quiet(path, {}, char_tokenizer("fedcba"))
    with pytest.raises(ModelFolderError, match="token 0 is 'a' to its weights, but 'b' to the tokenizer"):
        quiet(path, {}, char_tokenizer("bcdefg"))
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFolderError, match="cannot load the tokenizer"):
        quiet(path, {}, char_tokenizer("abcdef"))

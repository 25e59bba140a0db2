"""config.json: what of it is refused, what comes back, which folders are listed; all without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.hf_config import ModelFolderError, hf_config, list_folders, read_config

CONFIG = GPTConfig(
    vocab_size=30, block_size=64, trained_length=32, n_layer=2, n_head=3, n_embd=24, dropout=0.2
)


def write(folder: Path, **changes: Any) -> Path:
    """A folder with CONFIG, changed, and weights that nobody looks at; "absent" leaves a field out."""
    folder.mkdir()
    content = hf_config(CONFIG, eot_id=29) | changes
    kept = {key: value for key, value in content.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "model.safetensors").touch()
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "m")) == CONFIG


def test_what_transformers_leaves_out_has_its_default(tmp_path: Path) -> None:
    ours = ("trained_length", "n_inner", "tie_word_embeddings", "layer_norm_epsilon", "resid_pdrop")
    config = read_config(write(tmp_path / "m", **dict.fromkeys(ours, "absent")))
    assert (config.trained_length, config.window) == (None, 64)
    assert (config.layer_norm_epsilon, config.dropout) == (1e-5, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": "absent"}, "has no n_layer"),
        ({"n_layer": 10**9}, "n_layer: Input should be less than"),
        ({"n_head": 5}, "n_embd 24 is not a multiple of n_head 5"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"trained_length": 65}, "trained_length 65 is longer than block_size 64"),
        ({"n_inner": 17}, "n_inner is 17, expected 96"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        read_config(write(tmp_path / "m", **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        (" " * (2 << 20), "has over 1048576 bytes"),
        (None, "no model folder: it has no config.json"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=message):
        read_config(tmp_path)


def test_folders_are_listed_newest_first_and_only_models(tmp_path: Path) -> None:
    newer, older = write(tmp_path / "newer"), write(tmp_path / "older")
    os.utime(older / "model.safetensors", (1_000_000, 1_000_000))
    write(tmp_path / ".saving-x")
    write(tmp_path / "another", model_type="llama")
    (tmp_path / "empty").mkdir()
    sharded = write(tmp_path / "sharded")
    (sharded / "model.safetensors").rename(sharded / "model.safetensors.index.json")
    os.utime(sharded / "model.safetensors.index.json", (2_000_000, 2_000_000))
    rows = list_folders(tmp_path)
    assert [row["name"] for row in rows] == ["newer", "sharded", "older"]
    assert rows[0]["path"] == str(newer)
    assert rows[0]["parameters"] == CONFIG.parameter_counts()[0]
    assert list_folders(tmp_path / "absent") == []

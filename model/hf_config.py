"""config.json, the shape of a model in Hugging Face's terms, and the folders that have one.

It does not import torch, so that `fusedgpt list` is quick.
"""

from __future__ import annotations

import json
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.config import GPTConfig

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_MAX_CONFIG_BYTES = 1 << 20
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# What our GPT requires of config.json; with other values a model would load and compute something else.
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": _TANH_GELU,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class ModelFolderError(InputError):
    """A folder that is not a model folder, is damaged, or holds another architecture."""


def hf_config(config: GPTConfig, eot_id: int) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "trained_length": config.window,
        "n_inner": 4 * config.n_embd,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig that config.json describes. Raises ModelFolderError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"{folder} is no model folder: it has no config.json")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelFolderError(f"{path} has over {_MAX_CONFIG_BYTES} bytes, more than any config.json needs")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path} is not a JSON object")
    for field, allowed in _REQUIRED.items():
        if raw.get(field, allowed[0]) not in allowed:
            raise ModelFolderError(f"{path}: {field} is {raw[field]!r}, expected {allowed[0]!r}")
    try:
        config = GPTConfig(
            vocab_size=raw["vocab_size"],
            block_size=raw["n_positions"],
            trained_length=raw.get("trained_length"),
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            dropout=raw.get("resid_pdrop", 0.1),
            layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        )
    except KeyError as error:
        raise ModelFolderError(f"{path} has no {error.args[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelFolderError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise ModelFolderError(f"{path}: n_inner is {raw['n_inner']}, expected {4 * config.n_embd}")
    return config


def list_folders(root: Path) -> list[dict[str, Any]]:
    """name, path, saved (local time) and parameters of every model folder in `root`, newest first."""
    found = []
    for weights in chain.from_iterable(root.glob(f"[!.]*/{name}") for name in (WEIGHTS, INDEX)):
        # A leading dot, which the pattern excludes, is a save that was interrupted.
        try:
            config = read_config(weights.parent)
        except ModelFolderError:
            continue  # not ours
        found.append((weights.stat().st_mtime, weights.parent, config.parameter_counts()[0]))
    return [
        {
            "name": folder.name,
            "path": str(folder),
            "saved": datetime.fromtimestamp(saved).isoformat(" ", timespec="seconds"),
            "parameters": parameters,
        }
        for saved, folder, parameters in sorted(found, reverse=True)
    ]

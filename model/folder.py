"""The model folder: Hugging Face's GPT-2 layout, so that transformers, llama.cpp and the rest open it.

weights.py knows its tensors, this file the rest: config.json, what is saved beside, and how it is written.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.disk import sync
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer, load_tokenizer
from fusedgpt.model.weights import (
    INDEX,
    MAX_SHARD_BYTES,
    WEIGHTS,
    ModelFolderError,
    hf_tensors,
    load_weights,
    save_weights,
)

_MAX_CONFIG_BYTES = 1 << 20
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# What our GPT computes, as the field that says so in config.json; others would load and be wrong.
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": _TANH_GELU,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
_MAX_NAME = 50


def safe_name(text: str) -> str:
    """`text` as a file name: NFKC, [a-z0-9_-], at most 50 characters; "model" where nothing is left."""
    ascii_text = unicodedata.normalize("NFKC", text).casefold()
    name = re.sub(r"[^a-z0-9_-]+", "-", ascii_text).strip("-")[:_MAX_NAME].rstrip("-")
    return "model" if not name or name in _RESERVED_NAMES else name


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


def save_folder(
    model: GPT, tokenizer: Tokenizer, root: Path, name: str, *, extra: Mapping[str, str] | None = None
) -> Path:
    """Write a model folder `root/name` (`name_2`, ... if taken) and return its path.

    All or nothing: it is made in a hidden directory beside it, synced to disk and renamed. extra: further
    text files by name. Raises OSError where root cannot be written.
    """
    check_writable(root)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=root))
    try:
        write_files(temporary, model, tokenizer)
        for file_name, text in (extra or {}).items():
            (temporary / file_name).write_text(text, encoding="utf-8")
        sync_files(temporary)
        return _rename_to_free_name(temporary, root, name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_files(
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write what makes up a model folder into `folder`, which exists and is nobody's yet.

    Raises OSError, and ValueError where the weights do not fit dtype.
    """
    save_weights(folder, hf_tensors(model, dtype), max_shard_bytes)
    tokenizer.save(folder, max_length=model.config.block_size)
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", hf_config(model.config, tokenizer.eot_id) | {"dtype": name})
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    _write_json(folder / "generation_config.json", {**ids, **sampling})


def sync_files(folder: Path) -> None:
    """Let others read `folder`, and have it and its files on the disk."""
    for path in (*folder.iterdir(), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)


def check_writable(root: Path) -> None:
    """Create `root` if it is missing; raises OSError naming it where no file can be made in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {root}: {error.strerror}; choose another --output-dir") from None


def _rename_to_free_name(temporary: Path, root: Path, name: str) -> Path:
    number = 1
    while True:
        target = root / (name if number == 1 else f"{name}_{number}")
        number += 1
        try:
            target.mkdir()  # claims the name; renaming onto an empty directory of ours is atomic
        except FileExistsError:
            continue
        temporary.replace(target)
        sync(root)
        return target


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model (fp32, eval mode, CPU) and tokenizer of a folder, ours or one transformers saved.

    Raises ModelFolderError where a file is missing or damaged, or the model is no GPT-2 of this kind.
    """
    config = read_config(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{folder}: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelFolderError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
    return load_model(folder), tokenizer


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig that config.json describes. Raises ModelFolderError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"{folder} is no model folder: it has no config.json")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelFolderError(f"{path} has over {_MAX_CONFIG_BYTES} bytes, which no config.json needs")
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
        # A leading dot, which the pattern leaves out, is a save that was cut off.
        try:
            config = read_config(weights.parent)
        except ModelFolderError:
            continue  # somebody else's folder
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


def load_model(folder: Path) -> GPT:
    """The model of a folder, in fp32 on the CPU, in eval mode. Raises ModelFolderError."""
    return load_weights(folder, read_config(folder))

"""The model folder: Hugging Face's GPT-2 layout, so that transformers, llama.cpp and the rest open it.

weights.py has its tensors, hf_config.py its config.json, this file the rest.
"""

from __future__ import annotations

import errno
import json
import re
import unicodedata
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fusedgpt.model.files import beside, publish
from fusedgpt.model.gpt import GPT
from fusedgpt.model.hf_config import ModelFolderError, hf_config, read_config
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.model.tokenizer_json import load_tokenizer
from fusedgpt.model.weights import MAX_SHARD_BYTES, hf_tensors, load_weights, save_weights

_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
_MAX_NAME = 50


def safe_name(text: str) -> str:
    """`text` as a file name: NFKC, [a-z0-9_-], at most 50 characters; "model" if nothing is left."""
    ascii_text = unicodedata.normalize("NFKC", text).casefold()
    name = re.sub(r"[^a-z0-9_-]+", "-", ascii_text).strip("-")[:_MAX_NAME].rstrip("-")
    return "model" if not name or name in _RESERVED_NAMES else name


def save_folder(
    model: GPT, tokenizer: Tokenizer, root: Path, name: str, *, extra: Mapping[str, str] | None = None
) -> Path:
    """Write a model folder `root/name` (`name_2`, ... if taken), as a whole or not at all; return its path.

    extra: further text files by name. Raises OSError where root cannot be written.
    """
    check_writable(root)
    with beside(root / name) as temporary:
        temporary.mkdir()
        write_files(temporary, model, tokenizer)
        for file_name, text in (extra or {}).items():
            (temporary / file_name).write_text(text, encoding="utf-8")
        for number in count(1):
            target = root / (name if number == 1 else f"{name}_{number}")
            if target.exists():
                continue
            try:
                publish(temporary, target)
                break
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # then another process has just taken the name
                    raise
    return target


def write_files(
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the files of a model folder into `folder`, an empty one that nobody reads yet.

    Raises OSError, and ValueError if a weight is too large for dtype.
    """
    save_weights(folder, hf_tensors(model, dtype), max_shard_bytes)
    tokenizer.save(folder, max_length=model.config.block_size)
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", hf_config(model.config, tokenizer.eot_id) | {"dtype": name})
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    if len(tokenizer.end_ids) > 1:
        ids["eos_token_id"] = tokenizer.end_ids
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    _write_json(folder / "generation_config.json", {**ids, **sampling})


def check_writable(root: Path) -> None:
    """Create `root` if it is missing; raises OSError naming it if no model folder can be made in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with beside(root / "trial") as folder:
            folder.mkdir()
            (folder / "file").write_text("content")
            publish(folder, folder.with_name("published"))
    except OSError as error:
        raise OSError(f"cannot write to {root}: {error.strerror}; choose another --output-dir") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model (fp32, eval mode, CPU) and tokenizer of a folder, saved by us or by transformers.

    Raises ModelFolderError if a file is missing or damaged, or the model is not a GPT-2 that we can run.
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
    return load_weights(folder, config), tokenizer


def load_model(folder: Path) -> GPT:
    """The model of a folder, in fp32 on the CPU, in eval mode. Raises ModelFolderError."""
    return load_weights(folder, read_config(folder))

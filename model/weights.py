"""GPT-2's tensors in Hugging Face's layout: to and from safetensors, in one file or in shards with an index.

The layout: names with the prefix `transformer.`, projections stored (in, out), no `lm_head` (tied), the
vocabulary without its padding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.model.hf_config import INDEX, WEIGHTS, ModelFolderError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's
_MAX_INDEX_BYTES = 64 << 20
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
_NOT_READ = re.compile(r"\.attn\.(bias|masked_bias)$")  # causal masks in old checkpoints
_HEAD = "lm_head.weight"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


def unpadded(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of each parameter in fp32 on the CPU, the embedding without the vocabulary's padding."""
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", torch.float32)
        yield name, value[: model.config.vocab_size] if name == "wte.weight" else value


def hf_tensors(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters under Hugging Face's names and shapes, on the CPU.

    Raises ValueError if a finite value overflows in dtype.
    """
    tensors = {}
    for name, value in unpadded(model):
        stored = value.T if _TRANSPOSED.search(name) else value
        tensors[f"transformer.{name}"] = rounded(name, stored, dtype).contiguous()
    return tensors


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value`, fp32, in dtype. Raises ValueError if a finite number becomes infinite."""
    low = value.to(dtype)
    if dtype != torch.float32 and not low.isfinite().all() and value.isfinite().all():
        largest = value.abs().max()
        raise InputError(f"{name} reaches {largest:.3g}, more than {dtype} holds: choose another dtype")
    return low


def save_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Write `tensors` into the existing `folder`, not atomically: one file, or shards with an index.

    A shard has at most max_shard_bytes of tensors, or a single larger one.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        with suppress(OSError):  # on a file system without permissions
            (folder / name).chmod(0o644)  # safetensors lets only the owner read it
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_weights(folder: Path, config: GPTConfig) -> GPT:
    """A GPT with a folder's weights, in fp32 on the CPU, in eval mode.

    Checks every name, shape, dtype and value. Raises ModelFolderError.
    """
    with torch.device("meta"):
        model = GPT(config)
    path = folder
    try:
        with ExitStack() as stack:
            stored: dict[str, tuple[Any, str]] = {}
            for path in _weight_files(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                keys = (key for key in file.keys() if not _NOT_READ.search(key))  # noqa: SIM118 - no mapping
                stored |= {key.removeprefix("transformer."): (file, key) for key in keys}
            head = stored.pop(_HEAD, None)
            state = _state_dict(model, stored, folder)
            if head is not None:
                _check_tied(*head, state["wte.weight"][: config.vocab_size], folder)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from None
    model.load_state_dict(state, assign=True)
    model.seed_dropout(0)
    return model.eval()


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = (folder / "pytorch_model.bin").exists()
        remedy = "; pytorch_model.bin is a pickle: save the model again as safetensors" if pickled else ""
        raise ModelFolderError(f"{folder} is no model folder: it has no {WEIGHTS}{remedy}")
    files = [folder / name for name in _shard_names(index)]
    for file in files:
        if not file.is_file():
            raise ModelFolderError(f"{index} names {file.name}, which is not there: copy it beside the index")
    return files


def _shard_names(index: Path) -> list[str]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ModelFolderError(f"{index} has over {_MAX_INDEX_BYTES} bytes, more than any index needs")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ModelFolderError(f"{index} is no index of safetensors files") from None
    for name in names:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):  # perhaps outside the folder
            raise ModelFolderError(f"{index} names {name!r}, which is no safetensors file beside it")
    return names


def _state_dict(model: GPT, stored: dict[str, tuple[Any, str]], folder: Path) -> dict[str, Tensor]:
    wanted = dict(model.named_parameters())
    if stored.keys() != wanted.keys():
        missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        raise ModelFolderError(f"{folder}: missing tensors {missing[:3]}, unexpected {unexpected[:3]}")
    state = {}
    for name, parameter in wanted.items():
        shape = tuple(parameter.shape)
        if name == "wte.weight":
            shape = (model.config.vocab_size, shape[1])
        if _TRANSPOSED.search(name):
            shape = shape[::-1]
        file, key = stored[name]
        found = tuple(file.get_slice(key).get_shape())
        if found != shape:
            raise ModelFolderError(f"{folder}: {key} has shape {found}, config.json says {shape}")
        state[name] = _to_ours(name, file.get_tensor(key), model.config, folder)
    return state


def _check_tied(file: Any, key: str, embedding: Tensor, folder: Path) -> None:
    """Raise ModelFolderError for a head that is not the embedding, which is the head of our GPT."""
    if not torch.equal(file.get_tensor(key).float(), embedding):
        raise ModelFolderError(f"{folder}: {key} differs from wte.weight; only tied embeddings are supported")


def _to_ours(name: str, value: Tensor, config: GPTConfig, folder: Path) -> Tensor:
    if not value.is_floating_point() or not value.isfinite().all():
        raise ModelFolderError(f"{folder}: {name} holds values that are not finite numbers ({value.dtype})")
    value = value.float()
    if name == "wte.weight":
        value = torch.nn.functional.pad(value, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return (value.T if _TRANSPOSED.search(name) else value).contiguous()

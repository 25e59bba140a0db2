"""Export: GGUF for llama.cpp and Ollama, safetensors in other dtypes and in shards; all or nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fusedgpt.kernels.errors import InputError, installs
from fusedgpt.model.files import beside, publish
from fusedgpt.model.folder import write_files
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.model.weights import DTYPES, MAX_SHARD_BYTES, rounded, unpadded

if TYPE_CHECKING:  # the extra `gguf`
    import gguf
    import numpy as np
    from numpy.typing import NDArray

GGUF_TYPES = ("f32", "f16", "q8_0")
_OTHER_BYTES = 16 << 20  # tokenizer, metadata, alignment
_BLOCK = 32  # values that share a scale in Q8_0
# Added tokens that llama.cpp's converter takes for special ones although they are not marked as such.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.S)
# ÿ is GPT-2's letter for the byte 0xFF, which UTF-8 never contains: a merge that never applies.
_NO_MERGES = ["ÿ ÿ"]


class ExportError(InputError):
    """A model that cannot be exported, or a path that cannot be exported to."""


def export_safetensors(
    model: GPT,
    tokenizer: Tokenizer,
    out: Path,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder `out`, which must not exist, with weights in dtype: "bf16", "fp16" or "fp32".

    Raises ExportError for an unknown dtype, an existing `out` or a full disk, ValueError for weights too
    large for dtype, OSError where `out` cannot be written.
    """
    if dtype not in DTYPES:
        raise ExportError(f"no dtype {dtype!r} for safetensors; there are {', '.join(DTYPES)}")
    n_bytes = model.config.parameter_counts()[0] * DTYPES[dtype].itemsize
    with _new(out, n_bytes) as temporary:
        temporary.mkdir()
        write_files(temporary, model, tokenizer, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)


def export_gguf(model: GPT, tokenizer: Tokenizer, out: Path, *, dtype: str = "f16", name: str = "") -> None:
    """Write a GGUF file `out`, which must not exist, as llama.cpp's converter would; dtype: see GGUF_TYPES.

    Raises ExportError for an unknown dtype, a tokenizer that llama.cpp cannot express, an existing `out`, a
    full disk, or a missing package gguf, OSError where `out` cannot be written.
    """
    if dtype not in GGUF_TYPES:
        raise ExportError(f"no dtype {dtype!r} for GGUF; there are {', '.join(GGUF_TYPES)}")
    try:
        import gguf
    except ImportError:
        raise ExportError(f"exporting to GGUF needs the package gguf: {installs('gguf')}") from None
    tokens = _bpe_of(tokenizer)
    n_bytes = model.config.parameter_counts()[0] * {"f32": 4, "f16": 2, "q8_0": 2}[dtype]
    with _new(out, n_bytes) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        try:
            _add_shape(writer, model, dtype, name or out.stem)
            _add_vocabulary(writer, model, tokenizer, tokens)
            for tensor_name, value, quantized in _gguf_tensors(model, dtype):
                writer.add_tensor(tensor_name, value, raw_dtype=quantized)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def modelfile(model: GPT, tokenizer: Tokenizer, gguf_path: Path) -> str:
    """A Modelfile for `ollama create NAME -f Modelfile`: plain continuation, in the trained context."""
    return (
        f"FROM {gguf_path.resolve()}\n"
        'TEMPLATE """{{ .Prompt }}"""\n'
        f"PARAMETER num_ctx {model.config.window}\n"
        "PARAMETER temperature 0.8\n"
        "PARAMETER top_k 40\n"
        + "".join(f'PARAMETER stop "{tokenizer.decode([end])}"\n' for end in tokenizer.end_ids)
    )


@contextmanager
def _new(out: Path, n_bytes: int) -> Iterator[Path]:
    """A temporary path that becomes `out` at the end; nothing is left of it after an error."""
    try:
        _refuse_taken(out)
        folder, needed = out.absolute().parent, n_bytes + _OTHER_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            wanted = f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB free"
            raise ExportError(f"{folder} has too little space: {wanted}; choose another --out")
        with beside(out) as temporary:
            yield temporary
            _refuse_taken(out)
            publish(temporary, out)
    except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {out}: {reason}; choose another --out") from None


def _refuse_taken(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists: remove it, or choose another --out")


def _add_shape(writer: gguf.GGUFWriter, model: GPT, dtype: str, name: str) -> None:
    """The metadata that convert_hf_to_gguf.py of llama.cpp writes for a GPT2LMHeadModel."""
    import gguf

    config, types = model.config, gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    of_dtype = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(of_dtype[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _bpe_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The model in tokenizer.json; raises ExportError if llama.cpp's "gpt2" would give other ids."""
    definition = tokenizer.definition()
    bpe: dict[str, Any] = definition["model"]
    rule = definition["pre_tokenizer"] or {}
    alike = (
        bpe.get("type") == "BPE"
        and not bpe.get("ignore_merges")
        and not definition["normalizer"]
        and rule.get("type") == "ByteLevel"
        and not rule.get("add_prefix_space", True)
        and (rule.get("use_regex", True) or not bpe["merges"])
    )
    if not alike:
        raise ExportError(
            f"llama.cpp has no form of this {tokenizer.kind} tokenizer, only of byte-level BPE: "
            f"train with --tokenizer gpt2 or byte, or export to safetensors"
        )
    return bpe | {"added": definition["added_tokens"]}


def _add_vocabulary(writer: gguf.GGUFWriter, model: GPT, tokenizer: Tokenizer, bpe: dict[str, Any]) -> None:
    import gguf

    kinds = gguf.TokenType
    tokens = {i: (text, kinds.NORMAL) for text, i in bpe["vocab"].items()}
    for token in bpe["added"]:
        text = token["content"]
        if token["special"] or _LOOKS_SPECIAL.fullmatch(text):
            tokens[token["id"]] = text, kinds.CONTROL
        else:
            tokens[token["id"]] = text.replace("▁", " "), kinds.USER_DEFINED
    tokens[tokenizer.eot_id] = tokenizer.eot_token, kinds.CONTROL
    listed = [tokens.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(model.config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in bpe["merges"]]
    writer.add_token_merges(merges or _NO_MERGES)
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)


def _gguf_tensors(
    model: GPT, dtype: str
) -> Iterator[tuple[str, NDArray[np.generic], gguf.GGMLQuantizationType | None]]:
    """(name, values, quantized type or None) of each tensor.

    llama.cpp reads matrices as (out, in), like ours. Norms, biases and positions stay fp32, as in its
    converter. The head is tied: without an output.weight it uses token_embd.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    kinds = gguf.GGMLQuantizationType
    wanted = {"f32": kinds.F32, "f16": kinds.F16, "q8_0": kinds.Q8_0}[dtype]
    for name, value in unpadded(model):
        kind = wanted if value.ndim == 2 and name != "wpe.weight" else kinds.F32
        if kind == kinds.Q8_0 and value.shape[1] % _BLOCK:
            kind = kinds.F16
        if kind == kinds.F16:
            rounded(name, value, torch.float16)
        gguf_name = names.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        array = gguf.quants.quantize(value.contiguous().numpy(), kind)
        yield gguf_name, array, kind if kind == kinds.Q8_0 else None

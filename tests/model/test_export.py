"""Export: what transformers makes of it, what llama.cpp's keys say, and that nothing is left half-written."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fusedgpt.model import export, files
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.export import ExportError, export_gguf, export_safetensors, modelfile
from fusedgpt.model.folder import load_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, gpt2_tokenizer
from fusedgpt.train.data.text.sources import Piece
from fusedgpt.train.data.text.tokenizer_training import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; it's 3 o'clock. 料理 😀  two  spaces\n\n"


def random_gpt(tokenizer: Tokenizer, n_embd: int = 64, padding: int = 0) -> GPT:
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size + padding, block_size=256, n_layer=2, n_head=2, n_embd=n_embd
    )
    gpt = GPT(config, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and norms away from 0 and 1, logits spread out
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        gpt.wte.weight[config.vocab_size :] = 0.0
    return gpt.eval()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return random_gpt(byte_tokenizer())


def ids_of(tokenizer: Tokenizer) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(TEXT * 4)[:200]])


def from_gguf(path: Path) -> GPT2LMHeadModel:
    """transformers' own reading of a GGUF file, of which ours knows nothing."""
    # It takes llama.cpp's context_length for n_ctx only.
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, n_positions=256)
    assert isinstance(model, GPT2LMHeadModel)
    return model.eval()


@pytest.mark.parametrize(
    ("dtype", "atol", "agreement"),
    [
        ("f32", 1e-4, 1.0),  # the same numbers in another order
        ("f16", 2e-2, 0.97),  # 11 bits of weights
        ("q8_0", 0.2, 0.9),  # 8 bits
    ],
)
def test_transformers_reads_the_gguf_with_our_logits(
    gpt: GPT, tmp_path: Path, dtype: str, atol: float, agreement: float
) -> None:
    export_gguf(gpt, byte_tokenizer(), tmp_path / "m.gguf", dtype=dtype)
    ids = ids_of(byte_tokenizer())
    ours, theirs = gpt(ids), from_gguf(tmp_path / "m.gguf")(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= agreement
    assert ours.std() > 0.3  # the comparison has something to compare


def test_a_transposed_square_projection_would_be_seen(
    gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = export._gguf_tensors

    def transposed(*args: Any) -> Any:
        for name, value, kind in tensors(*args):
            yield name, value.T.copy() if name == "blk.0.attn_output.weight" else value, kind

    monkeypatch.setattr(export, "_gguf_tensors", transposed)
    export_gguf(gpt, byte_tokenizer(), tmp_path / "m.gguf", dtype="f32")
    ids = ids_of(byte_tokenizer())
    assert (gpt(ids) - from_gguf(tmp_path / "m.gguf")(ids).logits).abs().max() > 0.05


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_metadata_is_what_llama_cpps_converter_writes(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    model = random_gpt(tokenizer, 32, padding=3)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="q8_0", name="mine")
    found = fields(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "mine",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gpt2.block_count": 2,
        "gpt2.context_length": 256,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 50256,
        "tokenizer.ggml.eos_token_id": 50256,
    }
    assert {key: found[key] for key in expected} == expected
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (tokens[262], tokens[50256:]) == (
        "Ġthe",
        ["<|endoftext|>", "[PAD50257]", "[PAD50258]", "[PAD50259]"],
    )
    assert (set(types[:50256]), types[50256:]) == ({1}, [3, 5, 5, 5])  # normal; control, unused
    assert found["tokenizer.ggml.merges"][0] == "Ġ t"
    assert len(found["tokenizer.ggml.merges"]) == 50000


def test_tensors_are_llama_cpps(gpt: GPT, tmp_path: Path) -> None:
    export_gguf(gpt, byte_tokenizer(), tmp_path / "m.gguf", dtype="f16")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(found) == 12 * 2 + 4
    assert "output.weight" not in found  # tied: llama.cpp takes token_embd
    assert {name for name, kind in found.items() if kind == "F16"} == {
        "token_embd.weight",
        *(
            f"blk.{i}.{name}.weight"
            for i in range(2)
            for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        ),
    }
    assert (
        found["position_embd.weight"] == found["output_norm.weight"] == found["blk.0.attn_qkv.bias"] == "F32"
    )


def test_rows_that_are_no_multiple_of_32_stay_f16(tmp_path: Path) -> None:
    export_gguf(random_gpt(byte_tokenizer(), 24), byte_tokenizer(), tmp_path / "m.gguf", dtype="q8_0")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (found["blk.0.attn_qkv.weight"], found["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")


def test_a_vocabulary_of_ones_own_goes_along(tmp_path: Path) -> None:
    tokenizer = train_tokenizer((Piece(TEXT * 20, True) for _ in range(3)), 300)
    export_gguf(random_gpt(tokenizer), tokenizer, tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A GPT-2 of bytes fine-tuned for chats, as transformers saves it, with added tokens of all kinds."""
    byte_tokenizer().save(tmp_path, max_length=256)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    theirs.add_tokens(["def▁main", "<|tool|>", "snake_case"])
    theirs.save_pretrained(tmp_path)
    config = GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=32,
        n_positions=64,
        vocab_size=len(theirs),
        eos_token_id=theirs.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_added_tokens_have_the_types_of_llama_cpps_converter(chat_folder: Path) -> None:
    export_gguf(*load_folder(chat_folder), chat_folder / "m.gguf")
    found = fields(chat_folder / "m.gguf")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    assert {token: kinds[token] for token in tokens[256:]} == {
        "<|endoftext|>": "CONTROL",
        "<|im_end|>": "CONTROL",
        "<|im_start|>": "CONTROL",
        "def main": "USER_DEFINED",  # ▁ is a space to llama.cpp's converter
        "<|tool|>": "CONTROL",  # the converter goes by its form
        "snake_case": "USER_DEFINED",
    }
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"


def test_a_folders_own_end_of_text_is_exported(chat_folder: Path, tmp_path: Path) -> None:
    gpt, tokenizer = load_folder(chat_folder)
    assert tokenizer.eot_token == "<|im_end|>"
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile(gpt, tokenizer, tmp_path / "m.gguf")
    export_safetensors(gpt, tokenizer, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == tokenizer.eot_id
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    both = {"eos_token_id": [tokenizer.eot_id, 256]}
    (chat_folder / "generation_config.json").write_text(json.dumps(both))
    gpt, tokenizer = load_folder(chat_folder)
    stops = [f'PARAMETER stop "<|{name}|>"' for name in ("im_end", "endoftext")]
    assert modelfile(gpt, tokenizer, tmp_path / "m.gguf").splitlines()[-2:] == stops
    export_safetensors(gpt, tokenizer, tmp_path / "both")
    assert json.loads((tmp_path / "both" / "generation_config.json").read_text()).items() >= both.items()


def test_a_character_vocabulary_has_no_gguf_form(tmp_path: Path) -> None:
    tokenizer = char_tokenizer(TEXT)
    with pytest.raises(ExportError, match=r"no form of this char tokenizer.* --tokenizer gpt2 or byte"):
        export_gguf(random_gpt(tokenizer), tokenizer, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_modelfile_continues_text_in_the_trained_window(gpt: GPT, tmp_path: Path) -> None:
    text = modelfile(gpt, byte_tokenizer(), tmp_path / "m.gguf")
    assert text.splitlines()[0] == f"FROM {tmp_path}/m.gguf"
    assert "PARAMETER num_ctx 256\n" in text
    assert 'PARAMETER stop "<|endoftext|>"\n' in text


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_safetensors_in_every_dtype_and_in_shards(
    gpt: GPT, tmp_path: Path, dtype: str, max_shard_bytes: int
) -> None:
    out = tmp_path / "out"
    export_safetensors(gpt, byte_tokenizer(), out, dtype=dtype, max_shard_bytes=max_shard_bytes)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    shards = sorted(out.glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert all(s <= max_shard_bytes or len(load_file(f)) == 1 for s, f in zip(sizes, shards, strict=True))
    assert (len(shards) == 1) == (max_shard_bytes == 10**9)
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=wanted, output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((out / "config.json").read_text())["dtype"] == str(theirs.dtype).split(".")[1]
    again, _ = load_folder(out)
    for (name, p), q in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(q, p.to(wanted).float()), name
    ids = ids_of(byte_tokenizer())
    torch.testing.assert_close(theirs.float()(ids).logits, again(ids), rtol=0, atol=1e-4)
    assert {f.stat().st_mode & 0o777 for f in out.iterdir()} == {0o644}


def test_weights_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    model = random_gpt(byte_tokenizer())
    with torch.no_grad():
        model.blocks()[0].mlp.c_fc.weight[0, 0] = 1e5
    message = r"h.0.mlp.c_fc.weight reaches 1e\+05, more than torch.float16 holds"
    with pytest.raises(ValueError, match=message):
        export_safetensors(model, byte_tokenizer(), tmp_path / "out", dtype="fp16")
    with pytest.raises(ValueError, match=message):
        export_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", dtype="f16")
    assert list(tmp_path.iterdir()) == []


def to_gguf(gpt: GPT, out: Path, **options: Any) -> None:
    export_gguf(gpt, byte_tokenizer(), out, **options)


def to_safetensors(gpt: GPT, out: Path, **options: Any) -> None:
    export_safetensors(gpt, byte_tokenizer(), out, **options)


@pytest.mark.parametrize("write", [to_gguf, to_safetensors])
class TestNothingIsLeft:
    def test_of_a_place_that_is_taken(self, write: Any, gpt: GPT, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(ExportError, match="out exists: remove it, or choose another --out"):
            write(gpt, tmp_path / "out")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]

    def test_of_a_dtype_there_is_not(self, write: Any, gpt: GPT, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"no dtype 'int3' for .*; there are"):
            write(gpt, tmp_path / "out", dtype="int3")

    def test_of_a_folder_that_is_not_there(self, write: Any, gpt: GPT, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"cannot write .*/absent/out: .*; choose another --out"):
            write(gpt, tmp_path / "absent" / "out")

    def test_of_a_disk_that_is_full_from_the_start(
        self, write: Any, gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(ExportError, match=r"too little space: 17 MB are needed, 0 MB free"):
            write(gpt, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("limit", [0, 5_000, 100_000])
    def test_of_a_disk_that_fills_up(self, write: Any, gpt: GPT, tmp_path: Path, limit: int) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match=r"File too large|cannot write"):
                write(gpt, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []

    def test_of_an_interrupt(
        self, write: Any, gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(_: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(files, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(gpt, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

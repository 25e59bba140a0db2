"""The model folder: what transformers makes of ours, what we make of theirs, what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fusedgpt.model import files
from fusedgpt.model import folder as folders
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.folder import load_folder, safe_name, save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.hf_config import ModelFolderError, list_folders
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; it's 3 o'clock."


@pytest.fixture(params=["gpt2", "char", "byte"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return build_tokenizer(request.param, text=TEXT)


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> tuple[GPT, Tokenizer, Path]:
    gpt = small_gpt(tokenizer)
    return gpt, tokenizer, save_folder(gpt, tokenizer, tmp_path, "m")


@pytest.fixture
def char_folder(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer("char", text=TEXT)
    return save_folder(small_gpt(tokenizer), tokenizer, tmp_path, "m")


def small_gpt(tokenizer: Tokenizer) -> GPT:
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=3, n_embd=24)
    gpt = GPT(config, seed=3)
    with torch.no_grad():  # biases and norms away from 0 and 1, logits spread out
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        gpt.wte.weight[config.vocab_size :] = 0.0
    return gpt.eval()


def test_transformers_loads_it_with_our_logits_and_ids(saved: tuple[GPT, Tokenizer, Path]) -> None:
    gpt, tokenizer, path = saved
    theirs, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert isinstance(theirs, GPT2LMHeadModel)
    assert not any(info.values()), info
    ids = tokenizer.encode(TEXT)
    assert AutoTokenizer.from_pretrained(path)(TEXT).input_ids == ids
    batch = torch.tensor([ids])
    logits = theirs.eval()(batch).logits
    assert logits.abs().max() > 1  # the comparison has something to compare
    torch.testing.assert_close(gpt(batch), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_folder_of_transformers_loads_with_equal_logits(tmp_path: Path, prefix: str) -> None:
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    build_tokenizer("byte").save(tmp_path, max_length=32)
    if not prefix:
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(
            {k.removeprefix("transformer."): v for k, v in tensors.items()}, tmp_path / "model.safetensors"
        )
    ours, tokenizer = load_folder(tmp_path)
    ids = torch.tensor([tokenizer.encode(TEXT)[:32]])
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_ours_loads_again_bit_for_bit(saved: tuple[GPT, Tokenizer, Path]) -> None:
    gpt, tokenizer, path = saved
    again, its_tokenizer = load_folder(path)
    assert again.config == gpt.config.model_copy(update={"trained_length": 64})
    assert its_tokenizer.kind == tokenizer.kind
    assert its_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    for name, p in gpt.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


def test_layout_is_hugging_faces(saved: tuple[GPT, Tokenizer, Path]) -> None:
    gpt, tokenizer, path = saved
    tensors = load_file(path / "model.safetensors")
    assert len(tensors) == 12 * 2 + 4
    assert tensors["transformer.wte.weight"].shape == (tokenizer.vocab_size, 24)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (24, 72)
    assert torch.equal(tensors["transformer.h.0.attn.c_proj.weight"], gpt.blocks()[0].attn.c_proj.weight.T)
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["n_ctx"] == config["n_positions"] == 64
    assert config["bos_token_id"] == config["eos_token_id"] == tokenizer.eot_id
    assert json.loads((path / "generation_config.json").read_text())["pad_token_id"] == tokenizer.eot_id


def test_files_are_readable_by_others(saved: tuple[GPT, Tokenizer, Path]) -> None:
    path = saved[2]
    assert path.stat().st_mode & 0o777 == 0o755
    assert {f.stat().st_mode & 0o777 for f in path.iterdir()} == {0o644}


def test_names_do_not_collide(tiny_gpt: GPT, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("char", text=TEXT)
    paths = [save_folder(tiny_gpt, tokenizer, tmp_path / "new" / "root", "m") for _ in range(3)]
    assert [p.name for p in paths] == ["m", "m_2", "m_3"]


def test_a_save_that_fails_leaves_nothing(
    tiny_gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def fail_at(n: int) -> Callable[[Path], None]:
        def sync(path: Path) -> None:
            calls.append(path)
            if len(calls) == n:
                raise OSError(28, "No space left on device")

        return sync

    for n in range(1, 11):
        calls.clear()
        monkeypatch.setattr(files, "sync", fail_at(n))
        with pytest.raises(OSError, match="No space left"):
            save_folder(tiny_gpt, build_tokenizer("char", text=TEXT), tmp_path, "m")
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_permissions_will_do(
    tiny_gpt: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    folder = save_folder(tiny_gpt, build_tokenizer("char", text=TEXT), tmp_path, "m")
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["mkdir", "fsync", "replace"])
def test_whatever_a_save_needs_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=r"cannot write to .*: Input/output error; choose another --output-dir"):
        folders.check_writable(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_root_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write to .* choose another --output-dir"):
        folders.check_writable(tmp_path)


def test_a_file_for_a_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .* choose another --output-dir"):
        folders.check_writable(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A fun GPT", "a-fun-gpt"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "model"),
        (".hidden", "hidden"),
        ("😀🎉", "model"),
        ("", "model"),
        ("ﬁne ＡＢＣ", "fine-abc"),
        ("CON", "model"),
        ("a\\b:c*d\x00e", "a-b-c-d-e"),
        ("料理", "model"),
        ("x" * 10_000, "x" * 50),
        ("-rf", "rf"),
    ],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value != "absent"}
        (path / "config.json").write_text(json.dumps(kept))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return edit


LN_F = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no model folder: it has no config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer"),
        (edit_config(vocab_size=5), "the tokenizer has .* ids, the model only 5"),
        (edit_config(n_positions=65), "wpe.weight has shape"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x" * 100), "is damaged"),
        (lambda p: os.truncate(p / "model.safetensors", 5000), "is damaged"),
        (edit_tensors(lambda t: t.pop(LN_F)), "missing tensors .*ln_f.weight"),
        (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "unexpected .*extra"),
        (edit_tensors(lambda t: t[LN_F].fill_(float("nan"))), "not finite"),
        (edit_tensors(lambda t: t.update({LN_F: torch.ones(24, dtype=torch.int32)})), "not finite"),
    ],
)
def test_damage_is_refused(char_folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(char_folder)
    with pytest.raises(ModelFolderError, match=message):
        load_folder(char_folder)


def in_shards(path: Path, shards: int) -> None:
    """Spread model.safetensors over shards, as transformers does."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_and_low_precision_load(char_folder: Path, dtype: torch.dtype) -> None:
    whole, _ = load_folder(char_folder)
    edit_tensors(lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))(char_folder)
    in_shards(char_folder, 3)
    again, _ = load_folder(char_folder)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(q, p.to(dtype).float()), name
    assert [row["name"] for row in list_folders(char_folder.parent)] == ["m"]


def test_masks_of_old_checkpoints_are_ignored(char_folder: Path) -> None:
    whole, _ = load_folder(char_folder)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    edit_tensors(lambda t: t.update(masks))(char_folder)
    again, _ = load_folder(char_folder)
    assert torch.equal(again.h[0].attn.c_attn.bias, whole.h[0].attn.c_attn.bias)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("head", "refused"),
    [
        (lambda wte: wte.clone(), False),
        (lambda wte: wte + 1e-4, True),
        (lambda wte: -wte, True),
        (lambda wte: wte[:-1].clone(), True),
        (lambda wte: wte.to(torch.bfloat16), True),
    ],
)
def test_a_head_of_its_own_is_refused(
    char_folder: Path, head: Callable[[torch.Tensor], torch.Tensor], refused: bool, shards: int
) -> None:
    whole, _ = load_folder(char_folder)
    edit_tensors(lambda t: t.update({"lm_head.weight": head(t["transformer.wte.weight"])}))(char_folder)
    if shards > 1:
        in_shards(char_folder, shards)
    if refused:
        with pytest.raises(ModelFolderError, match=r"lm_head.weight differs from wte.weight; only tied"):
            load_folder(char_folder)
    else:
        assert torch.equal(load_folder(char_folder)[0].wte.weight, whole.wte.weight)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model-00002-of-00002.safetensors").unlink(), "names model-00002.* is not there"),
        (lambda p: (p / INDEX).write_text("[1"), "is no index of safetensors files"),
        (
            lambda p: (p / INDEX).write_text('{"weight_map": {"a": ["b"]}}'),
            "is no index of safetensors files",
        ),
        (
            lambda p: (p / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "no safetensors file beside",
        ),
        (lambda p: (p / INDEX).write_text('{"weight_map": {}}'), "missing tensors"),
        (lambda p: (p / "model-00002-of-00002.safetensors").write_bytes(b"x" * 99), "00002.* is damaged"),
        (
            lambda p: ((p / INDEX).unlink(), (p / "pytorch_model.bin").touch()),
            "pytorch_model.bin is a pickle",
        ),
    ],
)
def test_damaged_shards_are_refused(char_folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    in_shards(char_folder, 2)
    damage(char_folder)
    with pytest.raises(ModelFolderError, match=message):
        load_folder(char_folder)


@pytest.mark.parametrize("cases", [900, pytest.param(20_000, marks=pytest.mark.soak)])
def test_fuzzed_folders_raise_only_our_error(tmp_path: Path, cases: int) -> None:
    """Bytes changed, cut and repeated in config.json, the index, the tokenizer and a shard's header."""
    tokenizer = build_tokenizer("char", text="abc")
    config = GPTConfig(vocab_size=4, block_size=4, n_layer=1, n_head=1, n_embd=4)
    folder = save_folder(GPT(config, seed=1), tokenizer, tmp_path, "m")
    in_shards(folder, 2)
    files = ["config.json", INDEX, "tokenizer.json", "model-00001-of-00002.safetensors"]
    originals = {name: (folder / name).read_bytes() for name in files}
    draw = random.Random(cases)
    messages: list[str] = []
    for case in range(cases):
        name = files[case % len(files)]
        raw = bytearray(originals[name])
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(raw), 1000))
            change = draw.choice(
                [b"", b"9" * draw.randint(1, 30), bytes([draw.randrange(256)]), b'"', b"[", b"-"]
            )
            raw[at : at + draw.choice([0, 1, 1, 5])] = change
        (folder / name).write_bytes(raw)
        try:
            load_folder(folder)
        except ModelFolderError as error:
            messages.append(str(error))
        (folder / name).write_bytes(originals[name])
    assert len(messages) > cases / 4
    assert all(message.startswith(str(folder)) for message in messages)
    load_folder(folder)

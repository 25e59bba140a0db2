"""What trains from token sets: ours, nanoGPT's, and mixes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from token_data import dataset_of

from fusedgpt.model.tokenizer import byte_tokenizer, gpt2_tokenizer
from fusedgpt.train.config import RunConfig, build_config
from fusedgpt.train.data.text import encode
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.data.text.sources import DataError
from fusedgpt.train.data.tokens.load import is_token_set, load_data, load_token_sets, split_weight

TEXTS = [f"Document {i} says: the cat sat on the mat, {i * i} times. " * 3 for i in range(40)]


def config(**options: Any) -> RunConfig:
    return build_config({"block_size": 16, "tokenizer": "byte", **options})


def prepared(folder: Path, name: str = "set", texts: Sequence[str] = TEXTS, **options: Any) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([file], folder / name, **{"tokenizer": "byte", "shard_tokens": 700, **options})
    return folder / name


def write_bin(file: Path, ids: list[int]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.array(ids, dtype=np.uint16).tofile(file)
    return file


def test_a_set_gives_the_batches_of_the_text_in_memory(tmp_path: Path) -> None:
    path = prepared(tmp_path, val_fraction=0.0)
    dataset, tokenizer = load_token_sets([path], config())
    ids = byte_tokenizer().encode_batch(TEXTS)
    memory = dataset_of(ids, eot_id=256, max_length=16)
    assert (tokenizer.kind, dataset.windows_per_epoch) == ("byte", memory.windows_per_epoch)
    for epoch in (0, 3):
        for position in range(0, memory.windows_per_epoch, 50):
            where = {"seed": 4, "epoch": epoch, "position": position, "batch_size": 50}
            for ours, theirs in zip(dataset.train_batch(**where), memory.train_batch(**where), strict=True):
                assert torch.equal(ours, theirs)
    assert str(dataset) == str(memory)
    assert dataset.token_bytes is not None
    packed, _ = load_token_sets([path], config(packing=True))
    wanted = dataset_of(ids, eot_id=256, max_length=16, packing=True)
    assert packed.borders is not None
    assert packed.borders.tolist() == wanted.borders.tolist()  # type: ignore[union-attr]
    assert packed.fingerprint != dataset.fingerprint


def test_what_was_held_out_is_validated_on(tmp_path: Path) -> None:
    dataset, _ = load_token_sets([prepared(tmp_path, val_fraction=0.3) / "index.json"], config())
    targets = torch.cat([y.flatten() for _, y in dataset.val_batches(7)])
    assert targets[targets >= 0].tolist() == dataset.val[1:].tolist()
    assert dataset.val_documents > 5
    packed, _ = load_token_sets([tmp_path / "set"], config(packing=True))
    mixed, _ = load_token_sets([tmp_path / "set", tmp_path / "set"], config(packing=True))
    for one, times in ((packed, 1), (mixed, 2)):
        windows = [window for batch in one.val_batches(7) for window in zip(*batch, strict=True)]
        targets = torch.cat([y[y >= 0] for _, y in windows])
        assert targets.tolist() == dataset.val[:].tolist() * times
        after_a_document = [x[0] == 256 for x, _ in windows]
        assert sum(after_a_document) > dataset.val_documents * times / 3  # longer documents are cut
    again, _ = load_token_sets([tmp_path / "set"], config())
    assert again.fingerprint == dataset.fingerprint
    assert prepared(tmp_path, "other", val_fraction=0.2) != tmp_path / "set"
    assert load_token_sets([tmp_path / "other"], config())[0].fingerprint != dataset.fingerprint


def test_the_tokenizer_comes_with_the_set(tmp_path: Path) -> None:
    path = prepared(tmp_path, vocab_size=300)
    dataset, tokenizer = load_token_sets([path], config(tokenizer="gpt2"))
    assert (tokenizer.kind, tokenizer.vocab_size, dataset.eot_id) == ("custom", 300, 299)
    (path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"set: no tokenizer: .*tokenizer\.json does not exist"):
        load_token_sets([path], config())
    byte_tokenizer().save(path, max_length=8)
    with pytest.raises(DataError, match=r"tokenizer\.json has 257 ids, the index says 300"):
        load_token_sets([path], config())


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "a.bin", [1] * 17)
    with pytest.raises(ValueError, match="too few for one window of 16"):
        load_token_sets([path], config(val_fraction=0.1))


# nanoGPT


def test_nanogpt_folders(tmp_path: Path) -> None:
    ids = gpt2_tokenizer().encode(" ".join(TEXTS))
    write_bin(tmp_path / "train.bin", ids[:-50])
    write_bin(tmp_path / "val.bin", ids[-50:])
    for path in (tmp_path, tmp_path / "train.bin"):
        dataset, tokenizer = load_token_sets([path], config(tokenizer="gpt2"))
        assert tokenizer is gpt2_tokenizer()
        assert (len(dataset.train), dataset.val[:].tolist()) == (len(ids) - 50, ids[-50:])
    (tmp_path / "val.bin").unlink()
    dataset, _ = load_token_sets([tmp_path], config(tokenizer="gpt2", val_fraction=0.2))
    assert len(dataset.val) == round(0.2 * (len(ids) - 50))
    assert [*dataset.train[:].tolist(), *dataset.val[:].tolist()] == ids[:-50]
    with pytest.raises(DataError, match="does not say where documents end"):
        load_token_sets([tmp_path], config(tokenizer="gpt2", packing=True))


def test_nanogpt_characters(tmp_path: Path) -> None:
    text = "".join(TEXTS)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    write_bin(tmp_path / "train.bin", [stoi[c] for c in text])
    with pytest.raises(DataError, match=r"does not say which characters its ids are: put a meta\.json"):
        load_token_sets([tmp_path], config(tokenizer="char"))
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"meta\.pkl is a pickle, which may run any code.*meta\.json"):
        load_token_sets([tmp_path], config())
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": {}}))
    dataset, tokenizer = load_token_sets([tmp_path], config(tokenizer="gpt2"))
    assert tokenizer.decode(dataset.train[:30].tolist()) == text[:30]
    (tmp_path / "meta.json").write_text('{"tokenizer": "gpt2"}')
    assert load_token_sets([tmp_path], config(tokenizer="gpt2"))[1].kind == "gpt2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", 'needs "stoi"'),
        ("{}", 'needs "stoi"'),
        ('{"stoi": {"ab": 0}}', 'needs "stoi"'),
        ('{"stoi": {"a": "0"}}', 'needs "stoi"'),
        ('{"stoi": {"\\ud800": 0}}', 'needs "stoi"'),
        ('{"stoi": {"b": 0, "a": 1}}', "do not follow the order of the characters"),
        ("[" * 100_000, "cannot read"),
        ('{"tokenizer": "gtp2"}', "no tokenizer 'gtp2'"),
    ],
)
def test_a_bad_meta_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_bin(tmp_path / "train.bin", [0] * 99)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_token_sets([tmp_path], config())
    assert "\n" not in str(caught.value)


def test_a_bad_bin_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(
        DataError, match=r"odd\.bin is truncated: 3 bytes are not a whole number of uint16 ids"
    ):
        load_token_sets([tmp_path / "odd.bin"], config())
    wrong = write_bin(tmp_path / "wrong.bin", [1] * 50 + [300] + [1] * 50)
    with pytest.raises(DataError, match=r"wrong\.bin: token 50 is id 300, outside the vocabulary of 257"):
        load_token_sets([wrong], config())
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent\.bin"):
        load_token_sets([tmp_path / "absent.bin"], config())
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent"):
        load_token_sets([tmp_path / "absent:0.5"], config())


def test_a_bin_of_32_bits_is_refused(tmp_path: Path) -> None:
    ids = gpt2_tokenizer().encode(" ".join(TEXTS))
    (tmp_path / "wide.bin").write_bytes(np.array(ids, dtype="<u4").tobytes())
    with pytest.raises(DataError, match=r"wide\.bin holds uint32, not uint16 ids .*convert it"):
        load_token_sets([tmp_path / "wide.bin"], config(tokenizer="gpt2"))
    definition = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    big = tokenizers.Tokenizer(tokenizers.models.WordLevel(definition, unk_token="w0"))
    big.add_special_tokens(["</s>"])
    big.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"read as uint16, which cannot hold the 70,001 ids.*prepare"):
        load_token_sets([tmp_path / "wide.bin"], config(tokenizer=str(tmp_path / "tokenizer.json")))
    zeros = write_bin(tmp_path / "zeros.bin", [0] * 100)
    assert len(load_token_sets([zeros], config(val_fraction=0.0))[0].train) == 100


def test_the_header_of_llm_c_is_skipped(tmp_path: Path) -> None:
    ids = gpt2_tokenizer().encode(" ".join(TEXTS))
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())
    dataset, _ = load_token_sets([tmp_path / "a.bin"], config(tokenizer="gpt2", val_fraction=0.0))
    assert dataset.train[:].tolist() == ids


# Mixes


def test_sets_are_mixed_by_their_weights(tmp_path: Path) -> None:
    one, two = prepared(tmp_path, "one"), prepared(tmp_path, "two", shard_tokens=10_000)
    dataset, _ = load_token_sets([Path(f"{one}:3"), Path(f"{two}:1")], config())
    assert "mixed 75.0%, 25.0%" in str(dataset)
    dataset, _ = load_token_sets([one, write_bin(tmp_path / "b.bin", [1] * 500)], config(val_fraction=0.0))
    assert ", mixed 9" in str(dataset)  # by their tokens
    with pytest.raises(DataError, match="give every --data a weight"):
        load_token_sets([Path(f"{one}:3"), two], config())
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="weights must be positive"):
            load_token_sets([Path(f"{one}:{weight}"), Path(f"{two}:1")], config())
        with pytest.raises(ValueError, match="weights must be positive"):
            load_token_sets([Path(f"{one}:{weight}")], config())
    other = prepared(tmp_path, "other", vocab_size=300)
    with pytest.raises(DataError, match=r"one and .*other were made with different tokenizers"):
        load_token_sets([one, other], config())
    with pytest.raises(DataError, match=r"--tokenizer char: .*one was made with another"):
        load_token_sets([one], config(tokenizer="char"))
    with pytest.raises(DataError, match=r"one\.jsonl is text: only token sets can be mixed or weighted"):
        load_token_sets([one, tmp_path / "one.jsonl"], config())


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    prepared(tmp_path)
    with pytest.raises(DataError, match=r"set\.jsonl is text: only token sets can be mixed or weighted"):
        load_data([Path(f"{tmp_path / 'set.jsonl'}:0.5")], config())
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent"):
        load_data([tmp_path / "absent"], config())


# Text


BOOK = "It was the best of times, it was the worst of times. " * 60


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2"])
@pytest.mark.parametrize("texts", [TEXTS, [BOOK], [BOOK, "short"], [*TEXTS, BOOK * 9], [TEXTS[0]] * 40])
def test_text_is_split_as_prepare_splits_it_whatever_the_seed(
    tmp_path: Path, tokenizer: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents by a hash of their text; where they are few or unequal, the end of the text."""
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 3000)  # several, in processes of their own
    path = prepared(tmp_path, texts=texts, val_fraction=0.1, tokenizer=tokenizer)
    for packing in (False, True):
        sets, _ = load_data([path], config(tokenizer=tokenizer, packing=packing))
        for seed in (0, 1):
            settings = config(tokenizer=tokenizer, seed=seed, packing=packing)
            text, _ = load_data([tmp_path / "set.jsonl"], settings)
            assert str(text) == str(sets)
            assert text.train.tolist() == sets.train[:].tolist()  # type: ignore[union-attr]
            assert text.val.tolist() == sets.val[:].tolist()  # type: ignore[union-attr]
            assert np.array_equal(text.borders, sets.borders)  # type: ignore[arg-type]
    assert 0.04 <= len(text.val) / (len(text.val) + len(text.train)) <= 0.21


def test_tokens_in_memory_take_two_bytes(tmp_path: Path) -> None:
    """And nothing is held out where nothing is asked to be."""
    (tmp_path / "a.txt").write_text("ab" * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n{"text": ""}\n{"text": "d"}\n')
    dataset, _ = load_data([tmp_path], config(val_fraction=0.0))
    assert isinstance(dataset.train, np.ndarray)
    assert dataset.train.tolist() == [97, 98] * 9 + [256, 99, 256, 100, 256]
    assert dataset.train.dtype == np.uint16
    assert (dataset.train_documents, dataset.val_documents, len(dataset.val)) == (3, 0, 0)
    assert dataset.token_bytes is not None
    assert dataset.token_bytes.tolist() == [1] * 256 + [0]


def test_unusable_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    for tokenizer in ("byte", "char"):
        with pytest.raises(DataError, match=r"a\.txt is empty"):
            load_data([tmp_path / "a.txt"], config(tokenizer=tokenizer))
    (tmp_path / "a.txt").write_text("1234")
    with pytest.raises(ValueError, match=r"5 training tokens.*window of 16.*--block-size smaller"):
        load_data([tmp_path / "a.txt"], config(val_fraction=0.0))
    with pytest.raises(DataError, match=r"- can be read only once, .* two passes"):
        load_data([Path("-")], config(tokenizer="char"))


def test_text_of_another_field_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"content": "un café noir, s\'il vous plaît"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"choose --errors replace or ignore"):
        load_data([path], config(text_field="content"))
    with pytest.raises(DataError, match=r"\(it has: content\); name .* --text-field"):
        load_data([path], config(errors="ignore"))
    options = {"text_field": "content", "val_fraction": 0.0}
    ignored, _ = load_data([path], config(errors="ignore", **options))
    assert bytes(ignored.train[:-1].tolist()) == b"un caf noir, s'il vous plat"
    replaced, _ = load_data([path], config(errors="replace", **options))
    assert bytes(replaced.train[:-1].tolist()).decode() == "un caf\ufffd noir, s'il vous pla\ufffdt"


def test_weights_are_told_from_names(tmp_path: Path) -> None:
    assert split_weight(Path("a/b:0.7")) == (Path("a/b"), 0.7)
    assert split_weight(Path("a/b")) == (Path("a/b"), None)
    assert split_weight(Path("a:b")) == (Path("a:b"), None)
    (tmp_path / "odd:1").mkdir()
    assert split_weight(tmp_path / "odd:1") == (tmp_path / "odd:1", None)


def test_prepared_data_is_told_from_text(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    assert is_token_set(path)
    assert is_token_set(Path(f"{path}:0.5"))
    assert is_token_set(tmp_path / "any.bin")
    assert not is_token_set(tmp_path)
    assert not is_token_set(tmp_path / "set.jsonl")
    write_bin(tmp_path / "train.bin", [1])
    assert is_token_set(tmp_path)


def test_a_special_token_in_the_text_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two " * 9)
    notes: list[str] = []
    load_data([tmp_path / "a.txt"], config(), notes.append)
    assert notes == ["<|endoftext|> in the text is ordinary text, not a special token"]

"""The tokenizers give the ids of tiktoken, `tokenizers` and transformers, on any text, from any file."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.model import tokenizer as tk
from fusedgpt.model import tokenizer_json as tj

os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when the tests below import it

EOT = "<|endoftext|>"
TEXTS = {
    "empty": "",
    "english": "Hello world! It's what they'll say: we've, I'd, you're, I'm, can't. IT'S",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナ、ひらがな。",
    "emoji": "😀👩‍👩‍👧‍👦🇯🇵 ok",
    "crlf": "one\r\ntwo\r\n\r\nthree\n\n\nfour\r",
    "spaces": "   a  b\t\tc \u00a0\u3000 d    ",
    "only spaces": " \n ",
    "combining": "e\u0301 n\u0303 \u0e19\u0e49\u0e33",
    "digits": "3.14159 1,000,000 ½ ²",
    "controls": "a\x00b\x1c\x1d\x85\u2028\ufeff\x7f",
}
CHARS = "".join(TEXTS.values()) + EOT
KINDS = ("gpt2", "char", "byte")
LISTED = tj.END_OF_TEXT_NAMES

# Runs and borders of the classes that GPT-2's words are cut by, and any other text.
any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(
        st.sampled_from(
            [
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "\u3000",
                "a",
                "Z",
                "'s",
                "'ll",
                "'",
                "7",
                "1234567",
                "!",
                "猫",
                "😀",
            ]
        )
    )
    .map("".join)
    .filter(bool),
)


def make(kind: str) -> tk.Tokenizer:
    return tk.build_tokenizer(kind, text=CHARS)


def definition(folder: Path, tokenizer: tk.Tokenizer) -> dict[str, Any]:
    tokenizer.save(folder, max_length=64)
    loaded: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return loaded


def write(folder: Path, content: object) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def words(vocab: dict[str, int], **parts: object) -> dict[str, Any]:
    """A tokenizer.json of whole words, cut at spaces; `parts` replace its own."""
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    cut = {"type": "WhitespaceSplit"}
    return {"version": "1.0", **unused, "added_tokens": [], "pre_tokenizer": cut, "model": model} | parts


def added(content: str, token_id: int, *, special: bool) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special} | flags


def trained_bpe() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(["the cat sat on the mat, the hat on the cat"] * 8, trainer)
    return library


@pytest.fixture(scope="module")
def gpt2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tk.gpt2_tokenizer().save(folder, max_length=1024)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def library_gpt2(gpt2_file: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(gpt2_file))
    library.encode_special_tokens = True
    return library


@pytest.fixture
def bpe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of GPT-2's vocabulary that a test may damage, in place of the installed one."""
    file = tmp_path / "vocab.bpe.gz"
    file.write_bytes(tk._BPE_FILE.read_bytes())
    monkeypatch.setattr(tk, "_BPE_FILE", file)
    tk.gpt2_tokenizer.cache_clear()
    yield file
    tk.gpt2_tokenizer.cache_clear()


# GPT-2


def test_gpt2_vocabulary_is_openais(gpt2_file: Path) -> None:
    vocab = json.loads(gpt2_file.read_text(encoding="utf-8"))["model"]["vocab"]
    # encoder.json as OpenAI wrote it; the hash that tiktoken pins in tiktoken_ext/openai_public.py
    found = hashlib.sha256(json.dumps(vocab).encode()).hexdigest()
    assert found == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" Hello world", [18435, 995]),
        ("hello world", [31373, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),
        (EOT, [27, 91, 437, 1659, 5239, 91, 29]),
        ("\n\n", [628]),
        ("a\n\nb", [64, 198, 198, 65]),
        ("", []),
    ],
)
def test_gpt2_known_ids(text: str, ids: list[int]) -> None:
    assert tk.gpt2_tokenizer().encode(text) == ids


@settings(max_examples=400, deadline=None)
@given(any_text)
def test_gpt2_gives_the_ids_of_the_tokenizers_library(library_gpt2: tokenizers.Tokenizer, text: str) -> None:
    gpt2 = tk.gpt2_tokenizer()
    ids = gpt2.encode(text)
    assert ids == library_gpt2.encode(text).ids
    assert gpt2.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=20))
def test_gpt2_decodes_any_ids_as_the_library(library_gpt2: tokenizers.Tokenizer, ids: list[int]) -> None:
    assert tk.gpt2_tokenizer().decode(ids) == library_gpt2.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tail", ["x", "\n", "\x1cx", "x" + "\n" * 1_000_100 + "y"])
def test_gpt2_takes_white_space_without_end(library_gpt2: tokenizers.Tokenizer, tail: str) -> None:
    text = "a" + "\n" * 1_000_100 + tail  # tiktoken alone panics at a million
    ids = tk.gpt2_tokenizer().encode(text)
    assert ids == library_gpt2.encode(text).ids
    assert tk.gpt2_tokenizer().encode_batch(["b", text, "c"]) == [[65], ids, [66]]


def test_gpt2_is_built_once() -> None:
    assert tk.gpt2_tokenizer() is tk.gpt2_tokenizer()


@pytest.mark.parametrize("damage", ["other", "bit", "cut", "not gzip"])
def test_a_damaged_gpt2_vocabulary_is_refused(bpe_file: Path, damage: str) -> None:
    packed = bytearray(bpe_file.read_bytes())
    text = gzip.decompress(packed)
    flipped = packed[:100_000] + bytes([packed[100_000] ^ 1]) + packed[100_001:]
    swapped = gzip.compress(text.replace(b"h e\n", b"e h\n", 1))
    broken = {"other": swapped, "bit": flipped, "cut": packed[:-9], "not gzip": b"#version: 0.2\n"}
    bpe_file.write_bytes(broken[damage])
    with pytest.raises(RuntimeError, match="reinstall fusedgpt"):
        tk.gpt2_tokenizer()


def test_a_missing_gpt2_vocabulary_is_refused(bpe_file: Path) -> None:
    bpe_file.unlink()
    with pytest.raises(RuntimeError, match="cannot read GPT-2's vocabulary"):
        tk.gpt2_tokenizer()


def test_an_intact_copy_of_the_gpt2_vocabulary_loads(bpe_file: Path) -> None:
    assert tk.gpt2_tokenizer().encode("Hello world") == [15496, 995]


# Every kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_back(kind: str, text: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot_id for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_texts(kind: str) -> None:
    tokenizer = make(kind)
    texts = [*TEXTS.values(), EOT, "\ud800"] if kind != "char" else [*TEXTS.values(), EOT]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("kind", "vocab_size"), [("gpt2", 50257), ("char", len(set(CHARS)) + 1), ("byte", 257)]
)
def test_end_of_text_is_the_last_id_and_never_comes_from_text(kind: str, vocab_size: int) -> None:
    tokenizer = make(kind)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == (kind, vocab_size, vocab_size - 1)
    ids = tokenizer.encode(f"a{EOT}b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == f"a{EOT}b"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot_id]) == f"a{EOT}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, 50257, 2**40])
def test_an_id_outside_of_the_vocabulary_is_refused(kind: str, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong} is not in this vocabulary"):
        make(kind).decode([0, wrong, 1])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("\ud800a", "\ufffda"),
        ("a\udc00", "a\ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_lone_surrogates_become_replacement_characters(text: str, meant: str) -> None:
    for tokenizer in (tk.gpt2_tokenizer(), tk.byte_tokenizer(), tk.char_tokenizer(text)):
        assert tokenizer.decode(tokenizer.encode(text)) == meant


@given(st.text(st.characters()))
def test_gpt2_and_byte_take_any_str(text: str) -> None:
    gpt2, byte = tk.gpt2_tokenizer(), tk.byte_tokenizer()
    assert gpt2.decode(gpt2.encode(text)) == byte.decode(byte.encode(text))


def test_byte_ids_are_utf8() -> None:
    byte = tk.byte_tokenizer()
    assert byte.encode("aé猫") == [0x61, 0xC3, 0xA9, 0xE7, 0x8C, 0xAB]
    assert byte.decode([0xE7, 0x8C, 0x61, 256, 0xFF]) == f"\ufffda{EOT}\ufffd"


def test_char_ids_are_the_sorted_characters() -> None:
    char = tk.char_tokenizer("bca\nab")
    assert char.encode("\nabc") == [0, 1, 2, 3]
    assert char.eot_id == 4


def test_char_refuses_what_it_does_not_have() -> None:
    with pytest.raises(
        ValueError, match=r"'é' \(U\+00E9\) is not in this vocabulary of 3 .*--tokenizer byte"
    ):
        tk.char_tokenizer("abc").encode("abéc")
    with pytest.raises(ValueError, match="the text is empty"):
        tk.char_tokenizer("")


def test_the_library_refuses_what_char_does_not_have(tmp_path: Path) -> None:
    tk.char_tokenizer("abc").save(tmp_path, max_length=64)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Exception, match="WordLevel error"):
        library.encode("abéc")


# Files, and the libraries that read them


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_and_text(kind: str, with_model: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = make(kind)
    ours.save(tmp_path, max_length=77)
    if with_model:  # transformers may choose the class by the model's config
        model = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": ours.vocab_size}
        special = {"bos_token_id": ours.eot_id, "eos_token_id": ours.eot_id}
        (tmp_path / "config.json").write_text(json.dumps(model | special))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs(f"a{EOT}b", split_special_tokens=True)["input_ids"] == ours.encode(f"a{EOT}b")
    assert theirs.decode([*ours.encode("a b"), ours.eot_id]) == f"a b{EOT}"
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (
        ours.eot_id,
        ours.eot_id,
        ours.vocab_size,
    )
    assert theirs.unk_token == (EOT if kind == "gpt2" else None)
    assert theirs.model_max_length == 77


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saves_loads_as_ours(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    ours = make(kind)
    ours.save(tmp_path, max_length=77)
    reader = GPT2TokenizerFast if kind == "gpt2" else AutoTokenizer
    reader.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    again = tj.load_tokenizer(tmp_path / "theirs")
    assert (again.kind, again.vocab_size, again.eot_id) == (kind, ours.vocab_size, ours.eot_id)
    assert again.encode_batch(list(TEXTS.values())) == ours.encode_batch(list(TEXTS.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_again(kind: str, tmp_path: Path) -> None:
    ours = make(kind)
    ours.save(tmp_path, max_length=64)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = tj.load_tokenizer(path)
        assert again.kind == kind
        assert again.encode(CHARS) == ours.encode(CHARS)


def test_the_saved_configs(tmp_path: Path) -> None:
    common = {"model_max_length": 64, "bos_token": EOT, "eos_token": EOT, "add_prefix_space": False}
    common |= {"clean_up_tokenization_spaces": False}
    for kind in KINDS:
        make(kind).save(tmp_path, max_length=64)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        gpt2 = {"tokenizer_class": "GPT2Tokenizer", "unk_token": EOT}
        assert config == common | (gpt2 if kind == "gpt2" else {"tokenizer_class": "PreTrainedTokenizerFast"})


def test_gpt2_is_recognised_in_the_spelling_of_older_files(gpt2_file: Path, tmp_path: Path) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    file["model"] |= {"dropout": None, "unk_token": EOT, "continuing_subword_prefix": "", "fuse_unk": False}
    del file["model"]["type"]
    del file["pre_tokenizer"]["use_regex"]
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert tj.load_tokenizer(write(tmp_path, file)) is tk.gpt2_tokenizer()


@pytest.mark.parametrize("change", ["prefix", "lowercase", "ids", "merges", "words", "added"])
def test_what_is_almost_gpt2_is_not_taken_for_it(change: str, gpt2_file: Path) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    vocab, merges = file["model"]["vocab"], file["model"]["merges"]
    if change == "prefix":
        file["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "lowercase":
        file["normalizer"] = {"type": "Lowercase"}
    elif change == "ids":
        vocab["Hello"], vocab["Ġworld"] = vocab["Ġworld"], vocab["Hello"]
    elif change == "merges":
        merges[5], merges[6] = merges[6], merges[5]
    elif change == "words":
        file["pre_tokenizer"]["use_regex"] = False
    else:
        file["added_tokens"].append(added("Hello world", 50257, special=False))
    assert tj._recognise(file) is None


def test_gpt2_with_one_more_token_keeps_its_own_ids(gpt2_file: Path, tmp_path: Path) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    file["added_tokens"] = [added(EOT, 50256, special=False), added("Hello world", 50257, special=False)]
    loaded = tj.load_tokenizer(write(tmp_path, file))
    assert (loaded.kind, loaded.vocab_size, loaded.eot_id) == ("custom", 50258, 50256)
    assert loaded.encode(f"Hello world{EOT}") == [50257, *tk.gpt2_tokenizer().encode(EOT)]


def test_a_trained_bpe_loads_saves_and_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    library = trained_bpe()
    library.save(str(tmp_path / "tokenizer.json"))
    first = tj.load_tokenizer(tmp_path)
    assert (first.kind, first.vocab_size) == ("custom", library.get_vocab_size())
    assert (first.eot_token, first.eot_id) == (EOT, library.token_to_id(EOT))
    first.save(tmp_path, max_length=64)
    again, theirs = tj.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        ids = library.encode(text).ids
        assert first.encode(text) == again.encode(text) == theirs(text)["input_ids"] == ids
        assert first.decode(ids) == again.decode(ids) == library.decode(ids)
    assert theirs.eos_token_id == first.eot_id
    # transformers 4 puts this in place of what tokenizer.json says
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is True
    assert first.eot_id not in first.encode(f"the {EOT} cat")
    assert first.decode([first.eot_id]) == EOT
    assert first.encode("\ud800") == first.encode("\ufffd")


@pytest.mark.parametrize("name", LISTED)
def test_the_end_of_text_of_a_custom_tokenizer(name: str, tmp_path: Path) -> None:
    loaded = tj.load_tokenizer(write(tmp_path, words({"a": 0, "b": 1, name: 2})))
    assert (loaded.eot_token, loaded.eot_id) == (name, 2)


IM = {"content": "<|im_end|>"}


@pytest.mark.parametrize(
    ("configs", "ends"),
    [
        ({}, [50256]),
        ({"config.json": {"eos_token_id": 50258}}, [50258]),
        ({"generation_config.json": {"eos_token_id": [50258, 50256]}}, [50258, 50256]),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, [50258]),
        ({"tokenizer_config.json": {"eos_token": IM}}, [50258]),
        (
            {"config.json": {"eos_token_id": 50256}, "tokenizer_config.json": {"eos_token": IM}},
            [50256, 50258],
        ),
        ({"config.json": {"eos_token_id": 198}}, [50256]),  # an ordinary token
        ({"config.json": {"eos_token_id": [[1], None, "x", 99999]}}, [50256]),
        ({"tokenizer_config.json": {"eos_token": "<|absent|>"}}, [50256]),
        ({"tokenizer_config.json": {"eos_token": 5}}, [50256]),
    ],
)
def test_a_folders_configs_name_the_end_of_text(
    configs: dict[str, Any], ends: list[int], gpt2_file: Path, tmp_path: Path
) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    file["added_tokens"] += [
        added(f"<|im_{name}|>", i, special=True) for i, name in ((50257, "start"), (50258, "end"))
    ]
    for name, content in configs.items():
        (tmp_path / name).write_text(json.dumps(content))
    write(tmp_path, file)
    loaded = tj.load_tokenizer(tmp_path)
    assert list(loaded.end_ids) == ends
    assert (loaded.eot_id, loaded.eot_token) == (ends[0], loaded.decode(ends[:1]))
    assert loaded.encode("<|im_end|>") == tk.gpt2_tokenizer().encode("<|im_end|>")
    loaded.save(tmp_path, max_length=64)  # a model trained from it, or a token set
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").unlink(missing_ok=True)
    assert tj.load_tokenizer(tmp_path).eot_id == ends[0]


def test_an_end_of_text_of_another_name_is_not_made_of_text(gpt2_file: Path, tmp_path: Path) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    file["added_tokens"].append(added("<END>", 50257, special=False))
    write(tmp_path, file)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<END>"}')
    loaded = tj.load_tokenizer(tmp_path)
    assert (loaded.eot_id, loaded.encode("<END>")) == (50257, tk.gpt2_tokenizer().encode("<END>"))
    assert loaded.encode_special("<END>") == [50257]


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    make("byte").save(tmp_path, max_length=64)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer .*generation_config.json is not JSON"):
        tj.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_encoded_as_such_only_on_demand(kind: str) -> None:
    tokenizer = make(kind)
    assert tokenizer.special_tokens == {EOT: tokenizer.eot_id}
    assert tokenizer.eot_id not in tokenizer.encode(f"a{EOT}b")
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode_special(f"a{EOT}{EOT}b") == [*a, tokenizer.eot_id, tokenizer.eot_id, *b]


def test_the_longest_name_of_a_special_token_counts(gpt2_file: Path, tmp_path: Path) -> None:
    file = json.loads(gpt2_file.read_text(encoding="utf-8"))
    file["added_tokens"] += [added("<a>", 50257, special=True), added("<a>b", 50258, special=True)]
    tokenizer = tj.load_tokenizer(write(tmp_path, file))
    assert tokenizer.encode_special(f"<a>b<a>{EOT}") == [50258, 50257, 50256]


def test_vocab_and_merges_of_older_folders(gpt2_file: Path, tmp_path: Path) -> None:
    model = json.loads(gpt2_file.read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *map(" ".join, model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert tj.load_tokenizer(tmp_path) is tk.gpt2_tokenizer()
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 50257}')
    with pytest.raises(ValueError, match=r"has added tokens and no tokenizer.json; .*AutoTokenizer"):
        tj.load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist"):
        tj.load_tokenizer(tmp_path)


def test_vocab_and_merges_of_ones_own(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    library = trained_bpe()
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.model.save(str(tmp_path))
    loaded = tj.load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.eot_id) == ("custom", library.token_to_id(EOT))
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        assert loaded.encode(text) == library.encode(text).ids == theirs(text)["input_ids"]


def test_a_custom_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no end-of-text token: add one of <\|endoftext\|>, .*</s>"):
        tj.load_tokenizer(write(tmp_path, words({"a": 0, "b": 1})))


@pytest.mark.parametrize("special", [True, False, None])
def test_no_custom_tokenizer_makes_end_of_text_of_text(special: bool | None, tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "a": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</s>": 6}
    listed = [] if special is None else [added("</s>", 6, special=special)]
    loaded = tj.load_tokenizer(write(tmp_path, words(vocab, added_tokens=listed)))
    assert loaded.encode("a </s> a") == [1, 2, 3, 4, 5, 1]
    assert loaded.encode_batch(["</s>", "a"]) == [[2, 3, 4, 5], [1]]


def test_text_that_can_only_be_end_of_text_is_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "</s>"}
    loaded = tj.load_tokenizer(write(tmp_path, words({}, model=model)))
    assert loaded.encode("a a") == [0, 0]
    with pytest.raises(ValueError, match="'q' has no ids but that of </s>"):
        loaded.encode("a q")


def test_a_custom_tokenizer_adds_and_cuts_nothing(tmp_path: Path) -> None:
    library = trained_bpe()
    plain = library.encode("the cat sat").ids
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOT} $A", special_tokens=[(EOT, 1)]
    )
    library.enable_truncation(2)
    library.enable_padding(length=64)
    library.model.dropout = 0.9
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = tj.load_tokenizer(tmp_path)
    assert [loaded.encode("the cat sat") for _ in range(5)] == [plain] * 5


def test_a_custom_tokenizer_with_gaps(tmp_path: Path) -> None:
    loaded = tj.load_tokenizer(write(tmp_path, words({"a": 0, "</s>": 9})))
    assert loaded.vocab_size == 10
    assert loaded.decode([0, 9]) == "a </s>"
    with pytest.raises(ValueError, match="token id 5 is not in this vocabulary"):
        loaded.decode([0, 5])


@pytest.mark.parametrize(
    ("vocab", "message"),
    [({"a": 0, "</s>": 2**20}, "it has the id 1048576"), ({"a": 1, "</s>": 1}, "one id to two tokens")],
)
def test_a_custom_tokenizer_with_bad_ids_is_refused(
    vocab: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tj.load_tokenizer(write(tmp_path, words(vocab)))


# Bad input


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer: .*\.json does not exist"):
            tj.load_tokenizer(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"{}",
        b'{"model": 3}',
        b"\xff\xfe",
        b"[" * 200_000,
        b"9" * 5000,
        b'{"a":' * 900,
    ],
)
def test_what_is_no_tokenizer_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="cannot load the tokenizer") as caught:
        tj.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    os.mkfifo(file)
    with pytest.raises(ValueError, match="it is not a file"):
        tj.load_tokenizer(tmp_path)
    file.unlink()
    with file.open("wb") as stream:
        stream.truncate(tj.MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(ValueError, match=r"tokenizer.json is over 67108864 bytes"):
        tj.load_tokenizer(tmp_path)


def test_a_panic_while_loading_is_a_value_error(tmp_path: Path) -> None:
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(ValueError, match="refuses it: Precompiled"):
        tj.load_tokenizer(write(tmp_path, words({"a": 0, "</s>": 1}, normalizer=charsmap)))


def test_a_panic_while_encoding_or_decoding_is_a_value_error(tmp_path: Path) -> None:
    by_none = {"type": "FixedLength", "length": 0}
    strip = {"type": "Strip", "content": "a", "start": 9, "stop": 9}
    loaded = tj.load_tokenizer(
        write(tmp_path, words({"a": 0, "</s>": 1}, pre_tokenizer=by_none, decoder=strip))
    )
    with pytest.raises(ValueError, match="cannot encode the text: chunk size"):
        loaded.encode("a")
    with pytest.raises(ValueError, match="cannot decode the ids"):
        loaded.decode([0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(error: type[BaseException]) -> None:
    with pytest.raises(error), tj._library_errors("loading"):
        raise error


def test_errors_of_the_library_become_one_line() -> None:
    with pytest.raises(ValueError, match=r"^loading: a b$"), tj._library_errors("loading"):
        raise OSError("a\n  b")


def test_a_word_that_a_custom_tokenizer_lacks_is_a_value_error(tmp_path: Path) -> None:
    loaded = tj.load_tokenizer(write(tmp_path, words({"a": 0, "</s>": 1})))
    with pytest.raises(ValueError, match="cannot encode the text: WordLevel error"):
        loaded.encode("a b")


hostile = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**65)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(LISTED),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def replaced(tree: Any, choose: st.DataObject) -> Any:
    """`tree` with one value, drawn at any depth, made hostile."""
    if not isinstance(tree, dict | list) or not tree or choose.draw(st.integers(0, 5)) == 0:
        return choose.draw(hostile)
    key = choose.draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
    tree[key] = replaced(tree[key], choose)
    return tree


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "byte": definition(folder, tk.byte_tokenizer()),
        "char": definition(folder, tk.char_tokenizer("ab\n")),
        "words": words({"<unk>": 0, "a": 1, "</s>": 2}, added_tokens=[added("</s>", 2, special=True)]),
        "trained": json.loads(trained_bpe().to_str()),
    }


@pytest.mark.parametrize("kind", ["byte", "char", "words", "trained"])
@settings(max_examples=100, deadline=None)
@given(choose=st.data())
def test_hostile_files_end_in_a_value_error_or_a_tokenizer(
    sources: dict[str, Any], kind: str, choose: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, replaced(copy.deepcopy(sources[kind]), choose))
    try:
        loaded = tj.load_tokenizer(folder)
        ids = loaded.encode(f"ab \n{EOT}</s>")
        loaded.decode(ids)
    except ValueError:
        return
    assert loaded.eot_id not in ids
    assert all(0 <= i < loaded.vocab_size for i in ids)


# The door


def test_build_tokenizer(tmp_path: Path) -> None:
    assert tk.build_tokenizer("gpt2") is tk.gpt2_tokenizer()
    assert tk.build_tokenizer("char", text="ab").vocab_size == 3
    assert tk.build_tokenizer("byte").kind == "byte"
    tk.byte_tokenizer().save(tmp_path, max_length=8)
    assert tk.build_tokenizer(str(tmp_path)).kind == "byte"
    assert tk.build_tokenizer(str(tmp_path / "tokenizer.json")).kind == "byte"


@pytest.mark.parametrize("name", ["", "gpt3", "no/such/folder", "x" * 5000, "a\0b"])
def test_build_tokenizer_lists_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="choose gpt2, char, byte or the path"):
        tk.build_tokenizer(name)


def test_the_import_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'tiktoken', 'tokenizers', 'numpy'}"
    code = (
        f"import sys, fusedgpt.model.tokenizer; assert not {heavy} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

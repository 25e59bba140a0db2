"""Text from tokens as they come: the pieces make up the text, whole characters only, nothing past a stop."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from fusedgpt.model.streaming import TextStream
from fusedgpt.model.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, gpt2_tokenizer
from fusedgpt.model.tokenizer_json import CustomTokenizer

TEXT = "Héllo 料理 😀🎉 — naïve\n\u202e e\u0301 \ufffd end"


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama's, Mistral's and Gemma's: a character without an id is written as the ids of its bytes."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: i for i, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["</s>"])
    return CustomTokenizer(json.loads(library.to_str()))


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(i) for i in ids), stream.end()]


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer(), char_tokenizer(TEXT)])
def test_the_pieces_make_up_the_text(tokenizer: Tokenizer) -> None:
    found = pieces(TextStream(tokenizer, tokenizer.encode("H")), tokenizer.encode(TEXT))
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found if "\ufffd end" not in piece and piece != "\ufffd ")


def test_a_character_comes_with_its_last_byte() -> None:
    found = pieces(TextStream(byte_tokenizer(), []), list("a😀b".encode()))
    assert found == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize("text", ["a € b", "日本 c", "hi 😀", "日本語の文😀😀😀é€ aé", "料\n理", "€", " a"])
@pytest.mark.parametrize("prompt", ["x", "日本語😀", "a €", "aé"])
def test_characters_of_several_ids_come_whole(prompt: str, text: str) -> None:
    """As transformers decodes them, that is the tokenizers library, whatever stood before."""
    tokenizer = byte_fallback_tokenizer()
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    whole = tokenizer.decode([*before, *ids])
    for cut in range(len(before)):  # as a conversation that is too long begins anywhere
        if not tokenizer.decode(before[cut:]).startswith("\ufffd"):
            found = pieces(TextStream(tokenizer, before[cut:]), ids)
            assert tokenizer.decode(before) + "".join(found) == whole
            assert "\ufffd" not in "".join(found)
    assert found.count("") == len(found) - len(whole[len(prompt) :])  # a character comes with its last id


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_come_as_the_whole_would(seed: int) -> None:
    draw = random.Random(seed)
    valid = list("é料😀".encode())
    ids = [draw.choice([*valid, draw.randrange(256)]) for _ in range(200)]
    found = "".join(pieces(TextStream(byte_tokenizer(), list(b"prompt")), ids))
    assert found == bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["END"], "aENDb", "a"),
        (["END"], "aEN", "aEN"),
        (["END"], "aEENDb", "aE"),
        (["xyz", "b"], "aaxybxyz", "aaxy"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["料"], "a料b", "a"),
        ([], "a", "a"),
    ],
)
def test_it_ends_before_a_stop_string(stop: list[str], text: str, shown: str) -> None:
    stream = TextStream(byte_tokenizer(), [256], stop)
    found = pieces(stream, list(text.encode()))
    assert "".join(found) == shown
    assert stream.ended


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert pieces(TextStream(byte_tokenizer(), [], ["END"]), list(b"aENxEND")) == [
        *("a", "", "", "ENx", "", "", ""),
        "",
    ]


def test_end_of_text_ends_it() -> None:
    stream = TextStream(byte_tokenizer(), [256], ["END"])
    assert [stream.add(i) for i in (*b"aE", 256, *b"b")] == ["a", "", "E", ""]
    assert stream.ended


def test_any_end_of_text_of_the_folder_ends_it() -> None:
    definition = byte_tokenizer().definition()
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": 257, "content": "<|im_end|>"})
    tokenizer = CustomTokenizer(definition, ["<|im_end|>", "<|endoftext|>"])
    for end in (256, 257):
        stream = TextStream(tokenizer, [])
        assert [stream.add(i) for i in (*b"a", end, *b"b")] == ["a", "", ""]
        assert stream.ended


def test_ids_that_pad_the_vocabulary_have_no_text() -> None:
    assert pieces(TextStream(byte_tokenizer(), []), [97, 300, 98]) == ["a", "", "b", ""]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="an empty string would end every text"):
        TextStream(byte_tokenizer(), [], ["a", ""])

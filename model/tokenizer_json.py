"""tokenizer.json: our own tokenizers are recognised, the `tokenizers` library runs the others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.tokenizer import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    Tokenizer,
    byte_level_json,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    well_formed,
)

if TYPE_CHECKING:  # imported where used: it takes 60 ms
    import tokenizers

# A tokenizer.json does not say which of its tokens is end-of-text: it is the first of these that it has.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")
MAX_TOKENIZER_BYTES = 64 * 2**20


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of `path`: a tokenizer.json, a folder with one, or one with vocab.json and merges.txt.

    One with the ids of `gpt2_tokenizer`, `byte_tokenizer` or a `char_tokenizer` becomes that one, which is
    faster; the `tokenizers` library runs any other. End-of-text is the token that the folder's configs name.

    Raises FileNotFoundError if there is no file, ValueError if it cannot be read, is over
    MAX_TOKENIZER_BYTES, is not JSON, is refused by the library, or has no end-of-text.
    """
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        if file != path and not file.exists() and _is_split(path):
            definition = _joined(path)
        else:
            definition = _read_json(file)
        ends = _ends_named_by(path, definition) if path.is_dir() else []
        return _recognise(definition) or CustomTokenizer(definition, ends)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no tokenizer: {file} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot load the tokenizer {path}: {_one_line(error)}") from error


def _is_split(folder: Path) -> bool:
    """Whether GPT-2's tokenizer is there in the two files of old versions of transformers."""
    two = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if two and (folder / "added_tokens.json").exists():
        convert = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        raise InputError(f"it has added tokens and no tokenizer.json; write one in Python: {convert}")
    return two


def _joined(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json for vocab.json and merges.txt."""
    vocab = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    definition = byte_level_json([END_OF_TEXT], merges=merges, cut_words=True)
    (eot,) = definition["added_tokens"]
    definition["added_tokens"] = [
        eot | {"id": vocab[name], "content": name} for name in END_OF_TEXT_NAMES if name in vocab
    ]
    definition["model"]["vocab"] = vocab
    return definition


def _read_json(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # reading a pipe would not end
        raise ValueError("it is not a file")
    with file.open("rb") as stream:
        raw = stream.read(MAX_TOKENIZER_BYTES + 1)
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise InputError(f"{file.name} is over {MAX_TOKENIZER_BYTES} bytes")
    try:
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file.name} does not hold a JSON object")
    return content


def _ends_named_by(folder: Path, definition: dict[str, Any]) -> list[str]:
    """The tokens that a folder's configs name as end of text, first the one of transformers' `generate`.

    An eos_token_id counts if it is an added token: it may be GPT-2's, left beside another vocabulary.
    """
    names = {i: name for i, name in _added_tokens(definition) if isinstance(i, int)}
    ends: list[Any] = []
    for file in ("generation_config.json", "config.json", "tokenizer_config.json"):
        config = _read_json(folder / file) if (folder / file).is_file() else {}
        ids, token = config.get("eos_token_id"), config.get("eos_token")
        ends += [names.get(i) for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        ends.append(token.get("content") if isinstance(token, dict) else token)
    return list(dict.fromkeys(name for name in ends if isinstance(name, str)))


def _added_tokens(definition: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(id, content) of the added tokens of any JSON object."""
    added = definition.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [(token.get("id"), token.get("content")) for token in tokens]


def _recognise(definition: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of tokenizer.py with the same ids, if any. `definition` is any JSON object."""
    model = definition.get("model")
    if not isinstance(model, dict) or not isinstance(vocab := model.get("vocab"), dict):
        return None
    if len(vocab) == 50257 and "merges" in model:
        ours = gpt2_tokenizer()
    elif len(vocab) == 257 and "merges" in model:
        ours = byte_tokenizer()
    elif characters := "".join(token for token in vocab if len(token) == 1):
        ours = char_tokenizer(characters)
    else:
        return None
    return ours if _id_rules(definition) == _id_rules(ours.definition()) else None


def _id_rules(definition: dict[str, Any]) -> list[object]:
    """The parts of a tokenizer.json that decide the ids, in one form for all versions of its writers."""
    parts = [_normalised(definition.get(part)) for part in ("normalizer", "pre_tokenizer", "model")]
    return [*parts, _added_tokens(definition)]


def _normalised(part: object) -> object:
    if not isinstance(part, dict):
        return part
    rules: dict[str, object] = dict(part)
    if rules.get("type") == "ByteLevel":
        rules.setdefault("use_regex", True)
    ignored = {"trim_offsets"}
    if isinstance(merges := part.get("merges"), list):
        rules.setdefault("type", "BPE")
        rules["merges"] = [" ".join(map(str, m)) if isinstance(m, list) else m for m in merges]
        ignored |= {"unk_token", "fuse_unk"}  # our BPEs have an id for every byte: nothing is unknown
    return {k: v for k, v in rules.items() if k not in ignored and v not in (None, False, "")}


class CustomTokenizer(Tokenizer):
    """Any tokenizer.json, run by the `tokenizers` library, without templates and padding."""

    kind = "custom"

    def __init__(self, definition: dict[str, Any], ends: Sequence[str] = ()) -> None:
        """ends: names of tokens that end a text; the first, or one of END_OF_TEXT_NAMES, is `eot_token`."""
        import tokenizers

        with _library_errors("the tokenizers library refuses it"):
            self._library = tokenizers.Tokenizer.from_str(json.dumps(_plain(definition, ends)))
            self._library.encode_special_tokens = True
            vocab = self._library.get_vocab(with_added_tokens=True)
            added = self._library.get_added_tokens_decoder()
        ends = [name for name in ends if name in vocab]
        name = next((name for name in (*ends, *END_OF_TEXT_NAMES) if name in vocab), None)
        if name is None:
            raise ValueError(f"it has no end-of-text token: add one of {', '.join(END_OF_TEXT_NAMES)}")
        self._known = known = frozenset(vocab.values())
        self.eot_token, self.eot_id = name, vocab[name]
        self._other_ends = tuple(vocab[end] for end in ends[1:])
        self._other_special = {token.content: i for i, token in added.items() if token.special}
        self.safe_cut = "words" if _has_gpt2_words(definition) else "never"
        self.vocab_size = max(known) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"it has the id {self.vocab_size - 1}, and the limit is {MAX_VOCAB_SIZE - 1}")
        if len(known) != len(vocab):
            raise ValueError("it gives one id to two tokens")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(map(well_formed, texts))
        with _library_errors("the tokenizer cannot encode the text"):
            encoded = self._library.encode_batch(texts)
            return [self._ordinary(text, one) for text, one in zip(texts, encoded, strict=True)]

    def _ordinary(self, text: str, encoded: tokenizers.Encoding) -> list[int]:
        """The ids; if the model itself turns a word into end-of-text, then those of the word's characters."""
        ids: list[int] = encoded.ids
        if self.eot_id not in ids:
            return ids
        parts = [
            self._alone(text[start:end]) if i == self.eot_id else [i]
            for i, (start, end) in zip(ids, encoded.offsets, strict=True)
        ]
        return list(chain.from_iterable(parts))

    def _alone(self, word: str) -> list[int]:
        encoded = self._library.encode_batch(list(word))
        ids = [i for one in encoded for i in one.ids]
        if self.eot_id in ids:
            raise InputError(f"{word!r} has no ids but that of {self.eot_token}")
        return ids

    def token_bytes(self) -> list[int] | None:
        if (self.definition()["decoder"] or {}).get("type") != "ByteLevel":
            return None
        lengths = [0] * self.vocab_size
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            lengths[i] = 0 if i == self.eot_id else len(token)  # one letter per byte
        return lengths

    def _decode(self, ids: list[int]) -> str:
        with _library_errors("the tokenizer cannot decode the ids"):
            return str(self._library.decode(ids, skip_special_tokens=False))

    def definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = json.loads(self._library.to_str())
        return definition


def _plain(definition: dict[str, Any], ends: Sequence[str]) -> dict[str, Any]:
    """`definition` without templates, truncation and dropout, and with end-of-text marked as special."""
    plain = definition | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(model := plain.get("model"), dict) and "dropout" in model:
        plain["model"] = model | {"dropout": None}
    if isinstance(added := plain.get("added_tokens"), list):
        names = (*ends, *END_OF_TEXT_NAMES)
        plain["added_tokens"] = [
            t | {"special": True} if isinstance(t, dict) and t.get("content") in names else t for t in added
        ]
    return plain


def _has_gpt2_words(definition: dict[str, Any]) -> bool:
    """Whether a valid tokenizer encodes each of GPT-2's words by itself."""
    rule = definition.get("pre_tokenizer") or {}
    tokens = definition.get("added_tokens") or []
    across_words = any(
        token.get("lstrip")
        or token.get("rstrip")
        or token.get("single_word")
        or re.search(r"\s", token["content"])
        for token in tokens
    )
    gpt2_words = rule.get("type") == "ByteLevel" and rule.get("use_regex", True)
    gpt2_words = gpt2_words and not rule.get("add_prefix_space", True)  # each part would get a space
    return gpt2_words and not definition.get("normalizer") and not across_words


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library, many of which are plain Exception, as ValueError."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust derives from BaseException, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

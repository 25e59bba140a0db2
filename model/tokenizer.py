"""Text to ids and back: GPT-2's BPE, single characters, raw bytes, or any tokenizer.json.

The text `<|endoftext|>` is ordinary text to every tokenizer here: the end-of-text id comes only from the
caller, who puts `eot_id` between documents. A lone surrogate (half of a UTF-16 pair) becomes U+FFFD.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import operator
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported where used: these take 60 ms and more, and every command imports this
    import numpy as np
    import tokenizers
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
# A tokenizer.json does not say which of its tokens ends a text: the first of these that it has is taken.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_VOCAB_SIZE = 2**20

_BPE_FILE = Path(__file__).parent / "gpt2_bpe" / "vocab.bpe.gz"
_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's rule for cutting text into words. In one group all that looks nowhere ahead: tiktoken's engine gives
# such a group whole to its fast one, which makes this 1.4 times as fast as the pattern that tiktoken has.
_GPT2_WORDS = r"(?:'(?:s|t|re|ve|m|ll|d)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+$)|\s+(?!\S)|\s"
# tiktoken's regex engine panics on a million white-space characters in a row (Unicode's, not Python's \s).
_LONG_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}")
_LONG_TEXT = 500_000


class Tokenizer(ABC):
    """Text to ids and back. `kind` is "gpt2", "char", "byte" or "custom"; ids are below `vocab_size`."""

    kind: str
    vocab_size: int  # end-of-text included
    eot_id: int
    eot_token: str = END_OF_TEXT
    # Where a text may be cut, its parts then having the ids of the whole: "words" where GPT-2's words end.
    safe_cut: Literal["anywhere", "words", "never"] = "anywhere"
    _known: Container[int]  # the ids that decode

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never `eot_id`. ValueError if the vocabulary cannot express the text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """`encode` of each text on one thread, what preparing large data calls in each process.

        An array (n,) of integers for each, the dtype as the tokenizer has them. ValueError as `encode`.
        """
        import numpy as np

        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: `eot_token` for `eot_id`, U+FFFD for bytes that are not UTF-8.

        ValueError if an id is not in the vocabulary.
        """
        ids = list(map(operator.index, ids))
        if (wrong := next((i for i in ids if i not in self._known), None)) is not None:
            raise ValueError(f"token id {wrong} is not in this vocabulary of {self.vocab_size} ids")
        return self._decode(ids)

    def save(self, folder: Path, *, max_length: int) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, which exists; not atomic.

        The `tokenizers` library and transformers' AutoTokenizer get the same ids from them. `max_length` is
        the model's context in tokens. OSError if a file cannot be written.
        """
        gpt2 = self.kind == "gpt2"
        definition = self._definition()
        prefix = (definition["pre_tokenizer"] or {}).get("add_prefix_space", False)
        config = {
            "tokenizer_class": "GPT2Tokenizer" if gpt2 else "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", *(["unk_token"] if gpt2 else [])), self.eot_token),
            "model_max_length": max_length,
            "add_prefix_space": prefix,  # transformers 4 lets it override tokenizer.json
            "clean_up_tokenization_spaces": False,
        }
        for name, content in {"tokenizer.json": definition, "tokenizer_config.json": config}.items():
            text = json.dumps(content, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    @abstractmethod
    def token_bytes(self) -> list[int] | None:
        """The UTF-8 bytes of text that each id stands for, end-of-text none; None if that is not known."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """`decode` of ids that are in the vocabulary."""

    @abstractmethod
    def _definition(self) -> dict[str, Any]:
        """The content of tokenizer.json."""


class _GPT2Tokenizer(Tokenizer):
    kind = "gpt2"
    safe_cut = "words"
    vocab_size = 50257
    eot_id = 50256
    _known = range(vocab_size)

    def __init__(self, merges: list[str]) -> None:
        import tiktoken

        letters = _byte_letters()
        byte_of = {letter: byte for byte, letter in letters.items()}
        self._merges = merges
        self._tokens = [*letters.values(), *(merge.replace(" ", "") for merge in merges)]
        ranks = {bytes(map(byte_of.__getitem__, token)): i for i, token in enumerate(self._tokens)}
        special = {END_OF_TEXT: self.eot_id}
        self._bpe = tiktoken.Encoding(
            "gpt2", pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=50257
        )

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._bpe.encode_ordinary, _safe_parts(text))))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [_safe_parts(text) for text in texts]
        flat = list(chain.from_iterable(parts))
        ids = iter(self._bpe.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
        return [list(chain.from_iterable(islice(ids, len(part)))) for part in parts]

    def token_bytes(self) -> list[int]:
        return [*map(len, self._tokens), 0]  # a letter a byte

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Of uint32."""
        import numpy as np

        parts = [_safe_parts(_well_formed(text)) for text in texts]
        arrays = [[self._bpe.encode_to_numpy(p, disallowed_special=()) for p in part] for part in parts]
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in arrays]

    def _decode(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    def _definition(self) -> dict[str, Any]:
        return _byte_level_json([*self._tokens, END_OF_TEXT], merges=self._merges, cut_words=True)


class _ByteTokenizer(Tokenizer):
    kind = "byte"
    vocab_size = 257
    eot_id = 256
    _known = range(vocab_size)
    _bytes = (*(bytes([i]) for i in range(256)), END_OF_TEXT.encode())

    def encode(self, text: str) -> list[int]:
        return list(_well_formed(text).encode())

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Of uint8."""
        import numpy as np

        return [np.frombuffer(_well_formed(text).encode(), dtype=np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def _definition(self) -> dict[str, Any]:
        letters = map(_byte_letters().__getitem__, range(256))
        return _byte_level_json([*letters, END_OF_TEXT], merges=[], cut_words=False)


class _CharTokenizer(Tokenizer):
    kind = "char"

    def __init__(self, text: str) -> None:
        self._tokens = [*sorted(set(_well_formed(text))), END_OF_TEXT]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)
        self.eot_id = self.vocab_size - 1
        self._known = range(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        try:
            return list(map(self._ids.__getitem__, _well_formed(text)))
        except KeyError as error:
            char = error.args[0]
        where = f"is not in this vocabulary of {self.eot_id} characters"
        remedy = "take it out, or train on text that has it, or with --tokenizer byte"
        raise ValueError(f"the character {char!r} (U+{ord(char):04X}) {where}: {remedy}")

    def token_bytes(self) -> list[int]:
        return [*(len(token.encode()) for token in self._tokens[:-1]), 0]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Of uint32; a table lookup for all characters at once. ValueError for one it does not have."""
        import numpy as np

        table = np.full(0x110000, self.eot_id, dtype=np.uint32)  # end-of-text: no character of ours
        table[[ord(token) for token in self._tokens[:-1]]] = np.arange(self.eot_id, dtype=np.uint32)
        points = [np.frombuffer(_well_formed(text).encode("utf-32-le"), dtype="<u4") for text in texts]
        arrays = [table[one] for one in points]
        for text, ids in zip(texts, arrays, strict=True):
            if (ids == self.eot_id).any():
                self.encode(text)  # raises, and says which character it is
        return arrays

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(self._tokens.__getitem__, ids))

    def _definition(self) -> dict[str, Any]:
        # <unk> is not in the vocabulary, so that the library, too, refuses a character that it does not know.
        model = {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unk>"}
        each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return _tokenizer_json(model, pre_tokenizer=each, decoder={"type": "Fuse"}, eot_id=self.eot_id)


class _CustomTokenizer(Tokenizer):
    """What the `tokenizers` library reads, without what that adds around a text (templates, padding)."""

    kind = "custom"

    def __init__(self, definition: dict[str, Any]) -> None:
        import tokenizers

        with _library_errors("the tokenizers library refuses it"):
            self._library = tokenizers.Tokenizer.from_str(json.dumps(_plain(definition)))
            self._library.encode_special_tokens = True
            vocab = self._library.get_vocab(with_added_tokens=True)
        name = next((name for name in END_OF_TEXT_NAMES if name in vocab), None)
        if name is None:
            raise ValueError(f"it has no end-of-text token: add one of {', '.join(END_OF_TEXT_NAMES)}")
        self._known = known = frozenset(vocab.values())
        self.eot_token, self.eot_id = name, vocab[name]
        self.safe_cut = "words" if _has_gpt2_words(definition) else "never"
        self.vocab_size = max(known) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"it has the id {self.vocab_size - 1}, and the limit is {MAX_VOCAB_SIZE - 1}")
        if len(known) != len(vocab):
            raise ValueError("it gives one id to two tokens")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(map(_well_formed, texts))
        with _library_errors("the tokenizer cannot encode the text"):
            encoded = self._library.encode_batch(texts)
            return [self._ordinary(text, one) for text, one in zip(texts, encoded, strict=True)]

    def _ordinary(self, text: str, encoded: tokenizers.Encoding) -> list[int]:
        """The ids, where the model itself took a word for end-of-text: those of its characters."""
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
            raise ValueError(f"{word!r} has no ids but that of {self.eot_token}")
        return ids

    def token_bytes(self) -> list[int] | None:
        if (self._definition()["decoder"] or {}).get("type") != "ByteLevel":
            return None
        lengths = [0] * self.vocab_size
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            lengths[i] = 0 if i == self.eot_id else len(token)  # a letter a byte
        return lengths

    def _decode(self, ids: list[int]) -> str:
        with _library_errors("the tokenizer cannot decode the ids"):
            return str(self._library.decode(ids, skip_special_tokens=False))

    def _definition(self) -> dict[str, Any]:
        definition: dict[str, Any] = json.loads(self._library.to_str())
        return definition


def build_tokenizer(name: str, *, text: str = "") -> Tokenizer:
    """The tokenizer that `--tokenizer` names: "gpt2", "char" (the characters of `text`), "byte", or a path.

    ValueError if the name is none of these; else as `char_tokenizer` and `load_tokenizer`.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "char":
        return char_tokenizer(text)
    if name == "byte":
        return byte_tokenizer()
    if name and os.path.exists(name):
        return load_tokenizer(Path(name))
    raise ValueError(f"no tokenizer {name!r}: choose gpt2, char, byte or the path of a tokenizer.json")


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own 50,257 ids, served by tiktoken; built once per process, with no internet.

    RuntimeError if the vocabulary that is installed with fusedgpt is missing or damaged.
    """
    try:
        raw = gzip.decompress(_BPE_FILE.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise RuntimeError(
            f"cannot read GPT-2's vocabulary {_BPE_FILE}: {error}; reinstall fusedgpt"
        ) from error
    found = hashlib.sha256(raw).hexdigest()
    if found != _BPE_SHA256:
        wrong = f"its SHA-256 is {found}, not {_BPE_SHA256}"
        raise RuntimeError(f"GPT-2's vocabulary {_BPE_FILE} is damaged: {wrong}; reinstall fusedgpt")
    return _GPT2Tokenizer(raw.decode().split("\n")[1:-1])


def char_tokenizer(text: str) -> Tokenizer:
    """Ids 0 .. n-1 are the distinct characters of `text`, sorted; n is end-of-text. ValueError if empty."""
    if not text:
        raise ValueError("a character tokenizer takes its characters from a text, and the text is empty")
    return _CharTokenizer(text)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 .. 255 are the bytes of the text in UTF-8; 256 is end-of-text."""
    return _ByteTokenizer()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`, a tokenizer.json or a folder that has one.

    One that gives the ids of `gpt2_tokenizer`, `byte_tokenizer` or a `char_tokenizer` becomes that one, which
    is faster. The `tokenizers` library serves the rest, with the first token of END_OF_TEXT_NAMES that it has
    as end-of-text.

    FileNotFoundError if there is no file; ValueError if it cannot be read, is over MAX_TOKENIZER_BYTES, is no
    JSON, is refused by the library, or has no end-of-text.
    """
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        definition = _read_json(file)
        return _recognise(definition) or _CustomTokenizer(definition)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no tokenizer: {file} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot load the tokenizer {path}: {_one_line(error)}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # reading a pipe would not end
        raise ValueError("it is not a file")
    with file.open("rb") as stream:
        raw = stream.read(MAX_TOKENIZER_BYTES + 1)
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"it is over {MAX_TOKENIZER_BYTES} bytes")
    definition = json.loads(raw.decode())
    if not isinstance(definition, dict):
        raise ValueError("it does not hold a JSON object")
    return definition


def _recognise(definition: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of ours that gives the same ids, if there is one. `definition` is any JSON object."""
    model = definition.get("model")
    if not isinstance(model, dict) or not isinstance(vocab := model.get("vocab"), dict):
        return None
    if len(vocab) == 50257 and "merges" in model:
        ours = gpt2_tokenizer()
    elif len(vocab) == 257 and "merges" in model:
        ours = byte_tokenizer()
    else:
        ours = _CharTokenizer("".join(token for token in vocab if len(token) == 1))
    return ours if _id_rules(definition) == _id_rules(ours._definition()) else None


def _id_rules(definition: dict[str, Any]) -> list[object]:
    """What decides the ids in a tokenizer.json, spelled the same for all versions of its writers."""
    added = definition.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    parts = [_spelled_alike(definition.get(part)) for part in ("normalizer", "pre_tokenizer", "model")]
    return [*parts, [(token.get("id"), token.get("content")) for token in tokens]]


def _spelled_alike(part: object) -> object:
    if not isinstance(part, dict):
        return part
    rules: dict[str, object] = dict(part)
    if rules.get("type") == "ByteLevel":
        rules.setdefault("use_regex", True)
    ignored = {"trim_offsets"}
    if isinstance(merges := part.get("merges"), list):
        rules.setdefault("type", "BPE")
        rules["merges"] = [" ".join(map(str, m)) if isinstance(m, list) else m for m in merges]
        ignored |= {"unk_token", "fuse_unk"}  # in ours every byte has an id: nothing is unknown
    return {k: v for k, v in rules.items() if k not in ignored and v not in (None, False, "")}


def _plain(definition: dict[str, Any]) -> dict[str, Any]:
    """`definition` with nothing added, cut or drawn at random, and with end-of-text marked as special."""
    plain = definition | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(model := plain.get("model"), dict) and "dropout" in model:
        plain["model"] = model | {"dropout": None}
    if isinstance(added := plain.get("added_tokens"), list):
        plain["added_tokens"] = [
            t | {"special": True} if isinstance(t, dict) and t.get("content") in END_OF_TEXT_NAMES else t
            for t in added
        ]
    return plain


def _has_gpt2_words(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer that the library takes looks at GPT-2's words one by one."""
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


def _byte_level_json(tokens: list[str], *, merges: list[str], cut_words: bool) -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in merges]}
    rule = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut_words}
    return _tokenizer_json(model, pre_tokenizer=rule, decoder=rule, eot_id=len(tokens) - 1)


def _tokenizer_json(
    model: dict[str, Any], *, pre_tokenizer: dict[str, Any], decoder: dict[str, Any], eot_id: int
) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    eot = {"id": eot_id, "content": END_OF_TEXT, **flags, "special": True}
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return {"version": "1.0", **unused, "added_tokens": [eot], **parts}


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte, in the order of its ids: printable bytes, then U+0100 and on."""
    letters = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _well_formed(text: str) -> str:
    """`text` with each pair of surrogates as the character it stands for, each lone one as U+FFFD."""
    if text.isascii():  # known without looking
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _safe_parts(text: str) -> list[str]:
    """`text`, cut so that tiktoken does not panic, and only where the ids stay the same.

    GPT-2's words leave the last of several spaces to the word that follows, so one ends there in any case.
    """
    if len(text) <= _LONG_TEXT:
        return [text]
    cuts = [m.end() - 1 for m in _LONG_SPACES.finditer(text) if m.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library, many of which are plain Exception, as ValueError."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust derives from BaseException, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

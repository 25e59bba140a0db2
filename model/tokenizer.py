"""Text to ids and back: GPT-2's BPE, single characters or raw bytes; tokenizer_json.py reads any other.

The text `<|endoftext|>` is ordinary text to every tokenizer: the end-of-text id comes only from the caller,
who puts `eot_id` between documents. A lone surrogate (half of a UTF-16 pair) becomes U+FFFD.
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
from collections.abc import Container, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusedgpt.kernels.errors import InputError

if TYPE_CHECKING:  # imported where used: these take 60 ms and more, and every command imports this
    import numpy as np
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**20
BUILT_IN = ("gpt2", "char", "byte")  # build_tokenizer takes any other name as a path

_BPE_FILE = Path(__file__).parent / "gpt2_bpe" / "vocab.bpe.gz"
_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's rule for cutting text into words. What needs no look-ahead is in one group, which tiktoken passes to
# its faster regex engine: 1.4 times as fast as tiktoken's own pattern.
_GPT2_WORDS = r"(?:'(?:s|t|re|ve|m|ll|d)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+$)|\s+(?!\S)|\s"
# tiktoken's regex engine panics on a million whitespace characters in a row (Unicode's, not Python's \s).
_LONG_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}")
_LONG_TEXT = 500_000


class Tokenizer(ABC):
    """Text to ids and back. `kind` is "gpt2", "char", "byte" or "custom"; ids are below `vocab_size`."""

    kind: str
    vocab_size: int  # end-of-text included
    eot_id: int
    eot_token: str = END_OF_TEXT
    # Where a text may be cut without changing its ids; "words": where GPT-2's words end.
    safe_cut: Literal["anywhere", "words", "never"] = "anywhere"
    _known: Container[int]  # the ids that decode
    _other_ends: tuple[int, ...] = ()
    _other_special: Mapping[str, int] = {}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which a text ends: `eot_id`, and any others that the tokenizer's folder names."""
        return (self.eot_id, *self._other_ends)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that text never turns into, but in `encode_special`, and their ids."""
        return {self.eot_token: self.eot_id, **self._other_special}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never `eot_id`. Raises ValueError if the vocabulary cannot express it."""

    def encode_special(self, text: str) -> list[int]:
        """`encode`, but the name of a special token becomes that token."""
        special, parts = self.special_tokens, self._special_names.split(text)
        return [i for part in parts for i in ([special[part]] if part in special else self.encode(part))]

    def find_special(self, text: str) -> str | None:
        """The first name of a special token in `text`, which `encode` takes for ordinary text."""
        found = self._special_names.search(text)
        return found and found[0]

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        longest_first = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        return re.compile(f"({'|'.join(longest_first)})")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """`encode` of each text on one thread, for the processes that prepare large data.

        Arrays (n,) of integers in a dtype that suits the tokenizer. Raises ValueError as `encode`.
        """
        import numpy as np

        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: `eot_token` for `eot_id`, U+FFFD for bytes that are not UTF-8.

        Raises ValueError if an id is not in the vocabulary.
        """
        ids = list(map(operator.index, ids))
        if (wrong := next((i for i in ids if i not in self._known), None)) is not None:
            raise ValueError(f"token id {wrong} is not in this vocabulary of {self.vocab_size} ids")
        return self._decode(ids)

    def save(self, folder: Path, *, max_length: int) -> None:
        """Write tokenizer.json and tokenizer_config.json into the existing `folder`, not atomically.

        The `tokenizers` library and transformers' AutoTokenizer get the same ids from them. `max_length` is
        the model's context in tokens. Raises OSError.
        """
        gpt2 = self.kind == "gpt2"
        definition = self.definition()
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
        """By id, how many UTF-8 bytes of text it stands for, 0 for end-of-text; None if not known."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """`decode` of ids that are in the vocabulary."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
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
        """As uint32."""
        import numpy as np

        parts = [_safe_parts(well_formed(text)) for text in texts]
        arrays = [[self._bpe.encode_to_numpy(p, disallowed_special=()) for p in part] for part in parts]
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in arrays]

    def _decode(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    def definition(self) -> dict[str, Any]:
        return byte_level_json([*self._tokens, END_OF_TEXT], merges=self._merges, cut_words=True)


class _ByteTokenizer(Tokenizer):
    kind = "byte"
    vocab_size = 257
    eot_id = 256
    _known = range(vocab_size)
    _bytes = (*(bytes([i]) for i in range(256)), END_OF_TEXT.encode())

    def encode(self, text: str) -> list[int]:
        return list(well_formed(text).encode())

    def token_bytes(self) -> list[int]:
        return [1] * 256 + [0]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """As uint8."""
        import numpy as np

        return [np.frombuffer(well_formed(text).encode(), dtype=np.uint8) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def definition(self) -> dict[str, Any]:
        letters = map(_byte_letters().__getitem__, range(256))
        return byte_level_json([*letters, END_OF_TEXT], merges=[], cut_words=False)


class _CharTokenizer(Tokenizer):
    kind = "char"

    def __init__(self, text: str) -> None:
        self._tokens = [*sorted(set(well_formed(text))), END_OF_TEXT]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)
        self.eot_id = self.vocab_size - 1
        self._known = range(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        try:
            return list(map(self._ids.__getitem__, well_formed(text)))
        except KeyError as error:
            char = error.args[0]
        where = f"is not in this vocabulary of {self.eot_id} characters"
        remedy = "take it out, or train on text that has it, or with --tokenizer byte"
        raise InputError(f"the character {char!r} (U+{ord(char):04X}) {where}: {remedy}")

    def token_bytes(self) -> list[int]:
        return [*(len(token.encode()) for token in self._tokens[:-1]), 0]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """As uint32, by one table lookup for all characters."""
        import numpy as np

        table = np.full(0x110000, self.eot_id, dtype=np.uint32)  # end-of-text: no character of ours
        table[[ord(token) for token in self._tokens[:-1]]] = np.arange(self.eot_id, dtype=np.uint32)
        points = [np.frombuffer(well_formed(text).encode("utf-32-le"), dtype="<u4") for text in texts]
        arrays = [table[one] for one in points]
        for text, ids in zip(texts, arrays, strict=True):
            if (ids == self.eot_id).any():
                self.encode(text)  # raises and names the character
        return arrays

    def _decode(self, ids: list[int]) -> str:
        return "".join(map(self._tokens.__getitem__, ids))

    def definition(self) -> dict[str, Any]:
        # <unk> is not in the vocabulary, so that the library, too, refuses an unknown character.
        model = {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unk>"}
        each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return _tokenizer_json(model, pre_tokenizer=each, decoder={"type": "Fuse"}, eot_id=self.eot_id)


def build_tokenizer(name: str, *, text: str = "") -> Tokenizer:
    """The tokenizer of `--tokenizer`: "gpt2", "char" (the characters of `text`), "byte", or a path.

    Raises ValueError for another name; else as `char_tokenizer` and `load_tokenizer`.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "char":
        return char_tokenizer(text)
    if name == "byte":
        return byte_tokenizer()
    if name and os.path.exists(name):
        from fusedgpt.model.tokenizer_json import load_tokenizer  # which imports this file

        return load_tokenizer(Path(name))
    raise InputError(f"no tokenizer {name!r}: choose gpt2, char, byte or the path of a tokenizer.json")


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own 50,257 ids, by tiktoken; built once per process, from a file that fusedgpt installs.

    Raises RuntimeError if that file is missing or damaged.
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
    """Ids 0 .. n-1 are the sorted characters of `text`; n is end-of-text. Raises ValueError if empty."""
    if not text:
        raise InputError("a character tokenizer takes its characters from a text, and the text is empty")
    return _CharTokenizer(text)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 .. 255 are the bytes of UTF-8; 256 is end-of-text."""
    return _ByteTokenizer()


def byte_level_json(tokens: list[str], *, merges: list[str], cut_words: bool) -> dict[str, Any]:
    """The content of tokenizer.json for a byte-level BPE whose last token is end-of-text."""
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


def well_formed(text: str) -> str:
    """`text` with surrogate pairs as the characters they encode, and lone surrogates as U+FFFD."""
    if text.isascii():  # Python knows this in O(1)
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _safe_parts(text: str) -> list[str]:
    """`text` in parts that tiktoken does not panic on, with the ids of the whole.

    GPT-2's words leave the last of several spaces to the word that follows, so one always ends there.
    """
    if len(text) <= _LONG_TEXT:
        return [text]
    cuts = [m.end() - 1 for m in _LONG_SPACES.finditer(text) if m.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

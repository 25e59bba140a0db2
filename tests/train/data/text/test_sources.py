"""Files, folders and streams to documents; what cannot be read is one clear line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.model.tokenizer import byte_tokenizer, gpt2_tokenizer
from fusedgpt.train.data.text import sources
from fusedgpt.train.data.text.sources import DataError, Source, cut_again, last_word_end

# What GPT-2's words are cut by, and where they are not: runs of spaces, contractions, controls, ideographs.
text_of_all_kinds = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.sampled_from(
            [" ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "\x1c", "\x85", "\u3000", "\x00", "\x1b["]
        ),
        st.sampled_from(
            ["'s", "don't", "'", "7", "1.5", "!", "猫。", "犬、", "😀", "👩‍👩‍👧‍👦", "e\u0301", "ㇰ", "ー"]
        ),
    ),
    max_size=30,
).map("".join)


def texts(*inputs: Path, **options: Any) -> list[str]:
    """The documents, whole."""
    documents = [""]
    for text, ends in Source(inputs=inputs, **options):
        documents[-1] += text
        documents += [""] * ends
    assert documents.pop() == ""
    return documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Where a text may be cut


@given(text_of_all_kinds, text_of_all_kinds, st.booleans())
@settings(max_examples=300, deadline=None)
def test_ids_of_both_parts_are_those_of_the_whole(a: str, b: str, space: bool) -> None:
    text = f"{a} {b}" if space else a + b
    place = last_word_end(text)
    gpt2 = gpt2_tokenizer()
    assert gpt2.encode(text[:place]) + gpt2.encode(text[place:]) == gpt2.encode(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one two", 3),
        ("one\ntwo x", 3),
        ("a  b", 1),
        ("a \n b", 1),
        ("  ab", 0),
        ("ab", 0),
        ("", 0),
        ("猫。犬、x", 3),
        ("猫犬", 0),
        ("猫、犬犬", 1),
    ],
)
def test_a_cut_is_before_a_space_that_follows_a_word(text: str, place: int) -> None:
    assert last_word_end(text) == place


@given(st.lists(text_of_all_kinds.filter(bool)), st.sampled_from(["anywhere", "words", "never"]))
@settings(max_examples=200, deadline=None)
def test_cutting_again_loses_nothing(blocks: list[str], cut: sources.Cut) -> None:
    pieces = list(cut_again(iter(blocks), cut))
    parts = [text for text, _ in pieces]
    assert [ends for _, ends in pieces] == [False] * (len(parts) - 1) + [True]
    assert "".join(parts) == "".join(blocks)
    assert all(parts) or parts == [""]
    if cut == "never":
        assert len(parts) == 1
    if cut == "words":
        gpt2 = gpt2_tokenizer()
        assert [i for part in parts for i in gpt2.encode(part)] == gpt2.encode("".join(blocks))


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("cut", ["anywhere", "words", "never"])
def test_a_text_file_in_blocks_is_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, cut: sources.Cut
) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block_bytes)
    text = "Zoë's 猫 sat。\n\n  It😀 rained\r\n" * 4
    file = write(tmp_path / "a.txt", "\ufeff" + text if block_bytes > 3 else text)
    pieces = list(Source(inputs=(file,), cut=cut))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (len(pieces) == 1) == (cut == "never" or (cut == "words" and block_bytes == 1))


# Which files


def test_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.TXT", "sub/c.md", "sub.md", "d.bin", "e.log"):
        write(tmp_path / name, name)
    write(tmp_path / "z.jsonl", '{"text": "z"}\n')
    assert texts(tmp_path) == ["a.TXT", "b.txt", "sub/c.md", "sub.md", "z"]
    assert texts(tmp_path / "e.log", tmp_path / "sub") == ["e.log", "sub/c.md"]  # a file named is read


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.txt", "a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one").symlink_to(tmp_path / "data")
    (tmp_path / "in" / "two").symlink_to(tmp_path / "data")
    assert texts(tmp_path / "in") == ["a", "a"]
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match="is a symlink loop"):
        texts(tmp_path / "in")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    with pytest.raises(DataError, match=r"self\.txt: Too many levels of symbolic links"):
        texts(tmp_path / "self.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"broken\.txt is a symbolic link to nothing"):
        texts(tmp_path / "broken.txt")


def test_missing_and_empty_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent"):
        texts(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no .txt, .md, .jsonl, .ndjson or .parquet files"):
        texts(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        texts(tmp_path / ("x" * 3000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a").chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        texts(tmp_path)


def test_blank_documents_are_none(tmp_path: Path) -> None:
    for name, text in {"a.txt": "", "b.txt": " \n", "c.txt": "c"}.items():
        write(tmp_path / name, text)
    write(tmp_path / "d.jsonl", '{"text": " "}\n\n \n{"text": "d"}')
    assert texts(tmp_path) == ["c", "d"]


def test_blank_ends_of_a_document_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 4)
    write(tmp_path / "a.txt", "    \n   ab     \n\n    ")
    assert texts(tmp_path, cut="words") == texts(tmp_path, cut="anywhere") == ["    \n   ab     \n\n    "]


def test_bytes_read_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x" * 700_000)
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "b"}\n' * 1000))
    told: list[int] = []
    source = Source(inputs=(tmp_path,), on_bytes=told.append, cut="anywhere")
    assert len(list(source)) > 1000
    assert sum(told) == source.size == sum(f.stat().st_size for f in tmp_path.iterdir())


# Text


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\ufeffé\r\nx\n")) == ["é\r\nx\n"]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "é\\r\\n"}\r\n')) == ["é\r\n"]


@pytest.mark.parametrize("block_bytes", [1, 2, 100])
@pytest.mark.parametrize(
    ("content", "place"),
    [(b"abc\xffd", 3), ("é".encode() * 9 + b"\xc3", 18), (b"\xef\xbb\xbfab\xe7\x8cc", 5)],
)
def test_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, place: int, block_bytes: int
) -> None:
    if not content.startswith(b"\xef") or block_bytes > 2:
        monkeypatch.setattr(sources, "_BLOCK_BYTES", block_bytes)
    file = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=rf"a\.txt is not UTF-8 text \(byte {place}\).*--errors replace"):
        texts(file)
    plain = content.removeprefix(b"\xef\xbb\xbf")
    assert texts(file, errors="replace") == [plain.decode(errors="replace")]
    assert texts(file, errors="ignore") == [plain.decode(errors="ignore")]


@pytest.mark.parametrize("errors", ["strict", "replace", "ignore"])
def test_binary_files_are_refused(tmp_path: Path, errors: sources.Errors) -> None:
    with pytest.raises(DataError, match=r"a\.txt is a binary file \(byte 4 is zero\).*leave it out"):
        texts(write(tmp_path / "a.txt", b"\x7fELF\0\1"), errors=errors)
    with pytest.raises(DataError, match=r"b\.jsonl is a binary file"):
        texts(write(tmp_path / "b.jsonl", b"PK\0"), errors=errors)
    with pytest.raises(DataError, match=r"c\.txt is UTF-16.*iconv"):
        texts(write(tmp_path / "c.txt", "text".encode("utf-16")), errors=errors)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO("é one\ntwo".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stream)
    assert texts(Path("-")) == ["é one\ntwo"]
    assert not stream.closed
    assert Source(inputs=(Path("-"),)).read_once == Path("-")


# Lines


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    wanted = ["one", "zwei ü 猫 😀", "three\nlines\n", "\ud800"]
    raw = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in wanted).encode()
    if suffix.endswith(".gz"):
        raw = gzip.compress(raw[:50]) + gzip.compress(raw[50:])
    if suffix.endswith(".zst"):
        pyarrow = pytest.importorskip("pyarrow")
        raw = b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (raw[:50], raw[50:]))
    assert texts(write(tmp_path / f"a{suffix}", raw)) == wanted


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"body": "x", "id": 3}',
            r"line 3 has no field 'text' \(it has: body, id\); name .* with --text-field",
        ),
        ('{"text": null}', "line 3: the field 'text' is not text but NoneType"),
        ('{"text": ["x"]}', "line 3: the field 'text' is not text but list"),
        ('["text"]', "line 3 is not a JSON object with a field 'text'"),
        ("text", "line 3 is not JSON: Expecting value"),
        ('{"text": "x"', "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        (b'{"text": "\xff"}', r"line 3 is not UTF-8 text \(byte 10\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = b'{"text": "a"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}") as caught:
        texts(write(tmp_path / "a.jsonl", raw))
    assert "\n" not in str(caught.value)


def test_the_text_field_has_a_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"body": "x", "text": 5}\n')
    assert texts(file, text_field="body") == ["x"]
    bad = write(tmp_path / "b.jsonl", b'{"text": "a\xffb"}\n')
    assert texts(bad, errors="replace") == ["a\ufffdb"]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b'{"text": "a"}\n' * 99)[:-9], b"no gzip", b"\x1f\x8b\x08" + b"x" * 40],
    ids=["cut", "no gzip", "no deflate"],  # gzip's header holds the time, and the workers must agree on names
)
def test_damaged_compressed_files_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged: "):
        texts(write(tmp_path / "a.jsonl.gz", content))


# Tables


def table(path: Path, values: list[Any], kind: str = "string", **other: list[Any]) -> Path:
    pa = pytest.importorskip("pyarrow")
    columns = {**other, "text": pa.array(values, getattr(pa, kind)())}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        __import__("pyarrow.parquet").parquet.write_table(pa.table(columns), path, row_group_size=300)
    else:
        with pa.ipc.new_stream(path, pa.table(columns).schema) as writer:
            writer.write_table(pa.table(columns))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_row_is_a_document(tmp_path: Path, suffix: str, kind: str) -> None:
    wanted = [f"row {i} 猫" for i in range(1000)]
    file = table(tmp_path / f"a{suffix}", wanted, kind, id=list(range(1000)))
    told: list[int] = []
    assert texts(file, on_bytes=told.append) == wanted
    assert sum(told) == file.stat().st_size
    with pytest.raises(DataError, match=rf"a\{suffix} has no field 'body' \(it has: id, text\)"):
        texts(file, text_field="body")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet, row 1: the field 'text' is not text but NoneType"):
        texts(table(tmp_path / "a.parquet", ["x", None]))
    with pytest.raises(DataError, match=r"a\.parquet, row 0: the field 'text' is not text but int"):
        texts(table(tmp_path / "a.parquet", [1], "int32"))
    pa = pytest.importorskip("pyarrow")
    raw = pa.array([b"ok", b"a\xff"], pa.binary()).view(pa.string())
    with pa.ipc.new_stream(tmp_path / "b.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": raw}))
    with pytest.raises(DataError, match=r"b\.arrow, row 1 is not UTF-8 text \(byte 1\)"):
        texts(tmp_path / "b.arrow")
    assert texts(tmp_path / "b.arrow", errors="ignore") == ["ok", "a"]
    for suffix in ("parquet", "arrow"):
        with pytest.raises(DataError, match=rf"cannot read .*c\.{suffix}: "):
            texts(write(tmp_path / f"c.{suffix}", b"PAR1 no table" * 9))


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    table(tmp_path / "one" / "data-00000-of-00002.arrow", ["a", "b"])
    table(tmp_path / "one" / "data-00001-of-00002.arrow", ["c"])
    write(tmp_path / "one" / "state.json", "{}")
    write(tmp_path / "one" / "README.md", "no data")
    assert texts(tmp_path / "one") == ["a", "b", "c"]
    for split in ("test", "train"):
        table(tmp_path / "all" / split / "data-00000-of-00001.arrow", [split])
        write(tmp_path / "all" / split / "state.json", "{}")
    write(tmp_path / "all" / "dataset_dict.json", '{"splits": ["test", "train"]}')
    assert texts(tmp_path / "all") == ["train"]
    assert texts(tmp_path / "all" / "test") == ["test"]


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for name in ("a.parquet", "a.arrow", "a.txt.zst"):
        with pytest.raises(
            DataError, match=rf"{name} takes the package pyarrow: .* -m pip install 'fusedgpt\[parquet\]'"
        ):
            texts(write(tmp_path / name, b"x"))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    def file(content: str) -> Path:
        raw = content.encode()
        return write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)

    records = [{"text": "one\n[{", "id": 1}, {"text": " "}, {"text": "é" * 9000}]
    wanted = ["one\n[{", "é" * 9000]
    assert texts(file("\n".join(map(json.dumps, records)))) == wanted
    assert texts(file("\ufeff \n" + json.dumps(records, indent=1, ensure_ascii=False))) == wanted
    for content, message in (
        ('[{"text": "a"}, {"body": "b"}]', r"a.json.*, record 2 has no field 'text' \(it has: body\)"),
        ('["a"]', r"record 1 is not a JSON object with a field 'text'"),
        ('[{"text": "a"}', "a.json.* is not JSON"),
        ('{\n "text": "a"\n}', "line 1 is not JSON"),
    ):
        with pytest.raises(DataError, match=message):
            texts(file(content))


def test_columns_of_csv_and_tsv(tmp_path: Path) -> None:
    rows = [["id", "text"], ["1", 'a "quoted", text\nof two lines'], ["2", " "], ["3", "é" * 200_000]]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")):
        made = io.StringIO(newline="")
        csv.writer(made, delimiter=delimiter).writerows(rows)
        raw = b"\xef\xbb\xbf" + made.getvalue().encode()
        file = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
        assert texts(file) == ['a "quoted", text\nof two lines', "é" * 200_000]
        assert texts(file, text_field="id") == ["1", "2", "3"]
        with pytest.raises(DataError, match=rf"{name} has no field 'body' \(it has: id, text\)"):
            texts(file, text_field="body")
    with pytest.raises(DataError, match=r"a\.csv, line 3: the field 'text' is not text but NoneType"):
        texts(write(tmp_path / "a.csv", "id,text\n1,a\n2\n"))
    latin = write(tmp_path / "a.csv", b"id,text\n1,caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv.* is not UTF-8 text"):
        texts(latin)
    assert texts(latin, errors="ignore") == ["caf"]


# Anything


@pytest.mark.parametrize("count", [400, pytest.param(25_000, marks=pytest.mark.soak)])
def test_hostile_files_end_in_documents_or_a_data_error(tmp_path: Path, count: int) -> None:
    beginnings = {
        "a.jsonl": b'{"text": "',
        "a.jsonl.gz": gzip.compress(b'{"text": "a"}\n')[:-8],
        "a.parquet": b"PAR1",
    }
    names = st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.md.zst"])

    @given(st.binary(max_size=60), names, st.booleans(), st.sampled_from(["strict", "replace"]))
    @settings(max_examples=count, deadline=None)
    def check(raw: bytes, name: str, begun: bool, errors: sources.Errors) -> None:
        file = write(tmp_path / name, beginnings.get(name, b"") + raw if begun else raw)
        with suppress(DataError):
            assert all(byte_tokenizer().encode(text) for text in texts(file, errors=errors))

    check()


@pytest.mark.parametrize("count", [400, pytest.param(25_000, marks=pytest.mark.soak)])
def test_hostile_lines_end_in_documents_or_a_data_error(tmp_path: Path, count: int) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner),
        max_leaves=4,
    )

    @given(st.lists(values | st.fixed_dictionaries({"text": values}), max_size=3), st.integers(0, 9))
    @settings(max_examples=count, deadline=None)
    def check(records: list[Any], cut: int) -> None:
        raw = "\n".join(map(json.dumps, records)).encode()
        file = write(tmp_path / "a.jsonl", raw[: len(raw) - cut])
        with suppress(DataError):
            assert all(byte_tokenizer().encode(text) for text in texts(file))

    check()

"""Token sets on disk: written shard by shard, read as one stream, and never trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.model.tokenizer import byte_tokenizer, char_tokenizer
from fusedgpt.train.data.text.encode import Encoded, Ids
from fusedgpt.train.data.text.sources import DataError
from fusedgpt.train.data.tokens import shards
from fusedgpt.train.data.tokens.shard_writer import TokenSetWriter, _StreamWriter, new_set_folder
from fusedgpt.train.data.tokens.shards import Part, TokenStream, file_hash, open_stream, read_index

DOCUMENTS = [list(b"first"), list(b"2"), list(b"the third document"), list(b"4"), list(b"five")]


def encoded(train: Any = (), val: Any = ()) -> Encoded:
    """A chunk with one document for each stream that has ids."""
    streams = [
        Ids(np.array(ids, dtype=np.uint16), np.array([len(ids)] * bool(len(ids)))) for ids in (train, val)
    ]
    return Encoded(*streams, text_bytes=0)


def make_set(out: Path, *, shard_tokens: int = 10, val: tuple[int, ...] = (1,)) -> Path:
    """A byte-level set of DOCUMENTS, those numbered in `val` held out."""
    with new_set_folder(out) as folder:
        writer = TokenSetWriter(folder, byte_tokenizer(), shard_tokens)
        for i, document in enumerate(DOCUMENTS):
            writer.append(encoded(**{"val" if i in val else "train": [*document, 256]}))
        writer.finish()
    return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("set") / "out")


def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def open_set(folder: Path) -> list[Any]:
    index = read_index(folder)
    return [open_stream(folder, index, split) for split in shards.SPLITS]


def edit_index(folder: Path, *path: str | int, value: object) -> None:
    file = folder / "index.json"
    index = json.loads(file.read_text())
    inner = index
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(index))


def rehash(folder: Path, name: str) -> None:
    """Make the index agree with a changed file."""
    file = folder / "index.json"
    index = json.loads(file.read_text())
    for split in ("train", "val"):
        for entry in (*index[split]["shards"], index[split]["document_ends"]):
            if entry["file"] == name:
                entry["sha256"] = file_hash(folder / name)
    file.write_text(json.dumps(index))


# Writing


def test_a_set_is_its_documents(sound: Path) -> None:
    (train, train_ends), (val, val_ends) = open_set(sound)
    wanted = [[*d, 256] for i, d in enumerate(DOCUMENTS) if i != 1]
    begins = [0, *train_ends[:-1].tolist()]
    assert [train[a:b].tolist() for a, b in zip(begins, train_ends.tolist(), strict=True)] == wanted
    assert (val[:].tolist(), val_ends.tolist()) == ([ord("2"), 256], [2])
    files = {"index.json", "tokenizer.json", "tokenizer_config.json", "val-00000.bin", "val.documents.bin"}
    numbered = {f"train-{i:05d}.bin" for i in range(4)}
    assert {f.name for f in sound.iterdir()} == files | numbered | {"train.documents.bin"}
    assert [f.stat().st_size for f in sorted(sound.glob("train-*"))] == [20, 20, 20, 4]


def test_an_index_says_it_all(sound: Path) -> None:
    index = read_index(sound)
    assert (index.format, index.version, index.dtype, index.tokenizer) == (
        "fusedgpt-tokens",
        1,
        "uint16",
        "byte",
    )
    assert (index.vocab_size, index.eot_id, index.train.tokens, index.train.documents) == (257, 256, 32, 4)
    hashes = [file_hash(sound / entry.file) for entry in index.train.shards]
    assert [entry.sha256 for entry in index.train.shards] == hashes


@pytest.mark.parametrize("cut", range(1, 36))
def test_a_stream_is_cut_anywhere(tmp_path: Path, cut: int) -> None:
    ids, ends = np.arange(36, dtype=np.uint16), np.array([5, 6, 20, 36])
    writer = _StreamWriter(tmp_path, "train", np.dtype("<u2"), 7)
    writer.append(ids[:11], ends[:2])
    writer.append(ids[11:], ends[2:] - 11)
    tail = [(a.tolist(), e.tolist()) for a, e in writer.blocks(cut)]
    writer.truncate(cut)
    entry = writer.entry()
    assert tail == [(list(range(cut, 36)), [int(e) - cut for e in ends if e > cut])]
    assert (entry.tokens, entry.documents) == (cut, len({*(e for e in ends.tolist() if e < cut), cut}))
    parts = [np.fromfile(tmp_path / shard.file, dtype="<u2") for shard in entry.shards]
    assert all(map(len, parts))
    assert np.concatenate(parts).tolist() == list(range(cut))
    assert {f.name for f in tmp_path.glob("train-*")} == {shard.file for shard in entry.shards}
    for file in (*entry.shards, entry.document_ends):
        assert file_hash(tmp_path / file.file) == file.sha256
    assert np.fromfile(tmp_path / "train.documents.bin", "<u8").tolist() == sorted(
        {*(e for e in ends.tolist() if e < cut), cut}
    )


@pytest.mark.parametrize(
    ("held_out", "balanced"), [(1, True), (4, True), (5, False), (20, False), (21, True), (90, True)]
)
def test_a_share_that_is_far_off_is_cut_from_the_end(tmp_path: Path, held_out: int, balanced: bool) -> None:
    with new_set_folder(tmp_path / "out") as folder:
        writer = TokenSetWriter(folder, byte_tokenizer(), 30)
        writer.append(encoded(range(100 - held_out), range(100 - held_out, 100)))
        writer.balance(0.1)
        index = writer.finish()
    assert index.val.tokens == (10 if balanced else held_out)
    (train, train_ends), (val, val_ends) = open_set(tmp_path / "out")
    assert [*train[:].tolist(), *val[:].tolist()] == list(range(100))
    assert (train_ends[-1], val_ends[-1]) == (len(train), len(val))


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_set_folder(tmp_path / "deep" / "out") as folder:
        (folder / "train-00000.bin").write_bytes(bytes(1 // (not folder.exists())))
    assert not list((tmp_path / "deep").iterdir())


def test_what_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OSError, match="out exists already"), new_set_folder(tmp_path / "out"):
        pytest.fail("it began")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with new_set_folder(tmp_path / "out") as folder:
        (folder / "train-00000.bin").write_bytes(b"half")
        with pytest.raises(OSError, match="another process is writing"), new_set_folder(tmp_path / "out"):
            pass
        assert (folder / "train-00000.bin").exists()
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["train-00000.bin"]


def test_a_link_in_place_of_the_hidden_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.out\.partial is a symbolic link"), new_set_folder(tmp_path / "out"):
        pass


# Reading a stream


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(-3, 30), st.integers(-3, 30))
@settings(max_examples=200, deadline=None)
def test_a_stream_reads_like_an_array(lengths: list[int], start: int, stop: int) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    parts = np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []
    stream = TokenStream([Part(ids, vocab_size=len(whole) + 1) for ids in parts])
    assert len(stream) == len(whole)
    assert stream[start:stop].tolist() == whole[start:stop].tolist()
    assert stream[:].tolist() == whole.tolist()
    a, b = sorted((min(max(start, 0), len(whole)), min(max(stop, 0), len(whole))))
    piece = stream.cut(a, b)
    assert (len(piece), piece[:].tolist()) == (b - a, whole[a:b].tolist())
    both = TokenStream.join([stream, piece])
    assert both[start:stop].tolist() == np.concatenate((whole, whole[a:b]))[start:stop].tolist()


def test_a_stream_has_no_steps() -> None:
    with pytest.raises(ValueError, match="a step of 1, not 2"):
        TokenStream([Part(np.arange(4))])[::2]


def test_an_id_outside_the_vocabulary_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TokenStream([Part(np.arange(10), "a.bin", 50), Part(np.array([1, 2, 99, 3]), "b.bin", 50)])
    assert stream[:12].tolist() == [*range(10), 1, 2]
    for read in (stream, TokenStream.join([stream]), stream.cut(0, 14)):
        with pytest.raises(DataError, match=r"b\.bin: token 2 is id 99, outside the vocabulary of 50"):
            read[11:14]
    with pytest.raises(DataError, match=r"b\.bin: token 2 is id 99"):
        stream.cut(11, 14)[:]
    with pytest.raises(DataError, match="token 2 is id 99"):
        stream.check_ids()
    monkeypatch.setattr(shards, "_CHECKED_ON_OPENING", 12)
    stream.check_ids()


def test_offsets_are_wide(tmp_path: Path) -> None:
    """A sparse shard of 5 billion tokens: nothing of it is read but what is asked for."""
    n = 5 * 10**9
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * n)
        file.seek(2 * (n - 3))
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes())
    stream = TokenStream([Part(shards.map_file(tmp_path / "big.bin", n, np.dtype("<u2")), vocab_size=10)])
    assert stream[n - 4 :].tolist() == [0, 7, 8, 9]
    assert stream.cut(n - 2, n)[:].tolist() == [8, 9]


# Damage


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00003.bin", "val.documents.bin"])
@pytest.mark.parametrize("change", ["cut", "longer", "bit", "missing"])
def test_a_damaged_file_is_named(sound: Path, tmp_path: Path, name: str, change: str) -> None:
    folder = damaged(sound, tmp_path)
    raw = bytearray((folder / name).read_bytes())
    changed = {"cut": raw[:-1], "longer": raw + b"\0", "bit": bytes([raw[0] ^ 1]) + raw[1:], "missing": b""}
    (folder / name).write_bytes(changed[change])
    if change == "missing":
        (folder / name).unlink()
    said = {"bit": "is damaged, its SHA-256 is another", "missing": "cannot read"}.get(change, "instead of")
    with pytest.raises(DataError, match=said) as caught:
        open_set(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_are_checked_even_where_the_hash_agrees(sound: Path, tmp_path: Path) -> None:
    folder = damaged(sound, tmp_path)
    ids = np.fromfile(folder / "train-00002.bin", "<u2")
    ids[4] = 257
    ids.tofile(folder / "train-00002.bin")
    rehash(folder, "train-00002.bin")
    with pytest.raises(
        DataError, match=r"train-00002\.bin: token 4 is id 257, outside the vocabulary of 257"
    ):
        open_set(folder)


@pytest.mark.parametrize("ends", [[25, 6, 27, 32], [6, 6, 27, 32], [6, 25, 27, 31], [6, 25, 27, 2**63]])
def test_document_ends_are_checked(sound: Path, tmp_path: Path, ends: list[int]) -> None:
    folder = damaged(sound, tmp_path)
    np.array(ends, dtype="<u8").tofile(folder / "train.documents.bin")
    rehash(folder, "train.documents.bin")
    with pytest.raises(DataError, match=r"train\.documents\.bin is damaged"):
        open_set(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version"),
        (("format",), "other", "format"),
        (("train", "tokens"), 33, "inconsistent in 'train'"),
        (("train", "documents"), 5, "inconsistent"),
        (("val", "tokens"), -1, "tokens"),
        (("vocab_size",), 70_000, "uint16 does not go with a vocabulary of 70000"),
        (("train", "shards", 0, "file"), "../../etc/passwd", "file"),
        (("train", "shards", 0, "file"), "train-00001.bin", "inconsistent"),
        (("train", "shards", 0, "sha256"), "x", "sha256"),
        (("train", "shards"), [], "inconsistent"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_an_index_at_odds_is_refused(
    sound: Path, tmp_path: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    folder = damaged(sound, tmp_path)
    edit_index(folder, *path, value=value)
    with pytest.raises(DataError, match=message) as caught:
        open_set(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"is not a token set: cannot read .*index\.json: No such file"):
        read_index(tmp_path)
    for raw in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"9" * 5000):
        (tmp_path / "index.json").write_bytes(raw)
        with pytest.raises(DataError, match=r"index\.json is not the index of a token set"):
            read_index(tmp_path)
    monkeypatch.setattr(shards, "_MAX_INDEX_BYTES", 100)
    with pytest.raises(DataError, match="over 100 bytes"):
        read_index(tmp_path)


hostile = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.just([])
    | st.just({})
)


@pytest.mark.parametrize("count", [300, pytest.param(30_000, marks=pytest.mark.soak)])
def test_hostile_sets_end_in_a_data_error_or_tokens(sound: Path, tmp_path: Path, count: int) -> None:
    folder = tmp_path / "hostile"

    @given(choose=st.data())
    @settings(max_examples=count, deadline=None)
    def check(choose: st.DataObject) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        (spoil_bytes if choose.draw(st.booleans()) else spoil_index)(folder, choose)
        said = ""
        try:
            assert all(int(stream[:].max()) < 70_000 for stream, _ in open_set(folder) if len(stream))
        except DataError as error:
            said = str(error)
        assert "\n" not in said

    check()


def spoil_bytes(folder: Path, choose: st.DataObject) -> None:
    """Change, cut or lengthen a file, and perhaps the index with it."""
    name = choose.draw(st.sampled_from(sorted(f.name for f in folder.glob("*.bin"))))
    raw = bytearray((folder / name).read_bytes())
    raw[choose.draw(st.integers(0, len(raw) - 1))] ^= choose.draw(st.integers(1, 255))
    end = choose.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    (folder / name).write_bytes(raw[:end] + choose.draw(st.just(b"") | st.binary(max_size=9)))
    if choose.draw(st.booleans()):
        rehash(folder, name)


def spoil_index(folder: Path, choose: st.DataObject) -> None:
    """Put something else at a place in the index."""
    inner = json.loads((folder / "index.json").read_text())
    path: list[str | int] = []
    while isinstance(inner, dict | list) and inner and (not path or choose.draw(st.integers(0, 3))):
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
        path.append(choose.draw(st.sampled_from(keys)))
        inner = inner[path[-1]]
    edit_index(folder, *path, value=choose.draw(hostile))


def test_a_char_set_is_narrow(tmp_path: Path) -> None:
    with new_set_folder(tmp_path / "out") as folder:
        writer = TokenSetWriter(folder, char_tokenizer("ab"), 10)
        writer.append(encoded([0, 1, 2]))
        index = writer.finish()
    assert (index.dtype, index.val.tokens, index.val.shards) == ("uint16", 0, ())
    assert [len(stream) for stream, _ in open_set(tmp_path / "out")] == [3, 0]

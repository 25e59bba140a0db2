"""Text to token sets: the ids of the whole text, whatever the workers; all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from fusedgpt.model.tokenizer import byte_tokenizer, gpt2_tokenizer
from fusedgpt.model.tokenizer_json import load_tokenizer
from fusedgpt.train.cli import prepare as cli_prepare
from fusedgpt.train.data.text import encode, sources
from fusedgpt.train.data.text.encode import chunked, encode_chunk, is_held_out
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.data.text.sources import DataError, Source
from fusedgpt.train.data.text.tokenizer_training import train_tokenizer
from fusedgpt.train.data.tokens import shard_writer, shards
from fusedgpt.train.report import terminal

FUSEDGPT = Path(sys.executable).with_name("fusedgpt")
SHAKESPEARE = Path(__file__).parents[5] / "shared" / "data" / "tinyshakespeare.txt"
EOT = 50256
MIXED = "Zoë's 猫 sat。\n\n  It's 3.14 😀👩‍👩‍👧‍👦 \x1b[0m\x85 rained\r\n\tдождь שלום مرحبا ไทย\u3000 don't "


@cache
def tiktoken_encoding() -> tiktoken.Encoding:
    """tiktoken with its own pattern on our vocabulary: its download of the same is not for tests."""
    ranks = gpt2_tokenizer()._bpe._mergeable_ranks  # type: ignore[attr-defined]
    special = {"<|endoftext|>": EOT}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def tiktoken_ids(text: str) -> list[int]:
    return tiktoken_encoding().encode_ordinary(text)


def ids_of(folder: Path, split: str) -> list[int]:
    index = shards.read_index(folder)
    stream, _ = shards.open_stream(folder, index, split)
    found: list[int] = stream[:].tolist()
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def many_documents(folder: Path, n: int = 300) -> Path:
    """A JSON line file of documents of some 40 tokens, and a longer text."""
    lines = [json.dumps({"text": f"Document {i}: {MIXED}" * (1 + i % 3)}) for i in range(n)]
    (folder / "in").mkdir()
    (folder / "in" / "lines.jsonl").write_text("\n".join(lines))
    (folder / "in" / "long.txt").write_text(MIXED * 400, encoding="utf-8")
    return folder / "in"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks so small that every text is in many."""
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 3000)


# Ids


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the text is not in the repository")
def test_tiny_shakespeare_has_the_ids_of_tiktoken(tmp_path: Path) -> None:
    prepare([SHAKESPEARE], tmp_path / "out", val_fraction=0.1, workers=2)
    whole = [*tiktoken_ids(SHAKESPEARE.read_text(encoding="utf-8")), EOT]
    train, val = (ids_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == whole
    assert len(val) == round(len(whole) / 10)


words = st.sampled_from(
    [" ", "\n", "  \n", "\t", "'s", "'", "7", "!", "猫。", "😀", "\x00", "\x1b[1m", "\u200d", "é", "e\u0301"]
)


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"])) | st.lists(words, max_size=40).map("".join),
        max_size=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_of_tiktoken(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    file.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    there = [text for text in texts if text and not text.isspace()]
    chunks = list(chunked(sources.Source(inputs=(file,)), 0.0)) or [[]]
    encoded = encode_chunk(gpt2_tokenizer(), chunks[0])
    assert encoded.train.ids.tolist() == [i for text in there for i in (*tiktoken_ids(text), EOT)]
    assert len(encoded.train.document_ends) == len(there)
    assert encoded.text_bytes == sum(len(text.encode()) for text in there)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char", "trained", "prefix"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tmp_path: Path, tokenizer: str) -> None:
    text = MIXED * 150 + " " * 5000 + MIXED + "x" * 3000 + "\n" * 2500
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    name = tokenizer
    if tokenizer in ("trained", "prefix"):
        trained = train_tokenizer([sources.Piece(MIXED * 9, True)], 300)
        trained.save(tmp_path, max_length=64)
        file = tmp_path / "tokenizer.json"
        definition = json.loads(file.read_text(encoding="utf-8"))
        definition["pre_tokenizer"]["add_prefix_space"] = tokenizer == "prefix"
        file.write_text(json.dumps(definition))
        name = str(file)
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=name, val_fraction=0.0, workers=1)
    made_with = load_tokenizer(tmp_path / "out")
    assert ids_of(tmp_path / "out", "train") == [*made_with.encode(text), made_with.eot_id]
    assert made_with.kind == (tokenizer if tokenizer in ("gpt2", "byte", "char") else "custom")


def test_tokenizers_that_look_past_words_get_whole_texts(tmp_path: Path) -> None:
    train_tokenizer([sources.Piece(MIXED, True)], 300).save(tmp_path, max_length=64)
    file = tmp_path / "tokenizer.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    assert load_tokenizer(file).safe_cut == "words"
    token = {"id": 301, "content": "It's 3", "special": False, "single_word": False}
    token |= dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**plain["pre_tokenizer"], "use_regex": False}},
        {"pre_tokenizer": {**plain["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": None},
        {"added_tokens": [*plain["added_tokens"], token]},
        {"added_tokens": [*plain["added_tokens"], {**token, "content": "q", "lstrip": True}]},
    ):
        file.write_text(json.dumps(plain | change))
        assert load_tokenizer(file).safe_cut == "never", change


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char"])
def test_arrays_are_the_ids(kind: str) -> None:
    from fusedgpt.model.tokenizer import build_tokenizer

    texts = [MIXED, "", "\ufffd<|endoftext|>", "a"]
    tokenizer = build_tokenizer(kind, text="".join(texts))
    arrays = tokenizer.encode_arrays([*texts, "\ud800"])
    assert [a.tolist() for a in arrays] == [tokenizer.encode(text) for text in [*texts, "\ud800"]]
    if kind == "char":
        with pytest.raises(ValueError, match=r"'Q' \(U\+0051\) is not in this vocabulary"):
            tokenizer.encode_arrays(["a", "Q"])


def test_white_space_without_end_does_not_panic() -> None:
    text = "a" + "\n" * 1_000_100 + "x"
    chunk = [(text, True, False), ("b", True, True)]
    encoded = encode_chunk(gpt2_tokenizer(), chunk)
    assert encoded.train.ids.tolist() == [*gpt2_tokenizer().encode(text), EOT]
    assert (encoded.val.ids.tolist(), encoded.val.document_ends.tolist()) == ([65, EOT], [2])


# The set


@pytest.mark.usefixtures("small_pieces")
def test_the_set_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = many_documents(tmp_path)
    for workers in (1, 2, 3):
        prepare([source], tmp_path / str(workers), workers=workers, shard_tokens=5000)
    one, two, three = (content(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert one == two == three
    assert len(one) > 7  # several shards


def test_documents_keep_their_order_and_are_told_apart(tmp_path: Path) -> None:
    source = many_documents(tmp_path)
    index = prepare([source], tmp_path / "out", val_fraction=0.2, shard_tokens=1000)
    texts = [piece.text for piece in Source(inputs=(source,))]
    for split, held_out in (("train", False), ("val", True)):
        stream, ends = shards.open_stream(tmp_path / "out", index, split)
        wanted = [[*tiktoken_ids(t), EOT] for t in texts if is_held_out(t, 0.2) == held_out]
        begins = [0, *ends[:-1].tolist()]
        assert [stream[a:b].tolist() for a, b in zip(begins, ends.tolist(), strict=True)] == wanted
        assert getattr(index, split).documents == len(wanted)
    assert 0.1 < index.val.documents / len(texts) < 0.3
    raw = np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u2")  # what nanoGPT does
    assert raw.tolist() == ids_of(tmp_path / "out", "train")[:1000]


def test_the_same_text_is_on_one_side() -> None:
    texts = [f"text {i}" for i in range(3000)]
    drawn = [is_held_out(text, 0.1) for text in texts]
    assert drawn == [is_held_out(text, 0.1) for text in texts]
    assert 240 < sum(drawn) < 360
    assert all(is_held_out(text, 0.2) for text, held_out in zip(texts, drawn, strict=True) if held_out)
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_all_of_a_document_is_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_CHUNK_PIECES", 7)
    pieces = [sources.Piece(f"{document} {i}", i == 9) for document in range(40) for i in range(10)]
    drawn = [held_out for chunk in chunked(pieces, 0.3) for _, _, held_out in chunk]
    assert drawn == [is_held_out(f"{document} 0", 0.3) for document in range(40) for _ in range(10)]
    assert 20 < sum(drawn) < 250


@pytest.mark.parametrize("shard_tokens", [7, 90, 1000, 10**6])
@pytest.mark.parametrize("lengths", [[900], [5, 5, 900], [300, 300, 300], [900, 5]])
def test_few_documents_give_up_their_end(tmp_path: Path, lengths: list[int], shard_tokens: int) -> None:
    for i, length in enumerate(lengths):
        (tmp_path / f"{i}.txt").write_text(chr(97 + i) * length)
    index = prepare(
        [tmp_path], tmp_path / "out", tokenizer="byte", val_fraction=0.1, shard_tokens=shard_tokens
    )
    whole = [i for j, n in enumerate(lengths) for i in (*([97 + j] * n), 256)]
    train, val = (ids_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(whole)
    assert 0.05 * len(whole) <= len(val) <= 0.2 * len(whole)
    for split, ids in (("train", train), ("val", val)):
        ends = shards.open_stream(tmp_path / "out", index, split)[1].tolist()
        assert ends == sorted({*(i + 1 for i, token in enumerate(ids) if token == 256), len(ids)})


def test_wide_ids_for_a_wide_vocabulary(tmp_path: Path) -> None:
    assert (shards.token_dtype(2**16).itemsize, shards.token_dtype(2**16 + 1).itemsize) == (2, 4)
    vocab = {"<unk>": 0, "cat": 70_000, "</s>": 70_001}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    definition = {"version": "1.0", **parts, "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, "model": model}))
    (tmp_path / "a.txt").write_text("cat dog cat")
    index = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=str(tmp_path), val_fraction=0.0)
    assert index.dtype == "uint32"
    assert ids_of(tmp_path / "out", "train") == [70_000, 0, 70_000, 70_001]


def test_a_trained_tokenizer_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    source = many_documents(tmp_path)
    for name in ("one", "two"):
        index = prepare([source], tmp_path / name, vocab_size=400)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert (index.vocab_size, index.eot_id, index.tokenizer, index.dtype) == (400, 399, "custom", "uint16")
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.decode(tokenizer.encode(MIXED + "unseen ÿ")) == MIXED + "unseen ÿ"
    assert len(tokenizer.encode(MIXED)) < len(gpt2_tokenizer().encode(MIXED))


def test_special_tokens_in_the_text_are_noted_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    notes: list[str] = []
    prepare([tmp_path / "a.txt"], tmp_path / "out", val_fraction=0.0, workers=1, note=notes.append)
    assert notes == ["<|endoftext|> in the text is ordinary text, not a special token"]
    assert ids_of(tmp_path / "out", "train").count(EOT) == 1
    (tmp_path / "a.txt").write_text("one <|im_end|>")
    prepare([tmp_path / "a.txt"], tmp_path / "more", val_fraction=0.0, workers=1, note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize("size", [0, 256, 2**20 + 1])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="--train-tokenizer: expected 257 to 1048576 ids"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", vocab_size=size)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt"]


# All or nothing


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ({}, {}, "no file or folder"),
        ({"a.txt": b" \n"}, {}, "a.txt is empty"),
        ({"a.txt": b" \n"}, {"tokenizer": "char"}, "a.txt is empty"),
        ({"a.txt": b""}, {"vocab_size": 300}, "no text to train a tokenizer on"),
        ({"a.txt": b"good \xff"}, {}, "is not UTF-8"),
        ({"a.txt": b"x"}, {"tokenizer": "gtp2"}, "no tokenizer 'gtp2'"),
        ({"a.txt": b"x"}, {"val_fraction": 1.0}, "--val-fraction"),
        ({"a.txt": b"x"}, {"shard_tokens": 0}, "--shard-tokens"),
        ({"a.txt": b"x"}, {"workers": 0}, "--workers"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path: Path, make: dict[str, bytes], options: Any, message: str) -> None:
    for name, raw in make.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        prepare([tmp_path / "a.txt"], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert {f.name for f in tmp_path.iterdir()} == make.keys()


@pytest.mark.usefixtures("small_pieces")
def test_an_error_late_in_the_text_leaves_nothing(tmp_path: Path) -> None:
    source = many_documents(tmp_path)
    (source / "z.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(DataError, match=r"z\.jsonl, line 2 has no field 'text'"):
        prepare([source], tmp_path / "out", workers=2)
    assert {f.name for f in tmp_path.iterdir()} == {"in"}


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    prepare([tmp_path / "a.txt"], tmp_path / "empty")
    before = content(tmp_path / "empty")
    for taken in ("empty", "a.txt"):
        with pytest.raises(OSError, match=f"{taken} exists already: remove it, or choose another --out"):
            prepare([tmp_path / "a.txt"], tmp_path / taken)
    assert content(tmp_path / "empty") == before


@pytest.mark.usefixtures("small_pieces")
def test_every_refused_write_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills at the nth write, sync or rename, for every n."""
    source = many_documents(tmp_path, n=20)
    allowed, real = 0, {"write": shard_writer.append_array, "fsync": os.fsync, "replace": Path.replace}
    calls = 0

    def refusing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](*args, **kwargs)

        return call

    monkeypatch.setattr(shard_writer, "append_array", refusing("write"))
    monkeypatch.setattr(os, "fsync", refusing("fsync"))
    monkeypatch.setattr(Path, "replace", refusing("replace"))
    run = partial(prepare, [source], tmp_path / "out", tokenizer="byte", workers=1, shard_tokens=20_000)
    line = f"cannot write {tmp_path / 'out'}: No space left on device; nothing of it was kept"
    for n in range(200):
        allowed, calls = n, 0
        caught = None
        try:
            run()
        except OSError as error:
            caught = str(error)
        if caught is None:
            break
        assert caught == line
        assert {f.name for f in tmp_path.iterdir()} == {"in"}
    assert 20 < n < 199
    shards.read_index(tmp_path / "out")


def command(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen([FUSEDGPT, "prepare", *map(str, arguments)], text=True, **pipes)


def test_a_killed_run_leaves_no_set_and_the_next_one_starts_anew(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"some text " * 200)
    pipe = f"/dev/fd/{read}"
    with command(pipe, "--out", tmp_path / "out", pass_fds=[read]) as first:
        partial_folder = tmp_path / ".out.partial"
        for _ in range(200):
            if (partial_folder / "train.documents.bin").exists():
                break
            time.sleep(0.05)
        (tmp_path / "a.txt").write_text("other text")
        with command(tmp_path / "a.txt", "--out", tmp_path / "out") as second:
            assert "another process is writing" in second.communicate()[1]
        first.send_signal(signal.SIGKILL)
    os.close(write)
    assert {f.name for f in tmp_path.iterdir()} == {".out.partial", "a.txt"}
    with command(tmp_path / "a.txt", "--out", tmp_path / "out", "--quiet") as again:
        assert again.communicate()[1] == ""
    assert {f.name for f in tmp_path.iterdir()} == {"out", "a.txt"}
    assert not list((tmp_path / "out").glob(".*"))
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "precious.txt").write_text("x")
    with pytest.raises(OSError, match=r"precious\.txt that fusedgpt did not make"):
        prepare([tmp_path / "a.txt"], tmp_path / "new")
    assert (tmp_path / ".new.partial" / "precious.txt").read_text() == "x"


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"some text " * 200)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with command(f"/dev/fd/{read}", "--out", tmp_path / "out", pass_fds=[read], preexec_fn=heed) as running:
        for _ in range(200):
            if (tmp_path / ".out.partial" / "train.documents.bin").exists():
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        errors = running.communicate()[1]
    os.close(write)
    assert (running.returncode, errors) == (130, "fusedgpt: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_begin_worker", lambda *_: os._exit(3))
    chunks = [[("text", True, False)]] * 3
    with pytest.raises(OSError, match=r"a worker process was killed.*fewer --workers"):
        list(encode.encode_chunks(chunks, byte_tokenizer(), 2))


def test_workers_end_with_their_parent() -> None:
    script = """if True:
        import itertools, multiprocessing
        from fusedgpt.model.tokenizer import byte_tokenizer
        from fusedgpt.train.data.text.encode import encode_chunks
        chunks = itertools.repeat([("text", True, False)])
        for _ in encode_chunks(chunks, byte_tokenizer(), 2):
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = parent.stdout.readline().split()
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The command


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    options = ["--tokenizer", "byte", "--text-field", "body", "--val-fraction", "0", "--json"]
    with command(tmp_path / "a.jsonl", "--out", tmp_path / "out", *options) as done:
        out, errors = done.communicate()
    assert (done.returncode, errors) == (0, "")
    result = json.loads(out)
    assert (result["path"], result["tokenizer"], result["vocab_size"]) == (str(tmp_path / "out"), "byte", 257)
    assert (result["train_tokens"], result["train_documents"], result["val_tokens"]) == (8, 2, 0)
    assert result["text_bytes"] == 6
    with command("-", "--out", tmp_path / "piped", stdin=subprocess.PIPE) as done:
        out, errors = done.communicate("standard input is text")
    assert out.splitlines()[-1] == f"token set: {tmp_path / 'piped'}"
    assert "5 training tokens in 1 document," in out.replace(
        "4 training tokens in 1", "5 training tokens in 1"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("{root}/bad.txt --out {root}/out", 1, "bad.txt is a binary file (byte 0 is zero), not text"),
        ("{root}/a.txt --out {root}/a.txt", 1, "a.txt exists already: remove it, or choose another --out"),
        ("{root}/a.txt --out /proc/x", 1, "cannot write /proc/x: "),
        ("- --out {root}/out --tokenizer char", 1, "- can be read only once"),
        ("- --out {root}/out", 1, "- is empty"),
        ("{root}/a.txt --out {root}/out --errors lax", 2, "Invalid value for '--errors'"),
        ("{root}/a.txt --out {root}/out --tokenizer byte --train-tokenizer 300", 2, "exclude each other"),
    ],
)
def test_errors_of_the_command(tmp_path: Path, arguments: str, code: int, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.txt").write_bytes(b"\0\1")
    with command(*arguments.format(root=tmp_path).split()) as done:
        out, errors = done.communicate()
    assert (done.returncode, out) == (code, "")
    assert message in " ".join(errors.replace("│", "").split())
    assert "Traceback" not in errors
    assert {f.name for f in tmp_path.iterdir()} == {"a.txt", "bad.txt"}


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    (tmp_path / "a.txt").write_text("text " * 200_000)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999)); import signal; "
    )
    limited += (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from fusedgpt.train.cli.main import main; main()"
    )
    arguments = ["prepare", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "byte"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"fusedgpt: cannot write {tmp_path / 'out'}: File too large; nothing of it was kept\n"
    )
    assert {f.name for f in tmp_path.iterdir()} == {"a.txt"}


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", -1.0)
    for quiet in (False, True):
        with terminal.progress_bar("reading", quiet=quiet) as show:
            report = cli_prepare._with_speed(show)
            report("training the tokenizer", 1, 4, 0)
            report("tokenising", 2, 4, 1000)
            report("tokenising", 2, 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training the tokenizer 25%"
    assert lines[1].startswith("tokenising, 1,000 tokens, ")
    assert lines[1].endswith(" tok/s 50%")
    assert lines[2:] == ["tokenising"]

"""What README and docs tell people to type: Python runs, commands have the options they are given."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import fusedgpt
from fusedgpt.train.cli.main import app, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "max_length": 64}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The fusedgpt commands of the page's shell blocks and in its lines, as arguments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:fusedgpt|torchrun) [^`\n]+)`", page.read_text())
    words = [shlex.split(line, comments=True) for line in lines]
    found = []
    for line in words:
        line = line[: line.index(">")] if ">" in line else line
        if "fusedgpt" in line:
            found.append(line[line.index("fusedgpt") + 1 :])
        elif "fusedgpt.train" in line:
            found.append(["train", *line[line.index("fusedgpt.train") + 1 :]])
    return found


COMMANDS = [(page.name, shlex.join(one)) for page in PAGES for one in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command[:40] for _, command in COMMANDS])
def test_a_command_has_the_options_it_is_given(page: str, command: str) -> None:
    del page  # in the test's name
    here: Any = typer.main.get_command(app)
    words = shlex.split(command)
    context = here.context_class(here, info_name="fusedgpt")
    while words and hasattr(here, "commands") and words[0] != "--help":
        here = here.commands[words.pop(0)]
        context = here.context_class(here, parent=context)
    here.make_parser(context).parse_args(
        [word for word in words if word != "..."]
    )  # raises for a wrong option


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with book.txt and models/mine, in which whatever is trained is tiny."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The cat sat on the mat. Today it rained. " * 60)
    fit = fusedgpt.fit

    def quickly(*paths: str, **settings: Any) -> Any:
        return fit(*paths, **{**settings, **TINY, "steps": 2})

    monkeypatch.setattr(fusedgpt, "fit", quickly)
    quickly("book.txt", tokenizer="byte").model_path.rename("models/mine")


FEW = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 64 --max-length 64"
ELSEWHERE = ("--data-source", "torchrun")  # need a server; test_distributed.py has several processes


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("page", ["data", "interoperability", "training", "tutorial"])
def test_commands_run_one_after_the_other(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory that has what they name, with tiny models and few steps."""
    files_that_docs_name(with_set=page != "data")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    lines = "\n".join(blocks(ROOT / "docs" / f"{page}.md", "sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] != ["fusedgpt"] or any(option in line for option in ELSEWHERE):
            continue
        words = words[1 : words.index(">") if ">" in words else None]
        makes = words[0] in ("train", "create") and "--resume" not in words
        few = f"{FEW} --steps 2" if "--init-from" not in words else "--max-length 64 --steps 2"
        few += " --refined-tokens 9000" if words[0] == "create" else ""
        with pytest.raises(SystemExit) as end:
            main([*words, *(few.split() if makes else [])])
        assert not end.value.code, line


def files_that_docs_name(*, with_set: bool) -> None:
    text = Path("book.txt").read_text()
    for name in ("letters.txt", "held_out.txt", "notes.md", "books/one.txt", "more/one.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"{name}: {text}")
    with gzip.open("chats.jsonl.gz", "wt") as chats:
        chats.writelines(json.dumps({"text": f"Hello {i}, {text[:99]}"}) + "\n" for i in range(20))
    Path("run.toml").write_text("[train]\nwarmup = 0.1\n")
    shutil.copytree("models/mine", "GPT2_FOLDER")
    next(Path("runs").iterdir()).rename("runs/other")
    if with_set:
        with pytest.raises(SystemExit):
            main(["prepare", "book.txt", "--tokenizer", "byte", "--out", "sets/mine"])


@pytest.mark.usefixtures("quick")
def test_python_of_the_model_folder_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(ROOT / "docs" / "interoperability.md", "python"):
        exec(block, {})
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.usefixtures("quick")
def test_python_of_the_library_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        exec(block, names)
    said = capsys.readouterr().out
    assert "The" in said
    assert "torch.Size([2, 128, 3, 4, 64])" in said
    hf, ids = names["hf"], names["ids"]
    ours = hf.eval()(ids).logits
    hf.set_attn_implementation("eager")
    for module in hf.modules():
        if type(module).__name__ == "LayerNorm":
            module.__class__ = torch.nn.LayerNorm
    torch.testing.assert_close(ours, hf(ids).logits, atol=1e-4, rtol=1e-4)


def shape(line: str) -> str:
    """`line` without its numbers, its bar and the name of the run."""
    line = re.sub(r"\[[#.]{20}\]", "[bar]", line)
    return re.sub(r"\d[\d,.:]*(e-\d+)?", "0", re.sub(r"(runs|models)/\S+", r"\1/NAME", line))


def test_the_transcript_is_what_the_program_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "README.md", "text")
    command, *lines = block.splitlines()
    assert command == "$ scripts/quickstart"
    prompt = re.search(r'^prompt="(.*)"$', (ROOT / "scripts" / "quickstart").read_text(), re.MULTILINE)
    assert prompt
    monkeypatch.chdir(tmp_path)
    few = "--n-layer 1 --n-head 1 --n-embd 16 --max-length 64 --steps 20 --refined-tokens 9000"
    with pytest.raises(SystemExit) as end:
        main(["create", prompt[1], *few.split()])
    assert not end.value.code
    said = capsys.readouterr()
    printed = {shape(line) for line in (said.err + said.out).splitlines()}
    shown = re.sub(r"(?s)(--- text \d of \d\n).*?\n\.\.\.", r"\1...", "\n".join(lines))
    for line in shown.splitlines():
        assert line == "..." or shape(line) in printed, line
